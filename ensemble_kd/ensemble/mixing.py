"""What the encoders of one ensemble have in common, and what a mixed ensemble refuses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ensemble_kd.distributed import Place, gather_objects
from ensemble_kd.ensemble.contract import size_of
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.stacking import form_of


def common_sizes(members: Sequence[nn.Module], *, num_items: int | None, max_len: int | None) -> tuple[int, int | None]:
    """Return v, and the longest input that every member reads; None: any.

    Raises:
        EnsembleKDError: v is unknown, or members were built for other numbers of items.

    Examples:
        >>> from ensemble_kd.encoders import GRU4Rec, SASRec
        >>> common_sizes([SASRec(9, max_len=20), GRU4Rec(9, max_len=10)], num_items=None, max_len=None)
        (9, 10)
    """
    items = size_of(members[0], "num_items", num_items)
    for i, member in enumerate(members):
        own = getattr(member, "num_items", items)
        if num_items is None and own != items:
            fix = "Build all encoders for one catalogue."
            raise EnsembleKDError("EnsembleKD", f"members of {items} items, as member 0", f"{own} in member {i}", fix)
    if max_len is not None:
        return items, size_of(members[0], "max_len", max_len)
    limits = [size_of(m, "max_len", None) for m in members if getattr(m, "max_len", None) is not None]
    return items, min(limits, default=None)


def check_outputs(outs: Sequence[Tensor], kinds: Sequence[int]) -> None:
    """Refuse groups whose members return hidden states of other forms, given the output of each group's first member.

    Raises:
        EnsembleKDError: with both forms.
    """
    forms = ["(b, d)" if out.ndim == 2 else "(b, l, d)" for out in outs]
    for group, out in enumerate(outs):
        if (forms[group], out.dtype) != (forms[0], outs[0].dtype):
            fix = "One objective trains all members: give them outputs of one form and one type."
            got = f"{forms[group]} {out.dtype} from member {list(kinds).index(group)}"
            expected = f"hidden states {forms[0]} {outs[0].dtype} from all members, as from member 0"
            raise EnsembleKDError("encoder output", expected, got, fix)


def check_places(members: Sequence[nn.Module], place: Place) -> None:
    """Refuse processes that have members of other architectures, or in another order.

    Raises:
        EnsembleKDError: says how to order the factories.
    """
    if place.member is None:
        return
    forms = gather_objects([form_of(member) for member in members], place)
    if any(own != forms[0] for own in forms):
        fix = "List the factories so that each process gets the same ones: [a, b, a, b] for two processes, say."
        raise EnsembleKDError("mesh", "members of the same architectures in every process", "other ones", fix)
