"""One training run: its epochs, steps, validations and checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ensemble_kd.data import AnySequences
from ensemble_kd.distributed import (
    Place,
    SpreadLoss,
    agree,
    gather_members,
    gather_objects,
    gather_states,
    own_moments,
    own_shards,
    own_states,
)
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import Evaluation, autocast, evaluate
from ensemble_kd.seeding import random_state, set_random_state
from ensemble_kd.training import state as checkpoints
from ensemble_kd.training.fingerprint import check_same_run, run_fingerprint
from ensemble_kd.training.finite import check_terms, check_weights
from ensemble_kd.training.gradients import clip_members_
from ensemble_kd.training.log import Means, RunLog
from ensemble_kd.training.optimizer import RowAdamW
from ensemble_kd.training.settings import Settings
from ensemble_kd.training.windows import Windows

METRIC = "NDCG@10"


class Run:
    """One call of ``fit``: its settings, its state, and the steps in between."""

    def __init__(self, model: EnsembleKD, data: AnySequences, settings: Settings, place: Place) -> None:
        self.model, self.data, self.settings, self.device = model, data, settings, model.device
        self.place = place
        self.windows = Windows(model, data, settings, place)
        # Taken before training, which may set losses anew or change what encoders hold beside their parameters.
        told = gather_objects(run_fingerprint(settings, model, data, self.windows.length, place), place)
        self.fingerprint = {name: value for each in told for name, value in each.items()}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.loss = SpreadLoss(model, place, tables=model.sparse_tables(), constant=["attribute_table"])
        self.optimizer = RowAdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.folder = Path(settings.output_dir) if settings.output_dir is not None else None
        first = self.place.is_first
        self.log = RunLog(self.folder if first else None, settings.callback, settings.progress and first)
        self.epoch = self.batch = self.step = 0
        self.train_s = 0.0  # of this epoch, up to ``started``
        self.started = self.saved_at = time.monotonic()
        self.best_epoch = -1
        self.best_rows: dict[str, dict[str, float]] = {}
        self.best_state: dict[str, Tensor] | None = None
        self.history: list[dict[str, Any]] = []
        self.recent, self.whole = Means(), Means()  # since the last entry, and of the epoch before it

    def train(self) -> None:
        """Train to the end, and leave the weights of the best epoch in the model."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        resume = self.folder is not None and self.settings.resume and (self.folder / "last.pt").exists()
        if agree(resume, self.place):
            self._resume()
        else:
            self.log.open(entries=0, step=0)
            self._save()  # so that an earlier run's checkpoint is not resumed in place of this one
            if self.folder is not None and self.place.is_first:
                (self.folder / "best.pt").unlink(missing_ok=True)
        while self.epoch < self.settings.epochs and not self._out_of_patience():
            self._one_epoch()
        if self.best_state is not None:
            self.model.load_state_dict(self.best_state)

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.epoch - 1 - self.best_epoch >= patience

    def _one_epoch(self) -> None:
        s = self.settings
        plan = self.windows.plan(self.epoch)
        self.log.start_bar(len(plan), self.batch, f"epoch {self.epoch + 1}/{s.epochs}")
        self.started, first = time.monotonic(), self.batch
        self.model.train()
        for batch in plan.batches(start=self.batch):
            rate = s.lr * float(s.schedule(self.epoch + self.batch / len(plan), s.epochs))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            share = 1.0 if s.transfer is None else float(s.transfer(self.epoch + self.batch / len(plan), s.epochs))
            self._one_step(batch.to(self.device), share)
            self.batch += 1
            self.step += 1
            self.log.advance()
            if self.step % s.log_every == 0:
                means = self._take_means()
                seconds = (time.monotonic() - self.started) / (self.batch - first)
                entry = {"kind": "step", "step": self.step, "epoch": self.epoch, "lr": rate, "step_s": seconds}
                self.log.write({**entry, **means})
                self.log.show(means)
            is_due = time.monotonic() - self.saved_at >= s.checkpoint_every_s
            if self.folder is not None and agree(is_due, self.place):
                self._save()
        self.log.stop_bar()
        self._take_means()
        check_weights(self.model.state_dict(), self.step)
        self.train_s += time.monotonic() - self.started
        self.started = time.monotonic()
        found = evaluate(self.model, self.data, "valid", exclude=s.exclude, precision=s.precision, place=self.place)
        self._finish_epoch(found, time.monotonic() - self.started)

    def _one_step(self, batch: Tensor, share: float) -> None:
        with autocast(self.device, self.settings.precision):
            loss = self.loss(
                batch,
                validate=False,
                by_length=self.settings.by_length,
                place=self.place,
                item_loss=self.settings.loss,
                share=share,
            )
        self.recent.add(loss.terms)
        if self.device.type == "cpu":  # elsewhere asking would make the device wait; there it is asked when logging
            check_terms(loss.terms, f"step {self.step + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self.loss.finish()
        if self.settings.max_grad_norm is not None:
            norms = clip_members_(self.parameters, self.settings.max_grad_norm)
            if self.device.type == "cpu":
                norms = gather_members(norms, self.place)
                told = {f"gradient of member {i}": norm for i, norm in enumerate(norms)}
                check_terms(told, f"step {self.step + 1}")
        self.optimizer.step()

    def _take_means(self) -> dict[str, float]:
        """Means since the last entry, which then count in the epoch's."""
        check_terms(self.recent.sums, f"step {self.step} or up to {self.recent.steps - 1} before")
        means = self.recent.values()
        self.whole.add(self.recent.sums, self.recent.steps)
        self.recent = Means()
        return means

    def _finish_epoch(self, found: Evaluation, valid_s: float) -> None:
        rows = {scorer: dict(row) for scorer, row in found.rows.items()}
        score = rows["ensemble"][METRIC]
        better = self.best_epoch < 0 or score > self.best_rows["ensemble"][METRIC]
        if better:
            self.best_epoch, self.best_rows = self.epoch, rows
            self.best_state = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        entry = {"kind": "epoch", "epoch": self.epoch, "step": self.step, "train_s": self.train_s, "valid_s": valid_s}
        entry |= {"train": self.whole.values(), "valid": rows}
        self.history.append(entry)
        members = [row[METRIC] for scorer, row in rows.items() if scorer != "ensemble"]
        mean, seconds = sum(members) / len(members), self.train_s
        self.epoch, self.batch, self.train_s, self.whole = self.epoch + 1, 0, 0.0, Means()
        self.log.write(entry)
        self.log.say(
            f"epoch {self.epoch}: valid {METRIC} ensemble {score:.4f}, members' mean {mean:.4f}, {seconds:.1f} s"
        )
        self._save()
        # After last.pt, which holds the same weights: a run killed between the two finds them there.
        if better:
            self._save_best()

    def _save(self) -> None:
        if self.folder is None:
            return
        check_terms(self.recent.sums, f"step {self.step} or up to {self.recent.steps - 1} before")
        check_weights(self.model.state_dict(), self.step)
        random = gather_objects(random_state(), self.place)
        weights = gather_states(self.model.state_dict(), self.place)
        optimizer = gather_states(self.optimizer.state_dict(), self.place)
        if not self.place.is_first:
            self.saved_at = time.monotonic()
            return
        content = {
            "fingerprint": self.fingerprint,
            "shares": self.settings.shares(),
            "model": weights,
            "optimizer": optimizer,
            "random": random if self.place.size > 1 else random[0],
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step, "entries": self.log.entries},
            "train_s": self.train_s + (time.monotonic() - self.started if self.batch else 0.0),
            "best": {"epoch": self.best_epoch, "rows": self.best_rows},
            "history": self.history,
            "means": [{"sums": m.sums, "steps": m.steps} for m in (self.recent, self.whole)],
        }
        checkpoints.save(self.folder / "last.pt", content)
        self.saved_at = time.monotonic()

    def _save_best(self) -> None:
        weights = None if self.best_state is None else gather_states(self.best_state, self.place)
        if self.folder is not None and self.place.is_first:
            content = {"model": weights, "epoch": self.best_epoch, "valid": self.best_rows}
            checkpoints.save(self.folder / "best.pt", content)

    def _resume(self) -> None:
        assert self.folder is not None
        path = self.folder / "last.pt"
        saved = checkpoints.load(path, device=self.device)
        if "fingerprint" not in saved:
            fix = "Resume from the output_dir of a run."
            raise EnsembleKDError("resume", "a last.pt written by fit", str(path), fix)
        check_same_run(saved["fingerprint"], self.fingerprint, saved["shares"], self.settings.shares())
        position = saved["position"]
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        self.best_epoch, self.best_rows = saved["best"]["epoch"], saved["best"]["rows"]
        self.history, self.train_s = saved["history"], saved["train_s"]
        self.recent, self.whole = (Means(m["sums"], m["steps"]) for m in saved["means"])
        self._find_best(saved["model"])
        self.model.load_state_dict(self._own_weights(saved["model"]))
        moments = own_states(saved["optimizer"], self.place)
        self.optimizer.load_state_dict(own_moments(moments, self.parameters) if self.place.sharded else moments)
        self.log.open(entries=position["entries"], step=self.step)
        random = saved["random"]
        set_random_state(random[self.place.rank] if self.place.size > 1 else random)
        self.saved_at = time.monotonic()

    def _find_best(self, last: dict[str, Tensor]) -> None:
        """The weights of the best epoch: in best.pt, or in last.pt where the run was killed before best.pt was."""
        assert self.folder is not None
        path = self.folder / "best.pt"
        if self.best_epoch < 0:
            if self.place.is_first:
                path.unlink(missing_ok=True)  # of an earlier run
        elif (self.epoch, self.batch) == (self.best_epoch + 1, 0):
            self.best_state = self._own_weights(last)
            self._save_best()
        else:
            kept = checkpoints.load(path, device=self.device)
            if kept.get("epoch") != self.best_epoch or "model" not in kept:
                fix = "Put back the best.pt that was written with last.pt, or start anew."
                raise EnsembleKDError("resume", f"best.pt of epoch {self.best_epoch}", kept.get("epoch"), fix)
            self.best_state = self._own_weights(kept["model"])

    def _own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        own = own_states(state, self.place)
        return own_shards(own, self.model.state_dict()) if self.place.sharded else own
