"""``recommend`` and ``recommend_for``: names in, names out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ensemble_kd.data import AnySequences, SequenceData, Unknown, Vocabulary
from ensemble_kd.ensemble import EnsembleKD, check_model_and_data
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, flag, instance, shown, whole
from ensemble_kd.recommending.named import NamedRecommendations
from ensemble_kd.serving import Aggregate

TOGETHER = 1024  # users whose histories are padded to one length


class Question(NamedTuple):
    """The arguments that the functions here share."""

    where: str
    k: int
    exclude_seen: bool
    candidates: list[int] | None
    aggregate: Aggregate


def recommend(
    model: EnsembleKD,
    histories: Iterable[Sequence[Hashable]] | Mapping[Hashable, Sequence[Hashable]],
    *,
    k: int = 10,
    exclude_seen: bool = True,
    candidates: Iterable[Hashable] | None = None,
    aggregate: Aggregate = "logits",
    unknown: Unknown = "error",
) -> NamedRecommendations:
    """Return the k best next items of histories of names. Their users need not have been there in training.

    Args:
        model: with a vocabulary; without one, items are numbers from 1.
        histories: the items of each user, oldest first; a mapping has the users' names, else they are counted from 0.
        k: items per user.
        exclude_seen: leave out the items of the history itself.
        candidates: names of the items to choose from; None: all.
        aggregate: as of ``EnsembleKD.recommend``.
        unknown: "error" for names that the model does not know, or "drop" to leave them out; a user with no known item
            then has no rows.

    Raises:
        EnsembleKDError: unknown names, an empty history, or what ``EnsembleKD.recommend`` refuses.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> names = Vocabulary(["tea", "milk", "rum"])
        >>> model = EnsembleKD(lambda: SASRec(3, d_model=4, max_len=5), n=2, vocabulary=names)
        >>> recommend(model, {"ann": ["tea", "milk"]}, k=1).lists()
        {'ann': ['rum']}
    """
    instance("recommend", "model", model, EnsembleKD, "Pass a trained ensemble.")
    names = names_of(model)
    asked = question("recommend", names, k, exclude_seen, candidates, aggregate, unknown)
    if isinstance(histories, str | bytes) or not isinstance(histories, Iterable):
        fix = 'Pass a list of lists of names, or {"user": [names]}.'
        raise EnsembleKDError("recommend", "histories, a list of names per user", shown(histories), fix)
    named = histories.items() if isinstance(histories, Mapping) else enumerate(histories)
    users: list[Hashable] = []
    listed: list[list[Hashable]] = []
    for user, history in named:
        if isinstance(history, str | bytes) or not isinstance(history, Iterable):
            fix = "Pass a list of names, also if there is only one."
            raise EnsembleKDError("recommend", "a list of names per user", f"{shown(history)} of user {user!r}", fix)
        users.append(user)
        listed.append(list(history))
        if not listed[-1]:
            fix = "Leave the user out, or recommend what is popular."
            raise EnsembleKDError("recommend", "a history of one item or more", f"none of user {user!r}", fix)
    if unknown == "error":
        names.numbers([name for history in listed for name in history], where="recommend")  # all in one error
    rows = [torch.tensor(names.numbers(history, unknown="drop"), dtype=torch.int64) for history in listed]
    return joined(answers(model, names, zip(users, rows, strict=True), asked))


def recommend_for(
    model: EnsembleKD,
    users: Iterable[Hashable],
    data: SequenceData,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    candidates: Iterable[Hashable] | None = None,
    aggregate: Aggregate = "logits",
    unknown: Unknown = "error",
) -> NamedRecommendations:
    """Return the k best next items of users of the data, after all of their items, held out or not.

    Args:
        model: trained on this data or on other data.
        users: the source's own ids; numbers from 0 if the data has no names.
        data: the users' items. Names connect it with the model, so it may number its items in its own way.
        k, exclude_seen, candidates, aggregate: as of ``recommend``.
        unknown: "error", or "drop" to leave out users that the data does not know and items that the model does not.

    Raises:
        EnsembleKDError: as ``recommend``; names on one side alone.

    Examples:
        >>> from ensemble_kd.encoders import SASRec
        >>> table = {"user_id": ["ann", "ann", "bob"], "item_id": ["tea", "milk", "rum"], "timestamp": [1, 2, 3]}
        >>> data = SequenceData.from_interactions(table, holdout="none")
        >>> model = EnsembleKD(lambda: SASRec(3, d_model=4, max_len=5), n=2, vocabulary=data.vocabulary)
        >>> recommend_for(model, ["ann"], data, k=1).lists()
        {'ann': ['rum']}
    """
    where = "recommend_for"
    check_model_and_data(where, model, data)
    names = names_of(model)
    if not isinstance(data, SequenceData):
        fix = "Use recommend_all for data on disk, or recommend for histories."  # type: ignore[unreachable]
        raise EnsembleKDError(where, "data in memory", shown(data), fix)
    asked = question(where, names, k, exclude_seen, candidates, aggregate, unknown)
    known = user_names_of(data)
    numbers = known.numbers(users, unknown=unknown, where=where)
    own = translation(where, model, data)
    rows = [own[data.items[data.offsets[u] : data.offsets[u + 1]]] for u in numbers]
    if rows:
        check_known(
            where, data, own, torch.cat([data.items[data.offsets[u] : data.offsets[u + 1]] for u in numbers]), unknown
        )
    named = ((known.name(u), row[row > 0]) for u, row in zip(numbers, rows, strict=True))
    return joined(answers(model, names, named, asked))


def names_of(model: EnsembleKD) -> Vocabulary:
    """Return the names of a model's items: its vocabulary, or the numbers from 1."""
    return model.vocabulary if model.vocabulary is not None else Vocabulary(range(1, model.num_items + 1))


