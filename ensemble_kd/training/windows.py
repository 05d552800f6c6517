"""The windows that a run trains on: their length, and the order of each epoch."""

from __future__ import annotations

from torch import Tensor

from ensemble_kd.data import AnySequences, BatchPlan, BlockPlan
from ensemble_kd.distributed import Place
from ensemble_kd.ensemble import EnsembleKD, check_catalogue
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.training.settings import Settings

LONGEST = 50  # inputs of a window if no length is given


class Windows:
    """Training windows of a data set, for one run in all its processes.

    Args:
        model: the model to be trained.
        data: the sequences.
        settings: of the run.
        place: of this process among those of the run.

    Raises:
        EnsembleKDError: data of other items, too few windows, or a window or a batch that cannot be used.
    """

    def __init__(self, model: EnsembleKD, data: AnySequences, settings: Settings, place: Place) -> None:
        check_catalogue("fit", model, data)
        self.settings, self.place = settings, place
        self.length = _length(model, settings.window)
        found = data.train_windows(self.length, settings.window_step, min_len=model.objective.min_items)
        self.windows = found.to(model.device) if isinstance(found, Tensor) else found
        self.at_least = max(2, place.data_size)  # rows of a batch, so that every process has one
        if len(self.windows) < self.at_least:
            fix = "Use more data, or a longer history per user."
            raise EnsembleKDError("fit", f"at least {self.at_least} training windows", len(self.windows), fix)
        if settings.batch_size < place.data_size:
            fix = "Every process needs a row: use a larger batch, or fewer processes."
            raise EnsembleKDError("fit", f"batch_size >= {place.data_size}", settings.batch_size, fix)

    def plan(self, epoch: int) -> BatchPlan | BlockPlan:
        """Return the batches of an epoch, of this process's rows. It depends on the seed and the epoch alone."""
        s, part = self.settings, (self.place.data_rank, self.place.data_size)
        if not isinstance(self.windows, Tensor):
            return BlockPlan(self.windows, s.batch_size, s.seed, epoch, part=part)
        return BatchPlan(self.windows, s.batch_size, s.seed, epoch, at_least=self.at_least, part=part)


def _length(model: EnsembleKD, window: int | None) -> int:
    """Return the window's length: what the encoder reads, and the items after it that are targets only."""
    more = model.objective.min_items - 1
    if window is None:
        return min(model.max_len or LONGEST, LONGEST) + more
    if model.max_len is not None and window > model.max_len + more:
        fix = "Use a shorter window, or an encoder with a larger max_len."
        raise EnsembleKDError("fit", f"window <= {model.max_len + more}, which the encoder can read", window, fix)
    return window
