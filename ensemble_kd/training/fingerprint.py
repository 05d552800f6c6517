"""Settings and data that must be the same for a run to go on: compared when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ensemble_kd.data import AnySequences
from ensemble_kd.distributed import Place
from ensemble_kd.ensemble import EnsembleKD, fingerprint, without_addresses
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.training.schedules import WarmupStableAverage
from ensemble_kd.training.settings import SAMPLES, Settings

MAX_NAMED = 5  # differences that an error lists
COMPARED = ("lr", "weight_decay", "max_grad_norm", "batch_size", "seed", "window_step", "exclude")


def run_fingerprint(
    settings: Settings, model: EnsembleKD, data: AnySequences, window: int, precision: str, place: Place
) -> dict[str, str]:
    """Return by name what must be the same for a run to go on; schedules are compared by their ``shares``."""
    schedule = settings.schedule
    return {
        **{name: repr(getattr(settings, name)) for name in COMPARED},
        "window": repr(window),
        "precision": repr(precision),
        "by_length": repr(bool(settings.by_length)),
        "metric": without_addresses(settings.metric),
        "data": f"{data!r} with checksum {data.checksum}",
        "held out": data.held_out,
        **({"power": repr(schedule.power)} if isinstance(schedule, WarmupStableAverage) else {}),
        **({"processes": str(place)} if place.size > 1 else {}),
        **settings.loss.fingerprint(),
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