def user_names_of(data: AnySequences) -> Vocabulary:
    """Return the names of the users: those of the data, or the numbers from 0."""
    return data.users if data.users is not None else Vocabulary(range(data.num_users), first=0, kind="user")


def question(
    where: str,
    names: Vocabulary,
    k: int,
    exclude_seen: bool,
    candidates: Iterable[Hashable] | None,
    aggregate: Aggregate,
    unknown: Unknown,
) -> Question:
    """Return the arguments, checked; candidates that are unknown are an error, or dropped."""
    choice(where, "unknown", unknown, ("error", "drop"))
    choice(where, "aggregate", aggregate, get_args(Aggregate))
    flag(where, "exclude_seen", exclude_seen)
    k = whole(where, "k", k, least=1)
    chosen = None if candidates is None else names.numbers(candidates, unknown=unknown, where=where)
    return Question(where, k, exclude_seen, chosen, aggregate)


def translation(where: str, model: EnsembleKD, data: AnySequences) -> Tensor:
    """Return the model's number of each item of the data, 0 for items that it does not know: (data.num_items + 1,).

    Raises:
        EnsembleKDError: one of the two has names, and the other has not.
    """
    if (model.vocabulary is None) != (data.vocabulary is None):
        got = "data without names" if data.vocabulary is None else "a model without names"
        fix = "Read the data with from_interactions, and train with fit, which keeps its names in the model."
        raise EnsembleKDError(where, "names in model and data, or in neither", got, fix)
    if model.vocabulary is None or data.vocabulary is None or data.vocabulary == model.vocabulary:
        own = torch.arange(data.num_items + 1)
        return own.masked_fill(own > model.num_items, 0)
    found = [model.vocabulary.numbers([name], unknown="drop") for name in data.vocabulary.names]
    return torch.tensor([0, *(number[0] if number else 0 for number in found)])


def check_known(where: str, data: AnySequences, own: Tensor, items: Tensor, unknown: Unknown) -> None:
    """Refuse items that the model does not know, all of them in one error, unless they are to be dropped."""
    missing = items[own[items] == 0].unique()
    if unknown == "error" and len(missing):
        names = data.vocabulary or Vocabulary(range(1, data.num_items + 1))
        known = Vocabulary([names.name(int(i)) for i in (own > 0).nonzero()[:, 0]])
        known.numbers([names.name(int(i)) for i in missing], where=where)


def answers(
    model: EnsembleKD, names: Vocabulary, histories: Iterable[tuple[Hashable, Tensor]], asked: Question
) -> Iterator[NamedRecommendations]:
    """Return the recommendations of some users at a time; users without a known item have none.

    Args:
        model: scores.
        names: of its items.
        histories: each user's name and the model's numbers of the items, oldest first.
        asked: the other arguments.
    """
    block: list[tuple[Hashable, Tensor]] = []
    for user, row in histories:
        if len(row):
            block.append((user, row))
        if len(block) == TOGETHER:
            yield _answer(model, names, block, asked)
            block = []
    if block:
        yield _answer(model, names, block, asked)


def _answer(
    model: EnsembleKD, names: Vocabulary, block: list[tuple[Hashable, Tensor]], asked: Question
) -> NamedRecommendations:
    longest = max(len(row) for _, row in block)
    ids = torch.zeros(len(block), longest, dtype=torch.int64)
    for i, (_, row) in enumerate(block):
        ids[i, longest - len(row) :] = row
    options = {"exclude_seen": asked.exclude_seen, "candidates": asked.candidates, "aggregate": asked.aggregate}
    found = model.recommend(ids.to(model.device), asked.k, **options)  # type: ignore[arg-type]
    columns = NamedRecommendations([], [], [], [])
    for (user, _), items, scores in zip(block, found.items.tolist(), found.scores.tolist(), strict=True):
        kept = [(item, score) for item, score in zip(items, scores, strict=True) if item]
        columns.user_id.extend([user] * len(kept))
        columns.item_id.extend(names.name(item) for item, _ in kept)
        columns.rank.extend(range(1, len(kept) + 1))
        columns.score.extend(score for _, score in kept)
    return columns


def joined(parts: Iterable[NamedRecommendations]) -> NamedRecommendations:
    """Return the rows of several tables as one."""
    whole_table = NamedRecommendations([], [], [], [])
    for part in parts:
        for own, more in zip(whole_table.columns().values(), part.columns().values(), strict=True):
            own.extend(more)
    return whole_table
