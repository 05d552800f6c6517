"""One training run: its epochs, steps, validations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ensemble_kd.data import AnySequences, BatchPlan
from ensemble_kd.distributed import (
    Place,
    SpreadLoss,
    agree,
    gather_members,
    gather_objects,
)
from ensemble_kd.ensemble import (
    Chosen,
    EnsembleKD,
    MeanTeachers,
    Mutual,
    Step,
    choose_precision,
    learns_from_averages,
)
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import to_device
from ensemble_kd.losses import Loss, scale_transfer, terms_by_name
from ensemble_kd.objectives import MaskedItem, NextItem
from ensemble_kd.training.averaging import UPDATES, WeightAverage
from ensemble_kd.training.checkpoints import Checkpoints
from ensemble_kd.training.fingerprint import run_fingerprint
from ensemble_kd.training.finite import (
    check_terms,
    check_weights,
    warn_if_worse_than_a_guess,
    warn_of_anomaly_detection,
)
from ensemble_kd.training.folder import claimed, forget
from ensemble_kd.training.gradients import clip_members_, member_rows
from ensemble_kd.training.graphs import StepGraphs, check_graphs, set_rate
from ensemble_kd.training.log import RunLog
from ensemble_kd.training.optimizer import RowAdamW
from ensemble_kd.training.schedules import WarmupStableAverage
from ensemble_kd.training.selection import Selection
from ensemble_kd.training.settings import Settings
from ensemble_kd.training.state import (
    Best,
    EpochEntry,
    Means,
    Progress,
    Rows,
)
from ensemble_kd.training.windows import Windows


class Run:
    """One call of ``fit``: its settings, its state, and the steps in between."""

    def __init__(self, model: EnsembleKD, data: AnySequences, settings: Settings, place: Place) -> None:
        self.windows, self.selection = Windows(model, data, settings, place), Selection(model, data, settings, place)
        settings = replace(settings, batch_size=self.windows.batch_size)
        self.teachers: MeanTeachers | None = None
        if isinstance(settings.loss, Mutual) and learns_from_averages(model.losses):
            self.teachers = MeanTeachers(model)
            settings = replace(settings, loss=self.teachers)
        self.model, self.settings, self.device, self.place = model, settings, model.device, place
        model.vocabulary = data.vocabulary if model.vocabulary is None else model.vocabulary
        # Taken before training, which may set losses anew or change what encoders have besides their parameters.
        self.precision = choose_precision("fit", self.settings.precision, self.device, place=self.place)
        own = run_fingerprint(settings, model, data, self.windows.length, self.precision.name, place)
        every = gather_objects(own, place)
        fingerprint = {name: value for each in every for name, value in each.items()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            fix = "Leave requires_grad of some parameters at True."
            raise EnsembleKDError("fit", "a model with parameters to train", "frozen ones alone", fix)
        self.loss = SpreadLoss(
            model, place, tables=model.sparse_tables(), constant=["attribute_table", "weights", "temperatures"]
        )
        self.rows = member_rows(model, self.parameters)
        self.optimizer = RowAdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.graphs: StepGraphs | None = None
        if settings.cuda_graphs:
            check_graphs(model, settings.loss, place)
            self.graphs = StepGraphs(self._whole_step, self.device, longest=self.windows.length)
        self.average: WeightAverage | None = None
        if isinstance(settings.schedule, WarmupStableAverage):
            self.average = WeightAverage(model, settings.schedule.power)
        self.folder = Path(settings.output_dir) if settings.output_dir is not None else None
        self.checkpoints = Checkpoints(
            self.folder,
            model,
            self.optimizer,
            self.parameters,
            fingerprint,
            settings.shares(),
            place,
            average=self.average,
            teachers=self.teachers,
        )
        self.log = RunLog(
            self.folder if place.is_first else None, settings.callback, settings.progress and place.is_first
        )
        self.progress = Progress()
        self.best_weights: dict[str, Tensor] | None = None
        self.started = self.saved_at = time.monotonic()

    def train(self) -> None:
        """Train to the end, and leave the weights of the best epoch in the model."""
        s = self.settings
        if self.place.is_first:
            warn_of_anomaly_detection()
        with claimed(self.folder, self.place, resume=s.resume, overwrite=s.overwrite) as resumes:
            if resumes:
                self._resume()
            else:
                self._save()  # first: if this is killed, an older run is either whole or replaced
                self._forget_older_run()
                self.log.open(entries=0, step=0)
            if s.precision == "auto":
                self.log.say(f"precision {self.precision.name}: {self.precision.reason}")
            while self.progress.epoch < s.epochs and not self._out_of_patience():
                self._one_epoch()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)

    def _keep_precision(self) -> None:
        """Go on in the precision of the checkpoint: another machine may have chosen otherwise."""
        kept: Literal["float32", "bfloat16"]
        for kept in ("float32", "bfloat16"):
            here = self.precision
            if self.checkpoints.fingerprint["precision"] == repr(kept) != repr(here.name):
                self.precision = Chosen(kept, f"as the run began; here it would be {here.name} ({here.reason})")

    def _forget_older_run(self) -> None:
        if self.folder is not None and self.place.is_first:
            forget(self.folder, curves=self.settings.overwrite)

    def _resume(self) -> None:
        self.progress, self.best_weights = self.checkpoints.restore(
            keep=["precision"] if self.settings.precision == "auto" else []
        )
        self._keep_precision()
        p = self.progress
        batches = len(self.windows.plan(p.epoch))
        if p.batch > batches:
            fix = "Use another checkpoint, or start anew with overwrite=True."
            raise EnsembleKDError("resume", f"a batch of {batches} in last.pt", p.batch, fix)
        entries = self.log.open(entries=p.entries, step=p.step)
        is_new = agree(entries != p.entries, self.place)
        p.entries, self.started = entries, time.monotonic()
        self.saved_at = self.started
        if is_new:  # a log begun anew: the next resume is to find no more entries than there are
            self._save()

    def _out_of_patience(self) -> bool:
        s, p = self.settings, self.progress
        if not p.epoch:
            return False
        epochs = p.epoch - 1 - p.best.epoch
        settled = (
            isinstance(s.schedule, WarmupStableAverage)
            and epochs >= s.schedule.patience
            and epochs * (p.step - p.batch) >= s.schedule.patience_steps * p.epoch
        )
        return settled or (s.patience is not None and epochs >= s.patience)

    def _one_epoch(self) -> None:
        s, p = self.settings, self.progress
        plan = self.windows.plan(p.epoch)
        self.log.start_bar(len(plan), p.batch, f"epoch {p.epoch + 1}/{s.epochs}")
        self.started, first = time.monotonic(), p.batch
        self.model.train()
        for batch in plan.batches(start=p.batch):
            now = p.epoch + p.batch / len(plan)
            rate = s.lr * float(s.schedule(now, s.epochs))
            set_rate(self.optimizer, rate, self.device if self.graphs else None)
            share = 1.0 if s.transfer is None else float(s.transfer(now, s.epochs))
            if self.graphs:
                p.recent.add(self._as_graph(self.graphs, to_device(batch, self.device), share))
            else:
                lengths = None
                if self.device.type != "cpu":  # a CPU sees them itself
                    lengths = plan.lengths(p.batch) if isinstance(plan, BatchPlan) else (batch != 0).sum(dim=1).tolist()
                self._one_step(to_device(batch, self.device), share, lengths)
            p.batch += 1
            p.step += 1
            if self.teachers:
                self.teachers.update(step=p.step)
            if self.average and (p.batch % max(1, len(plan) // UPDATES) == 0 or p.batch == len(plan)):
                self.average.update(p.step, since=p.averaged)
                p.averaged = p.step
            self.log.advance()
            if p.step % s.log_every == 0:
                means = self._take_means()
                seconds = (time.monotonic() - self.started) / (p.batch - first)
                entry = {"kind": "step", "step": p.step, "epoch": p.epoch, "lr": rate, "step_s": seconds}
                self._write({**entry, **means})
                self.log.show(means)
            is_due = time.monotonic() - self.saved_at >= s.checkpoint_every_s
            if self.folder is not None and agree(is_due, self.place):
                self._save()
        self.log.stop_bar()
        self._take_means()
        check_weights(self.model.state_dict(), p.step)
        p.train_s += time.monotonic() - self.started
        self.started = time.monotonic()
        with self.average.in_model() if self.average else nullcontext():
            rows, score = self.selection.validate(p.epoch, self.precision)
            better = p.best.epoch < 0 or score > p.best.score
            if better:
                p.best = Best(p.epoch, rows, score)
                self.best_weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        self._finish_epoch(rows, score, time.monotonic() - self.started, better=better)

    def _loss(self, batch: Tensor, share: float | Tensor, lengths: list[int] | None, by_length: bool) -> Step:
        with self.precision.autocast(self.device):
            found: Step = self.loss(
                batch,
                validate=False,
                by_length=by_length,
                place=self.place,
                item_loss=self.settings.loss,
                share=share,
                lengths=lengths,
            )
        return found

    def _as_graph(self, graphs: StepGraphs, batch: Tensor, share: float) -> dict[str, Tensor]:
        """Run a step as a graph, which follows the share; but a term of weight 0 is not computed."""
        losses = self.model.losses
        if isinstance(losses, Loss):
            terms_by_name(scale_transfer(losses, share))  # a tensor's value is not checked within the step
        return graphs(batch, share == 0, repr(losses), numbers=(share,))

    def _whole_step(self, batch: Tensor, share: Tensor, is_zero: bool, _: object) -> dict[str, Tensor]:
        """Run a step of which a graph can be captured: in shapes that follow from the batch's alone."""
        loss = self._loss(batch, 0.0 if is_zero else share, None, by_length=False)
        self._update(loss.total)
        return loss.terms

    def _one_step(self, batch: Tensor, share: float, lengths: list[int] | None) -> None:
        loss = self._loss(batch, share, lengths, by_length=self.settings.by_length)
        self.progress.recent.add(loss.terms)
        if self.device.type == "cpu":  # elsewhere asking would make the device wait; there it is asked when logging
            check_terms(loss.terms, f"step {self.progress.step + 1}")
        self._update(loss.total)

    def _update(self, total: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.loss.finish()
        if self.settings.max_grad_norm is not None:
            norms = clip_members_(self.parameters, self.settings.max_grad_norm, self.rows)
            if self.device.type == "cpu":
                norms = gather_members(norms, self.place)
                named = {f"gradient of member {i}": norm for i, norm in enumerate(norms)}
                check_terms(named, f"step {self.progress.step + 1}")
        self.optimizer.step()

    def _take_means(self) -> dict[str, float]:
        """Return the means since the last entry, and count them in the epoch's."""
        p = self.progress
        self._check_recent()
        means = p.recent.values()
        p.earlier.add(p.recent.sums, p.recent.steps)
        p.recent = Means()
        return means

    def _check_recent(self) -> None:
        p = self.progress
        check_terms(p.recent.sums, f"step {p.step} or up to {p.recent.steps - 1} before")

    def _write(self, entry: Mapping[str, Any]) -> None:
        self.progress.entries += 1
        self.log.write(entry)

    def _finish_epoch(self, rows: Rows, score: float, valid_s: float, *, better: bool) -> None:
        p = self.progress
        entry: EpochEntry = {
            "kind": "epoch",
            "epoch": p.epoch,
            "step": p.step,
            "train_s": p.train_s,
            "valid_s": valid_s,
            "train": p.earlier.values(),
            "valid": rows,
            "precision": self.precision.name,
        }
        p.history.append(entry)
        p.epoch, p.batch, p.train_s, p.earlier = p.epoch + 1, 0, 0.0, Means()
        self._write(entry)
        self.log.say(f"epoch {p.epoch}: {self.selection.summary(rows, score)}, {entry['train_s']:.1f} s")
        self._save()
        # After last.pt, which has the same weights, or their averages: a run killed between the two finds them there.
        if better and self.best_weights is not None:
            self.checkpoints.save_best(self.best_weights, p)
        objective = self.model.objective
        if entry["epoch"] == 0 and self.place.is_first and isinstance(objective, MaskedItem | NextItem):
            # Last, since a warning may be an error: then the epoch is saved.
            loss = entry["train"][objective.name] / (len(self.model) * objective.views)
            warn_if_worse_than_a_guess(loss, self.model.num_items)

    def _save(self) -> None:
        if self.folder is None:
            return
        self._check_recent()
        check_weights(self.model.state_dict(), self.progress.step)
        self.log.sync()  # no checkpoint counts an entry that may be lost
        elapsed = time.monotonic() - self.started if self.progress.batch else 0.0
        self.checkpoints.save(replace(self.progress, train_s=self.progress.train_s + elapsed))
        self.saved_at = time.monotonic()
