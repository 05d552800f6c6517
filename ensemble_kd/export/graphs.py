"""Graphs for other engines: ``torch.export`` programs and ONNX, of the whole ensemble or of one member.

A graph has no vmapped calls, so ``Scorer`` is the ensemble as plain modules. It gives the scores of ``model(item_ids)``
in evaluation mode. ONNX needs onnx and onnxscript (the extra ``export``).
"""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError, first_line, import_extra
from ensemble_kd.internal import file_path, instance, make_folder, onnx_fixes_recurrent_batches, replacing, whole

EXAMPLE = (2, 3)  # of batch and length: neither 0 nor 1, which exporters take for constants


class Scorer(nn.Module):
    """The ensemble as plain modules, in evaluation mode: item_ids (b, l) int64 -> scores (b, num_items + 1).

    Column 0, padding, is -inf. Inputs are padded on the left to the length that the encoder reads, or cut to the newest
    items.

    Args:
        model: with all its weights in this process.
        k: return (scores, items) of the k best instead, both (b, k); seen items are among them.

    Raises:
        EnsembleKDError: weights in other processes, or a k that is no whole number in 1..num_items.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2).eval()
        >>> ids = torch.tensor([[0, 1, 2]])
        >>> torch.allclose(Scorer(model)(ids), model(ids), atol=1e-6)
        True
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, model: EnsembleKD, k: int | None = None) -> None:
        super().__init__()
        instance("export", "model", model, EnsembleKD, "Pass an ensemble.")
        model.place.require_whole("export")
        self.k = None if k is None else whole("export", "k", k, least=1, most=model.num_items)
        self.members = nn.ModuleList(model.encoder.member(i) for i in range(len(model)))
        self.widths = model.widths
        weight, bias = model.classifier_weights()
        factors = model.factors.to(weight.dtype)
        self.register_buffer("weight", factors[:, None, None] * weight.detach())
        self.register_buffer("bias", (factors[:, None] * bias.detach()).mean(0))
        self.objective, self.mask_token = model.objective, model.mask_token
        self.options = {"newest": True} if model.encoder.gives_newest and not model.newest_only else {}
        self.columns = None if model.max_len is None else model.max_len - model.objective.query_columns
        self.eval()

    def forward(self, item_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Score the next item."""
        if self.columns is not None:
            # One length for all inputs: a graph for any length would have guards that its longest input breaks.
            room = item_ids.new_zeros(item_ids.shape[0], self.columns)
            item_ids = torch.cat([room, item_ids], dim=1)[:, -self.columns :]
        query = self.objective.query(item_ids, mask_token=self.mask_token, max_len=None)
        scores = self.bias.expand(item_ids.shape[0], -1)
        for member, rows, width in zip(self.members, self.weight, self.widths, strict=True):
            out = member(query, **self.options)
            newest = out if out.ndim == 2 else out[:, -1]
            weight = rows[:, :width]
            scores = scores + newest.to(weight.dtype) @ weight.T / len(self.members)
        scores = nn.functional.pad(scores, (1, 0), value=-torch.inf)
        return scores if self.k is None else tuple(scores.topk(self.k))  # type: ignore[return-value]


def to_program(model: EnsembleKD, *, k: int | None = None) -> torch.export.ExportedProgram:
    """Return the ensemble as a program of ``torch.export``, for any batch and any length.

    Pass ``model.member(i)`` for one network. ``torch.export.save`` and ``load`` keep it without this library.

    Raises:
        EnsembleKDError: an encoder that torch.export cannot trace; the text says why.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> model = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=5), n=2).eval()
        >>> ids = torch.tensor([[0, 1, 2, 4], [1, 2, 3, 4], [5, 6, 7, 8]])
        >>> torch.allclose(to_program(model).module()(ids), model(ids), atol=1e-6)
        True
    """
    instance("export", "model", model, EnsembleKD, "Pass an ensemble.")
    example = torch.ones(EXAMPLE, dtype=torch.long, device=model.device)
    # torch 2.6 takes no dimension without a largest size.
    shapes = ({i: torch.export.Dim(name, min=1, max=2**31 - 1) for i, name in enumerate(("batch", "length"))},)
    try:
        with warnings.catch_warnings():
            # cuDNN's view of a GRU's weights, made anew in every call; the graph reads the parameters themselves.
            warnings.filterwarnings("ignore", message=".*_flat_weights.* assigned during export", category=UserWarning)
            return torch.export.export(Scorer(model, k), (example,), dynamic_shapes=shapes)
    except Exception as error:  # torch raises many kinds for what it cannot trace
        fix = "torch.export needs an encoder without branches on values; its text above names the line."
        raise EnsembleKDError("export", "an encoder that torch.export can trace", first_line(error), fix) from error


def to_onnx(model: EnsembleKD, path: str | PathLike[str], *, k: int | None = None) -> Path:
    """Write the ensemble as an ONNX file: input ``item_ids``, output ``scores``, or ``scores`` and ``items`` with k.

    Raises:
        EnsembleKDError: as ``to_program``; onnx or onnxscript is not installed; the file cannot be written; the encoder
            has recurrent layers, and torch is 2.6, which would export them for one batch size.
    """
    for module in ("onnx", "onnxscript"):
        import_extra(module, extra="export", where="to_onnx")
    if onnx_fixes_recurrent_batches() and any(isinstance(m, nn.RNNBase) for m in model.encoder.member(0).modules()):
        fix = "Install a newer torch: this one exports nn.GRU, nn.LSTM and nn.RNN for one batch size."
        raise EnsembleKDError("to_onnx", "torch 2.7 or newer", torch.__version__, fix)
    outputs = ["scores"] if k is None else ["scores", "items"]
    file = file_path("to_onnx", "path", path)
    make_folder("to_onnx", file.parent)  # before the export, which takes seconds
    exported = to_program(model, k=k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own parts; what it cannot do it raises
        program = torch.onnx.export(exported, input_names=["item_ids"], output_names=outputs, dynamo=True)
    assert program is not None
    with replacing(file) as opened:
        opened.write(program.model_proto.SerializeToString())
    return file
