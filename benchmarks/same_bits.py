"""Train small models from fixed seeds and print a checksum of each, to compare two revisions bit for bit.

Run it in two checkouts on one machine, one thread each, and compare what it prints::

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/same_bits.py > bits.txt

Sums in other orders, and so other bits, are no errors by themselves. A change that says that it only moves code should
leave every line as it was.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ensemble_kd import (
    AP,
    CCL,
    ICL,
    KD,
    EnsembleKD,
    MaskedItem,
    NextItem,
    fit,
)
from ensemble_kd.data import SequenceData, synthetic
from ensemble_kd.distillation import distill
from ensemble_kd.encoders import BERT4Rec, Caser, GRU4Rec, SASRec
from ensemble_kd.evaluation import evaluate

ITEMS, LENGTH = 120, 12
LOSSES = 0.2 * AP() + 0.1 * (ICL(temperature=0.3) + CCL(temperature=0.3)) + KD(temperature=0.7)
ENCODERS: Mapping[str, Callable[[], nn.Module]] = {
    "BERT4Rec": lambda: BERT4Rec(ITEMS, d_model=16, max_len=LENGTH),
    "SASRec": lambda: SASRec(ITEMS, d_model=16, max_len=LENGTH),
    "GRU4Rec": lambda: GRU4Rec(ITEMS, d_model=16, max_len=LENGTH),
    "Caser": lambda: Caser(ITEMS, d_model=16, max_len=LENGTH),
}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Eight digits that change with any bit of any tensor."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def lines(data: SequenceData) -> Iterator[tuple[str, str]]:
    """A name and a checksum per run."""
    for (name, encoder), classifier, negatives in itertools.product(ENCODERS.items(), ("linear", "tied"), (None, 32)):
        masked = name == "BERT4Rec"
        objective = MaskedItem(negatives=negatives) if masked else NextItem(views=2, negatives=negatives)
        model = EnsembleKD(
            encoder,
            n=3,
            objective=objective,
            losses=LOSSES,
            item_attributes=data.item_attributes,
            classifier=classifier,
        )
        fit(model, data, epochs=2, batch_size=64, lr=1e-3, window=LENGTH, precision="float32", progress=False)
        sampled = "full" if negatives is None else "sampled"
        yield f"fit {name} {classifier} {sampled}", checksum(model.state_dict())
    model = EnsembleKD(ENCODERS["SASRec"], n=2, losses=LOSSES, item_attributes=data.item_attributes, classifier="tied")
    with TemporaryDirectory() as folder:
        for resume in (False, True):  # the second call trains one epoch more
            fit(
                model,
                data,
                epochs=2 + resume,
                output_dir=folder,
                resume=resume,
                progress=False,
                schedule=constant,
                precision="float32",
            )
    yield "fit with a resume", checksum(model.state_dict())
    found = evaluate(model, data, "test", precision="float32")
    yield "evaluate", checksum(dict(found.ranks))
    items, scores = model.recommend(data.inputs("test", LENGTH), k=10)
    yield "recommend", checksum({"items": items, "scores": scores})
    student = distill(
        model, lambda: SASRec(ITEMS, d_model=24, max_len=LENGTH), data, epochs=1, progress=False, precision="float32"
    ).student
    yield "distill", checksum(student.state_dict())


def constant(epoch: float, epochs: int) -> float:
    """Keep one rate, so that a longer run begins as a shorter one."""
    return 1.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, found in lines(synthetic(num_users=150, num_items=ITEMS, max_len=20)):
        print(f"{found}  {what}", flush=True)
