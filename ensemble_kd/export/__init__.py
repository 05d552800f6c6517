"""Models as files: safetensors with the settings inside, and graphs for other engines."""

from ensemble_kd.export.graphs import Scorer, to_onnx, to_program
from ensemble_kd.export.weights import load, save

__all__ = ["Scorer", "load", "save", "to_onnx", "to_program"]
