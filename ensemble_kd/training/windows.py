"""The windows that a run trains on: their length, and the order of each epoch."""

from __future__ import annotations

from torch import Tensor

from ensemble_kd.data import AnySequences, BatchPlan, BlockPlan, MappedWindows, Prefixes, SequenceData
from ensemble_kd.distributed import Place
from ensemble_kd.ensemble import EnsembleKD, check_catalogue
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.training.settings import Settings

LONGEST = 200  # inputs of a window if neither a length is given nor the encoder has one
ITEMS, FEWEST_WINDOWS, MOST_WINDOWS = 1600, 8, 64  # of a batch if no size is given
MOST_ENTRIES = 1 << 27  # of windows in memory that end at every item: 1 GiB


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
        self.model, self.data = model, data
        entries = data.num_interactions * self.length if isinstance(data, SequenceData) else 0
        self.prefixes = "none" if settings.window_step is not None else usual_prefixes(model, entries)
        self.windows = self._of(0)
        self.at_least = max(2, place.data_size)  # rows of a batch, so that every process has one
        if len(self.windows) < self.at_least:
            fix = "Use more data, or a longer history per user."
            raise EnsembleKDError("fit", f"at least {self.at_least} training windows", len(self.windows), fix)
        self.batch_size = settings.batch_size or max(usual_batch(model, self.windows), place.data_size)
        if self.batch_size < place.data_size:
            fix = "Every process needs a row: use a larger batch, or fewer processes."
            raise EnsembleKDError("fit", f"batch_size >= {place.data_size}", self.batch_size, fix)

    def plan(self, epoch: int) -> BatchPlan | BlockPlan:
        """Return the batches of an epoch, of this process's rows. It depends on the seed and the epoch alone."""
        s, part = self.settings, (self.place.data_rank, self.place.data_size)
        if s.window_step is None and epoch != self.epoch:
            self.windows = self._of(epoch)
        if not isinstance(self.windows, Tensor):
            return BlockPlan(self.windows, self.batch_size, s.seed, epoch, part=part)
        return BatchPlan(self.windows, self.batch_size, s.seed, epoch, at_least=self.at_least, part=part)

    def _of(self, epoch: int) -> Tensor | MappedWindows:
        """Return the windows of an epoch; with a ``window_step`` they are those of every epoch."""
        self.epoch, s = epoch, self.settings
        least = self.model.objective.min_items
        found = self.data.train_windows(self.length, s.window_step, least, (s.seed, epoch), self.prefixes)
        return found.to(self.model.device) if isinstance(found, Tensor) else found


def usual_prefixes(model: EnsembleKD, entries: int) -> Prefixes:
    """Return which windows' ends a model has to see besides those of its users' histories.

    A network that returns one state has one target per window, so that each item ends one, unless that takes too much
    memory. Where masks are filled, the end of a window alone is predicted without reading ahead. There, and where
    memory is short, each epoch draws a second end for a window.

    Args:
        model: that is trained.
        entries: ids that all windows would have in memory, if one ended at every item.
    """
    if model.newest_only and entries <= MOST_ENTRIES:
        return "all"
    return "one" if model.newest_only or model.objective.query_columns else "none"


def usual_batch(model: EnsembleKD, windows: Tensor | MappedWindows) -> int:
    """Return the number of windows of a batch that have enough targets together.

    Where every item is a target, those that have about 1,600 items, from 8 to 64: the best runs that are known had 14
    windows of some 107 items on ML-1M, and 64 of some 7 on Beauty (benchmarks/paper/recipes.py). Where some items are,
    behind masks, four times as many: BERT4Rec on Beauty was better with 256 windows than with 64. Where one is, 256.

    Args:
        model: that is trained.
        windows: of an epoch.

    Examples:
        >>> from ensemble_kd.encoders import BERT4Rec, SASRec
        >>> causal = EnsembleKD(lambda: SASRec(9, d_model=4, max_len=100), 1, losses=0)
        >>> usual_batch(causal, torch.ones(5, 100)), usual_batch(causal, torch.ones(5, 4))
        (16, 64)
        >>> masked = EnsembleKD(lambda: BERT4Rec(9, d_model=4, max_len=100), 1, losses=0)
        >>> usual_batch(masked, torch.ones(5, 100)), usual_batch(masked, torch.ones(5, 4))
        (64, 256)
    """
    if model.newest_only:
        return 4 * MOST_WINDOWS
    if isinstance(windows, Tensor):
        items = float((windows != 0).sum()) / max(1, len(windows))
    else:
        items = sum(int(windows.spans(block)[1].sum()) for block in range(len(windows.counts))) / max(1, len(windows))
    share = 4 if model.objective.query_columns else 1
    return min(share * MOST_WINDOWS, max(FEWEST_WINDOWS, round(share * ITEMS / max(items, 1.0))))


def _length(model: EnsembleKD, window: int | None) -> int:
    """Return the window's length: what the encoder reads, and the items after it that are targets only."""
    more = model.objective.min_items - 1
    if window is None:
        return (model.max_len or LONGEST) + more
    if model.max_len is not None and window > model.max_len + more:
        fix = "Use a shorter window, or an encoder with a larger max_len."
        raise EnsembleKDError("fit", f"window <= {model.max_len + more}, which the encoder can read", window, fix)
    return window
