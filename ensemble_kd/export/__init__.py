"""Models as files: safetensors with the settings inside, repositories of the Hub, and graphs for other engines."""

from ensemble_kd.export.card import Card
from ensemble_kd.export.graphs import Scorer, to_onnx, to_program
from ensemble_kd.export.hub import from_pretrained, push_to_hub, save_pretrained
from ensemble_kd.export.weights import load, save

__all__ = [
    "Card",
    "Scorer",
    "from_pretrained",
    "load",
    "push_to_hub",
    "save",
    "save_pretrained",
    "to_onnx",
    "to_program",
]
