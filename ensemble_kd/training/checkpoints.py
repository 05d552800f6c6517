"""Writing last.pt and best.pt of a run, and going on from them, in all of its processes together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ensemble_kd.distributed import (
    Place,
    gather_objects,
    gather_states,
    own_moments,
    own_shards,
    own_states,
)
from ensemble_kd.ensemble import EnsembleKD, MeanTeachers
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import random_state, set_random_state
from ensemble_kd.training.averaging import WeightAverage
from ensemble_kd.training.fingerprint import check_same_run
from ensemble_kd.training.folder import BEST, LAST
from ensemble_kd.training.state import (
    BestState,
    Progress,
    RunState,
    read_state,
    write_state,
)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run; None: nothing is written.
        model: the model that is trained.
        optimizer: of ``parameters``.
        parameters: of the model, those that are trained.
        fingerprint: of the run.
        shares: samples of its schedules.
        place: of this process.
        average: of the weights; None: they are not averaged.
        teachers: the averages that teach; None: there are none.
    """

    def __init__(
        self,
        folder: Path | None,
        model: EnsembleKD,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        fingerprint: dict[str, str],
        shares: list[float],
        place: Place,
        average: WeightAverage | None = None,
        teachers: MeanTeachers | None = None,
    ) -> None:
        self.folder, self.model, self.optimizer, self.parameters = folder, model, optimizer, parameters
        self.fingerprint, self.shares, self.place = fingerprint, shares, place
        self.average, self.teachers = average, teachers

    def save(self, progress: Progress) -> None:
        """Write last.pt."""
        if self.folder is None:
            return
        random = gather_objects(random_state(), self.place)
        weights = gather_states(self.model.state_dict(), self.place)
        averages = gather_states(self.average.values if self.average else {}, self.place)
        optimizer = gather_states(self.optimizer.state_dict(), self.place)
        if self.place.is_first:
            assert weights is not None
            assert averages is not None
            assert optimizer is not None
            teachers = self.teachers.state_dict() if self.teachers else {}  # the same in every process
            state = RunState(self.fingerprint, self.shares, weights, optimizer, averages, teachers, random, progress)
            write_state(self.folder / LAST, state)

    def save_best(self, weights: dict[str, Tensor], progress: Progress) -> None:
        """Write best.pt: the weights of this process's members and shares, of the best epoch."""
        if self.folder is None:
            return
        every = gather_states(weights, self.place)
        if every is not None:
            write_state(self.folder / BEST, BestState(every, progress.best.epoch, progress.best.rows))

    def restore(self, *, keep: Collection[str] = ()) -> tuple[Progress, dict[str, Tensor] | None]:
        """Put the model, the optimizer and the random generators where last.pt has them.

        Args:
            keep: settings that the run has from its checkpoint, by their names in the fingerprint.

        Returns:
            The progress of the run, and the weights of its best epoch, if one is done.

        Raises:
            EnsembleKDError: files that are damaged, of another run, or do not fit each other.
        """
        assert self.folder is not None
        path = self.folder / LAST
        state = read_state(RunState, path, device=self.model.device)
        self.fingerprint |= {name: state.fingerprint[name] for name in keep if name in state.fingerprint}
        check_same_run(state.fingerprint, self.fingerprint, state.shares, self.shares)
        best = self._best(state)
        with _fitting(path):
            self.model.load_state_dict(self._own(state.model))
            moments = own_states(state.optimizer, self.place)
            self.optimizer.load_state_dict(own_moments(moments, self.parameters) if self.place.sharded else moments)
            if self.average:
                self.average.load(self._own(state.averages))
            if self.teachers:
                self.teachers.load_state_dict(state.teachers)
            set_random_state(state.random[self.place.rank])
        return state.progress, best

    def _best(self, state: RunState) -> dict[str, Tensor] | None:
        """Return the weights of the best epoch, from last.pt if the run was killed before best.pt was written."""
        assert self.folder is not None
        path, progress = self.folder / BEST, state.progress
        if progress.best.epoch < 0:
            if self.place.is_first:
                path.unlink(missing_ok=True)  # of a run that this one has replaced
            return None
        if (progress.epoch, progress.batch) == (progress.best.epoch + 1, 0):
            weights = self._own({**state.model, **state.averages})
            self.save_best(weights, progress)
            return weights
        found = read_state(BestState, path, device=self.model.device)
        if found.epoch != progress.best.epoch:
            fix = "Put back the best.pt that was written with last.pt, or start anew with overwrite=True."
            raise EnsembleKDError("resume", f"best.pt of epoch {progress.best.epoch}", found.epoch, fix)
        with _fitting(path):
            return self._fitted(self._own(found.model))

    def _fitted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check names and shapes now: a best.pt of another model would else be found at the end of the run."""
        own = self.model.state_dict()
        for name in {**own, **weights}:
            if name not in weights or name not in own or weights[name].shape != own[name].shape:
                raise ValueError(f"{name} is missing, has another shape, or is not in the model")
        return weights

    def _own(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        own = own_states(weights, self.place)
        return own_shards(own, self.model.state_dict()) if self.place.sharded else own


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Explain the errors of states that were read whole but are of another model, optimizer or generator."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, EnsembleKDError):
            raise
        got = f"{path} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        fix = "Use another checkpoint, or start anew with overwrite=True."
        raise EnsembleKDError("resume", "the states of this model, its optimizer and processes", got, fix) from error
