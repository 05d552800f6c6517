"""The item classifier of Eq. 5: with weights of its own, or tied to the embeddings of the items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from ensemble_kd.distributed import Place
from ensemble_kd.ensemble.item_loss import Classifier
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import instance
from ensemble_kd.objectives import Draw, Objective
from ensemble_kd.stacking import MixedModule, StackedModule, item_rows, share_table, sparse_lookups, take_rows

if TYPE_CHECKING:
    from ensemble_kd.ensemble.model import EnsembleKD
    from ensemble_kd.ensemble.scoring import Scoring

TIED = "item_embedding"  # the name that "tied" stands for


def check_tie(
    encoder: StackedModule | MixedModule,
    classifier: str,
    objective: Objective,
    num_items: int,
    widths: Sequence[int],
) -> str | None:
    """Return the name of the parameter that a classifier is tied to; None for "linear", with weights of its own.

    Args:
        encoder: the members.
        classifier: as of ``EnsembleKD``.
        objective: of the ensemble; if it never shows the mask token, v + 1 rows are enough: padding and the items.
        num_items: v.
        widths: d of each member.

    Raises:
        EnsembleKDError: there is no such embedding, or it has another shape; it names the embeddings that would do.
    """
    where, fix = "classifier", 'Use classifier="linear", "tied", or the dotted path of the item embedding.'
    instance(where, "classifier", classifier, str, fix)
    if classifier == "linear":
        return None
    masks = objective.query_columns > 0 or not objective.views_are_unmasked
    rows = (num_items + 2,) if masks else (num_items + 2, num_items + 1)
    name = f"{TIED if classifier == 'tied' else classifier}.weight"
    for kind, group in enumerate(encoder.groups):
        table, d = group.stacked_parameter(name), widths[encoder.kinds.index(kind)]
        shapes = [(count, d) for count in rows]
        if table is not None and table.shape[1:] in shapes:
            continue
        fitting = [path for path, p in group.named_parameters() if p.shape[1:] in shapes and path.endswith(".weight")]
        if fitting:
            fix = f'Use classifier={fitting[0].removesuffix(".weight")!r}, or "linear".'
        if table is None:
            expected = f"an embedding named {name.removesuffix('.weight')}"
            raise EnsembleKDError(where, expected, _tables(group, num_items), fix)
        shape = f"{name} of shape {tuple(table.shape[1:])}"
        if masks and table.shape[1:] == (num_items + 1, d):
            fix = "Give the mask token, which this objective shows, a row after the items' (num_items + 2 rows)."
        raise EnsembleKDError(where, f"an embedding of shape {' or '.join(map(str, shapes))}", shape, fix)
    return name


def _tables(group: StackedModule, num_items: int) -> str:
    """Return the names and shapes of the tables that have a row for each item, for a message."""
    found = {path: tuple(p.shape[1:]) for path, p in group.named_parameters() if p.ndim == 3 and p.shape[1] > num_items}
    listed = ", ".join(f"{path.removesuffix('.weight')} {shape}" for path, shape in found.items())
    return f"an encoder with {listed}" if found else f"an encoder without tables of more than {num_items} rows"


def tied_tables(model: Scoring) -> list[Tensor]:
    """Return the embeddings (n, v + 1 or v + 2, d) that the classifiers are tied to, one per group of members."""
    if model.tied_name is None:
        return []
    found = [group.stacked_parameter(model.tied_name) for group in model.encoder.groups]
    return [table for table in found if table is not None]


def whole_classifier(model: Scoring) -> Classifier:
    """Return the classifier of all items."""
    own, bias = model.item_classifier.weight, model.item_classifier.bias
    if own is not None:
        return Classifier(own, bias)
    tables = [item_rows(table, model.num_items).to(bias.dtype) for table in tied_tables(model)]
    return Classifier(model.encoder.join(tables), bias)


@contextmanager
def step_classifier(model: EnsembleKD, draw: Draw, place: Place) -> Iterator[Classifier]:
    """Give the classifier of the classes that a step scores; within the block, look-ups do what is cheapest with it."""
    at_least, tables = model.num_items + 1, tied_tables(model)
    if place.sharded:  # gradients are averaged in shards, which are dense
        weight, bias = whole_classifier(model)
        rows = slice(None) if draw.candidates is None else draw.candidates.items - 1
        yield Classifier(weight[:, rows], bias[:, rows])
    elif draw.candidates is not None:
        with ExitStack() as within:
            for group in model.encoder.groups:
                within.enter_context(sparse_lookups(group, at_least=at_least))
            yield _of_candidates(model, draw.candidates.items)
    elif tables and draw.inputs.device.type == "cpu":
        # The classifier's gradient is dense anyway: the look-ups' few rows are added to it, in place of a second
        # table that is filled, stacked and added.
        bias, weights = model.item_classifier.bias, []
        with ExitStack() as within:
            for group, table in zip(model.encoder.groups, tables, strict=True):
                lookups, weight = share_table(table, model.num_items)
                within.enter_context(sparse_lookups(group, at_least=at_least, shared=(table, lookups)))
                weights.append(weight.to(bias.dtype))
            yield Classifier(model.encoder.join(weights), bias)
    else:
        yield whole_classifier(model)


def _of_candidates(model: EnsembleKD, items: Tensor) -> Classifier:
    """Return the rows of some items (c,), whose gradients are sparse."""
    own, bias = model.item_classifier.weight, model.item_classifier.bias
    if own is not None:
        return Classifier(take_rows(own, items - 1), take_rows(bias, items - 1))
    rows = [take_rows(table, items).to(bias.dtype) for table in tied_tables(model)]
    return Classifier(model.encoder.join(rows), take_rows(bias, items - 1))
