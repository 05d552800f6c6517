"""``fit``: train an ``EnsembleKD`` on sequences, keep the best epoch, survive being killed.

Those with a training loop of their own need only ``model.loss(item_ids).total``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ensemble_kd import checkpoints
from ensemble_kd.data.batching import BatchPlan
from ensemble_kd.data.sequences import SequenceData
from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.evaluation import Evaluation, Exclude, Precision, autocast, evaluate
from ensemble_kd.objectives import NextItem
from ensemble_kd.stacking import seeded

METRIC = "NDCG@10"


class Schedule(Protocol):
    """The learning rate as a share of the first one; without state, so that a run resumes exactly."""

    def __call__(self, epoch: float, epochs: int) -> float:
        """Share at ``epoch`` (fractional) of ``epochs``."""
        ...


@dataclass(frozen=True)
class StepDecay:
    """Multiply by ``factor`` after every ``every`` epochs; every=100 is the paper's (Sec. 4.1.4, factor not given).

    Examples:
        >>> StepDecay()(99.5, 250), StepDecay()(100.0, 250)
        (1.0, 0.1)
    """

    every: int = 100
    factor: float = 0.1

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        return float(self.factor ** (epoch // self.every))


@dataclass(frozen=True)
class Cosine:
    """Rise linearly over ``warmup`` epochs, then fall along a cosine to ``floor`` at the end.

    Examples:
        >>> [Cosine(warmup=1)(epoch, 11) for epoch in (0.5, 1.0, 6.0, 11.0)]
        [0.5, 1.0, 0.505, 0.01]
    """

    warmup: float = 0.0
    floor: float = 0.01

    def __call__(self, epoch: float, epochs: int) -> float:  # noqa: D102
        if epoch < self.warmup:
            return epoch / self.warmup
        done = (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)
        return round(self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))), 12)


@dataclass
class FitResult:
    """What a run came to; ``model`` holds the weights of the best epoch."""

    best_epoch: int
    best: Mapping[str, Mapping[str, float]]  # validation metrics of that epoch, by scorer
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry an epoch


@torch.no_grad()
def clip_members_(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale each member's gradient to a norm of at most ``max_norm``, in place; returns the norms before, (n,).

    A norm over all members would couple them: one member's spike would slow the others.

    Examples:
        >>> p = torch.zeros(2, 3, requires_grad=True)
        >>> p.grad = torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]])
        >>> clip_members_([p], 1.0), p.grad.norm(dim=1)
        (tensor([5.0000, 0.5000]), tensor([1.0000, 0.5000]))
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1).float() for g in grads]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(squares), dim=0)
    scale = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    if norms.device.type == "cpu" and bool((scale == 1).all()):
        return norms
    for grad in grads:
        grad.mul_(scale.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1)))
    return norms


def fit(
    model: EnsembleKD,
    data: SequenceData,
    *,
    epochs: int = 30,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Schedule | None = None,
    max_grad_norm: float | None = 5.0,
    window: int | None = None,
    window_step: int = 1,
    bucket: bool = True,
    precision: Precision = "float32",
    exclude: Exclude = "history",
    patience: int | None = None,
    output_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every_s: float = 120.0,
    log_every: int = 50,
    callback: Callable[[Mapping[str, Any]], None] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> FitResult:
    """Train with Adam, validate after every epoch, and leave the weights of the best epoch (NDCG@10) in the model.

    Args:
        model: on the device where it is to be trained.
        data: sequences with as many items as the model.
        epochs: passes over the windows.
        batch_size: windows in a step.
        lr: Adam's learning rate at ``schedule`` = 1.
        weight_decay: decoupled (AdamW); 0 is plain Adam.
        schedule: default ``StepDecay()``, the paper's.
        max_grad_norm: clip each member's gradient norm; None: do not.
        window: length of the training windows; default: the longest input that the model reads, at most 50.
        window_step: distance between a user's windows.
        bucket: batches of similar length (faster); False: batches at random.
        precision: "bfloat16" trains under autocast; weights, optimizer and losses stay float32.
        exclude: items that validation does not rank, see ``evaluate``.
        patience: stop after so many epochs without a better validation; None: never.
        output_dir: receives best.pt, last.pt, log.jsonl, and TensorBoard events where it is installed; None: nothing.
        resume: go on exactly where ``output_dir``/last.pt stopped, if it is there.
        checkpoint_every_s: seconds between writes of last.pt within an epoch; it is written after every epoch, too.
        log_every: steps between log entries.
        callback: is given each log entry, ``{"kind": "step" | "epoch", ...}``.
        progress: show a bar with losses and speed (needs tqdm, the extra ``train``).
        seed: of the order, masks and dropout. The global random state is left as it was.

    Raises:
        EnsembleKDError: data that does not fit the model, a checkpoint of another run, a loss that is not finite (with
            the step and the term; checkpoints keep the last good state).
    """
    run = _Run(model, data, locals())
    with seeded(seed):
        return run.train()


class _Run:
    """One call of ``fit``: its settings, its state, and the steps in between."""

    def __init__(self, model: EnsembleKD, data: SequenceData, settings: dict[str, Any]) -> None:
        self.model, self.data, self.o = model, data, settings
        self._check()
        self.schedule: Schedule = settings["schedule"] or StepDecay()
        self.device = model.device
        window = settings["window"] or min(model.max_len or 50, 50)
        shortest = 2 if isinstance(model.objective, NextItem) else 1
        self.windows = data.train_windows(window, settings["window_step"], min_len=shortest).to(self.device)
        if len(self.windows) < 2:
            fix = "Use more data, or a longer history a user."
            raise EnsembleKDError("fit", "at least 2 training windows", f"{len(self.windows)}", fix)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings["lr"], weight_decay=settings["weight_decay"], fused=True
        )
        self.folder = Path(settings["output_dir"]) if settings["output_dir"] is not None else None
        self.epoch = self.batch = self.step = 0
        self.best_epoch = -1
        self.best_rows: dict[str, dict[str, float]] = {}
        self.best_state: dict[str, Tensor] | None = None
        self.history: list[dict[str, Any]] = []
        self.sums: dict[str, Tensor] = {}
        self.writer: Any = None

    def _check(self) -> None:
        o = self.o
        if self.data.num_items != self.model.num_items:
            fix = "Build the model with num_items=data.num_items."
            raise EnsembleKDError(
                "fit", f"data of {self.model.num_items} items, as the model", str(self.data.num_items), fix
            )
        for name in ("epochs", "batch_size", "window_step", "log_every"):
            if not isinstance(o[name], int) or o[name] < 1:
                raise EnsembleKDError("fit", f"{name}, a whole number >= 1", repr(o[name]), "Pass such a number.")
        for name, least in (("lr", 0.0), ("weight_decay", 0.0), ("max_grad_norm", 0.0)):
            if o[name] is not None and not (math.isfinite(o[name]) and o[name] >= least):
                raise EnsembleKDError("fit", f"{name}, a finite number >= 0", repr(o[name]), "Pass such a number.")
        if o["window"] is not None and self.model.max_len is not None and o["window"] > self.model.max_len:
            fix = "Use a shorter window, or an encoder with a larger max_len."
            raise EnsembleKDError(
                "fit", f"window <= {self.model.max_len}, which the encoder reads", str(o["window"]), fix
            )
        if o["resume"] and o["output_dir"] is None:
            raise EnsembleKDError("fit", "output_dir with resume=True", "None", "Say where the checkpoint is.")

    @property
    def fingerprint(self) -> dict[str, str]:
        """What must be the same for a run to go on exactly; ``epochs`` may grow under a schedule that allows it."""
        free = {"model", "data", "output_dir", "resume", "checkpoint_every_s", "log_every", "callback", "progress"}
        free |= {"patience", "epochs"} if isinstance(self.schedule, StepDecay) else {"patience"}
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        return {
            **{name: repr(value) for name, value in sorted(self.o.items()) if name not in free},
            "objective": repr(self.model.objective),
            "losses": repr(self.model.losses),
            "parameters": repr(shapes),
            "data": repr(self.data),
        }

    def train(self) -> FitResult:
        o = self.o
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if o["resume"] and (self.folder / "last.pt").exists():
                self._resume()
            else:
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.folder))
        self.saved_at = time.monotonic()
        while self.epoch < o["epochs"] and not self._out_of_patience():
            self._one_epoch()
        if self.best_state is not None:
            self.model.load_state_dict(self.best_state)
        if self.writer is not None:
            self.writer.close()
        return FitResult(self.best_epoch, self.best_rows, self.history)

    def _out_of_patience(self) -> bool:
        return self.o["patience"] is not None and self.epoch - 1 - self.best_epoch >= self.o["patience"]

    def _one_epoch(self) -> None:
        o = self.o
        plan = BatchPlan(self.windows, o["batch_size"], o["seed"], self.epoch, bucket=o["bucket"])
        bar = _bar(len(plan), self.batch, f"epoch {self.epoch + 1}/{o['epochs']}") if o["progress"] else None
        started, first = time.monotonic(), self.batch
        self.model.train()
        for batch in plan.batches(start=self.batch):
            rate = o["lr"] * self.schedule(self.epoch + self.batch / len(plan), o["epochs"])
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._one_step(batch)
            self.batch += 1
            self.step += 1
            if bar is not None:
                bar.update()
            if self.step % o["log_every"] == 0:
                seconds = (time.monotonic() - started) / (self.batch - first)
                entry = {"kind": "step", "step": self.step, "epoch": self.epoch, "lr": rate, "step_s": seconds}
                means = self._mean_terms()
                self._log({**entry, **means})
                if bar is not None:
                    bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()})
            if self.folder is not None and time.monotonic() - self.saved_at >= o["checkpoint_every_s"]:
                self._save()
        if bar is not None:
            bar.close()
        self._mean_terms()
        train_s = time.monotonic() - started
        found = evaluate(self.model, self.data, "valid", exclude=o["exclude"], precision=o["precision"])
        self._finish_epoch(found, train_s, time.monotonic() - started - train_s)

    def _one_step(self, batch: Tensor) -> None:
        with autocast(self.device, self.o["precision"]):
            loss = self.model.loss(batch, validate=False)
        for name, value in loss.terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        if self.device.type == "cpu":  # elsewhere asking would make the device wait; there it is asked when logging
            self._check_finite(loss.terms)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        if self.o["max_grad_norm"] is not None:
            clip_members_(self.parameters, self.o["max_grad_norm"])
        self.optimizer.step()

    def _check_finite(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            if not bool(torch.isfinite(value)):
                fix = "Lower lr, raise the temperature or set max_grad_norm; the last good checkpoint was kept."
                where = f"fit: step {self.step}, term {name!r}"
                raise EnsembleKDError(where, "a finite loss", str(float(value)), fix)

    def _mean_terms(self) -> dict[str, float]:
        self._check_finite(self.sums)
        steps = self.step % self.o["log_every"] or self.o["log_every"]
        means = {name: float(value) / steps for name, value in self.sums.items()}
        self.sums = {}
        return means

    def _finish_epoch(self, found: Evaluation, train_s: float, valid_s: float) -> None:
        score = found.rows["ensemble"][METRIC]
        if self.best_epoch < 0 or score > self.best_rows["ensemble"][METRIC]:
            self.best_epoch, self.best_rows = self.epoch, {s: dict(row) for s, row in found.rows.items()}
            self.best_state = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            if self.folder is not None:
                content = {"model": self.best_state, "epoch": self.epoch, "valid": self.best_rows}
                checkpoints.save(self.folder / "best.pt", content)
        entry = {"kind": "epoch", "epoch": self.epoch, "step": self.step, "train_s": train_s, "valid_s": valid_s}
        entry["valid"] = {s: dict(row) for s, row in found.rows.items()}
        self.history.append(entry)
        self.epoch, self.batch = self.epoch + 1, 0
        self._log(entry)
        if self.o["progress"]:
            members = [row[METRIC] for s, row in found.rows.items() if s != "ensemble"]
            mean = sum(members) / len(members)
            print(f"epoch {self.epoch}: valid {METRIC} ensemble {score:.4f}, members' mean {mean:.4f}, {train_s:.1f} s")
        if self.folder is not None:
            self._save()

    def _log(self, entry: dict[str, Any]) -> None:
        if self.folder is not None:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if self.writer is not None:
            for name, value in entry.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{entry['kind']}/{name}", value, self.step)
            for scorer, row in entry.get("valid", {}).items():
                self.writer.add_scalar(f"valid {METRIC}/{scorer}", row[METRIC], self.step)
        if self.o["callback"] is not None:
            self.o["callback"](entry)

    def _save(self) -> None:
        assert self.folder is not None
        self._check_finite(self.sums)
        content = {
            "fingerprint": self.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoints.random_state(),
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "best": {"epoch": self.best_epoch, "rows": self.best_rows},
            "history": self.history,
            "sums": self.sums,
        }
        checkpoints.save(self.folder / "last.pt", content)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        assert self.folder is not None
        path = self.folder / "last.pt"
        saved = checkpoints.load(path, device=self.device)
        if "fingerprint" not in saved:
            raise EnsembleKDError(
                "resume", "a last.pt written by fit", str(path), "Resume from the output_dir of a run."
            )
        ours, theirs = self.fingerprint, saved["fingerprint"]
        differing = [f"{k}: {theirs.get(k)} then, {ours.get(k)} now" for k in ours if ours[k] != theirs.get(k)]
        if differing:
            fix = "Resume with the settings of the first call, or choose another output_dir."
            raise EnsembleKDError("resume", "the run that wrote the checkpoint", "; ".join(differing), fix)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.batch, self.step = (saved["position"][k] for k in ("epoch", "batch", "step"))
        self.best_epoch, self.best_rows = saved["best"]["epoch"], saved["best"]["rows"]
        self.history, self.sums = saved["history"], saved["sums"]
        if self.best_epoch >= 0:
            self.best_state = checkpoints.load(self.folder / "best.pt", device=self.device)["model"]
        _keep_until(self.folder / "log.jsonl", self.step)
        checkpoints.set_random_state(saved["random"])


def _keep_until(log: Path, step: int) -> None:
    """Drop the entries after the checkpoint, which the resumed run writes again; also a last line cut short."""
    kept = []
    for line in log.read_text().splitlines() if log.exists() else ():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    log.write_text("".join(kept))


def _bar(total: int, initial: int, text: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=initial, desc=text, leave=False, mininterval=1.0)
