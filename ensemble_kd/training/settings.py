"""The settings of a training run: checked once, and compared when a run is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, get_args

from ensemble_kd.data import AnySequences
from ensemble_kd.distributed import Place
from ensemble_kd.ensemble import EnsembleKD, ItemLoss, fingerprint
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import Exclude, Precision
from ensemble_kd.training.schedules import Schedule

Callback = Callable[[Mapping[str, Any]], None]
MAX_NAMED = 5  # differences that an error lists
SAMPLES = 4  # of the schedule, in an epoch


@dataclass(frozen=True)
class Settings:
    """The arguments of ``fit`` beside the model and the data; see there.

    Raises:
        EnsembleKDError: a value that cannot be used, before anything is trained or written.

    Examples:
        >>> from ensemble_kd.training import StepDecay
        >>> Settings(
        ...     epochs=0, batch_size=8, lr=1e-3, weight_decay=0.0, schedule=StepDecay(), transfer=None,
        ...     max_grad_norm=None, window=None, window_step=1, by_length=True, precision="float32", exclude="history",
        ...     patience=None, output_dir=None, resume=False, checkpoint_every_s=0.0, log_every=1, callback=None,
        ...     progress=False, seed=0,
        ... )
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: fit: expected epochs, a whole number >= 1, got 0. Pass such a number.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: Schedule
    transfer: Schedule | None
    max_grad_norm: float | None
    window: int | None
    window_step: int
    by_length: bool
    precision: Precision
    exclude: Exclude
    patience: int | None
    output_dir: str | PathLike[str] | None
    resume: bool
    checkpoint_every_s: float
    log_every: int
    callback: Callback | None
    progress: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "window_step", "log_every"):
            _whole(name, getattr(self, name), least=1)
        _whole("seed", self.seed, least=0)
        for name in ("window", "patience"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least=1)
        _number("lr", self.lr, above_zero=True)
        _number("weight_decay", self.weight_decay)
        _number("checkpoint_every_s", self.checkpoint_every_s, most=math.inf)
        if self.max_grad_norm is not None:
            _number("max_grad_norm", self.max_grad_norm, above_zero=True, most=math.inf)
        for name in ("lr", "weight_decay", "max_grad_norm"):
            if getattr(self, name) is not None:  # a NumPy number is a float, but no checkpoint may hold one
                object.__setattr__(self, name, float(getattr(self, name)))
        for name, choices in (("precision", get_args(Precision)), ("exclude", get_args(Exclude))):
            if getattr(self, name) not in choices:
                expected = f"{name} " + " or ".join(map(repr, choices))
                raise EnsembleKDError("fit", expected, repr(getattr(self, name)), "Choose one of these.")
        if self.resume and self.output_dir is None:
            raise EnsembleKDError("fit", "output_dir with resume=True", "None", "Say where the checkpoint is.")
        for schedule in (self.schedule, self.transfer):
            self._shares(schedule)

    def shares(self) -> list[float]:
        """Samples of the learning rate's schedule, then of the transfer's: what they do, whatever objects they are."""
        pairs = zip(self._shares(self.schedule), self._shares(self.transfer), strict=True)
        return [share for pair in pairs for share in pair]

    def _shares(self, schedule: Schedule | None) -> list[float]:
        shares = [1.0 if schedule is None else schedule(i / SAMPLES, self.epochs) for i in range(SAMPLES * self.epochs)]
        for i, share in enumerate(shares):
            if not (math.isfinite(share) and share >= 0):
                expected = "a schedule of finite shares >= 0"
                raise EnsembleKDError("fit", expected, f"{share!r} at epoch {i / SAMPLES}", "Correct the schedule.")
        return [float(share) for share in shares]

    def fingerprint(
        self, model: EnsembleKD, data: AnySequences, window: int, place: Place, item_loss: ItemLoss
    ) -> dict[str, str]:
        """Return by name what must be the same for a run to go on; schedules are compared by their ``shares``."""
        return {
            **{
                name: repr(getattr(self, name))
                for name in ("lr", "weight_decay", "max_grad_norm", "batch_size", "seed")
            },
            **{name: repr(getattr(self, name)) for name in ("window_step", "precision", "exclude")},
            "window": repr(window),
            "by_length": repr(bool(self.by_length)),
            "data": f"{data!r} with checksum {data.checksum}",
            **({"processes": str(place)} if place.size > 1 else {}),
            **item_loss.fingerprint(),
            **fingerprint(model),
        }


def check_same_run(
    before: Mapping[str, str], now: Mapping[str, str], shares_before: Sequence[float], shares_now: Sequence[float]
) -> None:
    """Refuse to go on with a run under other settings. ``epochs`` may differ where the schedule does not mind.

    Raises:
        EnsembleKDError: names what differs.

    Examples:
        >>> check_same_run({"seed": "0"}, {"seed": "1"}, [], [])
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: resume: expected the run that wrote the checkpoint, got seed: 0 then, \
1 now. Resume with the settings of the first call, or choose another output_dir.
    """
    names = [*now, *(name for name in before if name not in now)]
    differing = [
        f"{name}: {before.get(name, 'nothing')} then, {now.get(name, 'nothing')} now"
        for name in names
        if before.get(name) != now.get(name)
    ]
    for i, (then, new) in enumerate(zip(shares_before, shares_now, strict=False)):
        if then != new:
            what = "transfer" if i % 2 else "schedule"
            differing.append(f"{what} at epoch {i // 2 / SAMPLES:g}: {then:g} then, {new:g} now")
            break
    if differing:
        if len(differing) > MAX_NAMED:
            differing = [*differing[:MAX_NAMED], f"and {len(differing) - MAX_NAMED} more"]
        fix = "Resume with the settings of the first call, or choose another output_dir."
        raise EnsembleKDError("resume", "the run that wrote the checkpoint", "; ".join(differing), fix)


def _whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EnsembleKDError("fit", f"{name}, a whole number >= {least}", repr(value), "Pass such a number.")


def _number(name: str, value: object, *, above_zero: bool = False, most: float = 1e300) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 <= value <= most or (above_zero and value == 0):  # type: ignore[operator]
        sign = ">" if above_zero else ">="
        raise EnsembleKDError("fit", f"{name}, a finite number {sign} 0", repr(value), "Pass such a number.")
