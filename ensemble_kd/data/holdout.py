"""The newest items of the users, held back for validation and test: the last ones, those from a time on, or none."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ensemble_kd.data.columns import Times, moment
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import choice, shown

Named: TypeAlias = Literal["last", "none"]
NAMES: dict[str, str] = {"last": "leave-one-out", "none": "nothing held out"}  # in the words of a protocol


@dataclass(frozen=True)
class AtTime:
    """Points of time that divide training from validation and from test, the same for all users.

    What happened before ``valid`` trains, or before ``test`` if there is no ``valid``. The target of a user in
    validation and in test is the first item of the period, and the user's history is all that came before it. A user
    without an item in a period, or without any before it, has no target there.

    Args:
        test: the moment from which on interactions are for test: a value that compares with the column of times. A
            date may be a text such as "2024-05-01"; if the column has time zones, it is in UTC.
        valid: the moment from which on they are for validation; None: there is no validation.
    """

    test: Any
    valid: Any = None


@dataclass(frozen=True, eq=False)
class Cuts:
    """The place at which each user's items are cut, per split.

    Args:
        train: (num_users,) int64, the number of the oldest items that train.
        valid: (num_users,) int64, the number of items before the validation target; -1: there is no target.
        test: (num_users,) int64, the same for test.
        name: of the protocol, such as "from 2024-05-01 on".

    Examples:
        >>> last_two = cuts_of("last", torch.tensor([5, 3]))
        >>> last_two.train.tolist(), last_two.valid.tolist(), last_two.test.tolist()
        ([3, 1], [3, 1], [4, 2])
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    name: str

    def check(self, lengths: Tensor) -> None:
        """Refuse cuts that do not fit users with so many items each.

        Raises:
            EnsembleKDError: names the part.
        """
        for name in ("train", "valid", "test"):
            cut: Any = getattr(self, name)
            if not isinstance(cut, Tensor) or cut.dtype != torch.int64 or cut.shape != lengths.shape:
                fix = "Give one number per user."
                raise EnsembleKDError("Cuts", f"{name} int64 of shape {tuple(lengths.shape)}", shown(cut), fix)
            if name == "train":
                wrong = (cut < 0) | (cut > lengths)
            else:  # a target needs an item before it, and no item that trains may come after it
                wrong = (cut != -1) & ((cut < 1) | (cut >= lengths) | (cut < self.train))
            if bool(wrong.any()):
                user = int(wrong.nonzero()[0])
                got = f"{int(cut[user])} of {int(lengths[user])} items of user {user}"
                fix = "Cut between the items: train <= valid and test < the number of items, or -1 for no target."
                raise EnsembleKDError("Cuts", f"{name} within each user's items", got, fix)

    @property
    def checksum(self) -> int:
        """A number that changes with any cut."""
        value = 0
        for cut in (self.train, self.valid, self.test):
            value = zlib.crc32(cut.numpy().tobytes(), value)
        return value


Holdout: TypeAlias = Named | Cuts


def least_items(holdout: object) -> int:
    """Return the fewest items that a user may have.

    Raises:
        EnsembleKDError: something else than a ``Holdout``.

    Examples:
        >>> least_items("last"), least_items("none")
        (3, 1)
    """
    if isinstance(holdout, Cuts):
        return 1
    return 1 + held(choice("SequenceData", "holdout", holdout, get_args(Named)))


def held(holdout: Named) -> int:
    """Return the number of newest items per user that do not train."""
    return 2 if holdout == "last" else 0


def cuts_of(holdout: Holdout, lengths: Tensor) -> Cuts:
    """Return the cuts of users with so many items each."""
    if isinstance(holdout, Cuts):
        return holdout
    if holdout == "last":
        return Cuts(lengths - 2, lengths - 2, lengths - 1, NAMES[holdout])
    none = torch.full_like(lengths, -1)
    return Cuts(lengths, none, none, NAMES[holdout])


def cuts_at(where: str, split: AtTime, when: Times, offsets: Tensor) -> Cuts:
    """Return the cuts of users whose interactions happened at sorted times, user after user.

    Raises:
        EnsembleKDError: moments that do not compare with the times, or validation that begins after test.
    """
    test = moment(where, split.test, when)
    valid = test if split.valid is None else moment(where, split.valid, when)
    if valid > test:
        fix = "Validation lies between training and test."
        raise EnsembleKDError(where, "valid <= test", f"{split.valid!r} > {split.test!r}", fix)
    lengths = offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    train, known = (
        torch.bincount(owner[torch.from_numpy(when < point)], minlength=len(lengths)) for point in (valid, test)
    )
    name = f"from {split.test} on" if split.valid is None else f"from {split.valid} and {split.test} on"
    none = torch.full_like(lengths, -1)
    return Cuts(
        train,
        torch.where((train >= 1) & (train < known), train, none),
        torch.where((known >= 1) & (known < lengths), known, none),
        name,
    )
