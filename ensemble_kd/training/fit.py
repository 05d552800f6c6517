"""``fit``: train an ``EnsembleKD`` on sequences, keep the best epoch, survive being killed.

A training loop of your own needs only ``model.loss(item_ids).total``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike

from ensemble_kd.data import AnySequences
from ensemble_kd.distributed import Place
from ensemble_kd.ensemble import EnsembleKD, ItemLoss, Mutual, Precision, check_model_and_data
from ensemble_kd.evaluation import Exclude
from ensemble_kd.internal import member_seed, seeded
from ensemble_kd.training.run import Run
from ensemble_kd.training.schedules import Schedule, WarmupStableAverage
from ensemble_kd.training.settings import Callback, Metric, Settings, at_most
from ensemble_kd.training.state import EpochEntry


@dataclass
class FitResult:
    """The outcome of a run, whose model has the weights of the best epoch."""

    best_epoch: int
    best: Mapping[str, Mapping[str, float]]  # validation metrics of that epoch, by scorer
    history: list[EpochEntry] = field(default_factory=list)  # one entry per epoch
    precision: str = "float32"  # or "bfloat16"


def fit(
    model: EnsembleKD,
    data: AnySequences,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    schedule: Schedule = WarmupStableAverage(),
    transfer: Schedule | None = None,
    loss: ItemLoss = Mutual(),
    max_grad_norm: float | None = 5.0,
    window: int | None = None,
    window_step: int | None = None,
    by_length: bool = True,
    precision: Precision = "auto",
    cuda_graphs: bool = False,
    exclude: Exclude = "history",
    metric: Metric = "NDCG@10",
    patience: int | None = None,
    output_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every_s: float = 120.0,
    log_every: int = 50,
    callback: Callback | None = None,
    progress: bool = True,
    seed: int = 0,
) -> FitResult:
    """Train with Adam, validate after every epoch, and leave the weights of the best epoch in the model.

    A trained model goes on from its weights: ``presets.WARM_FIT`` has a rate for that. Data that holds nothing out, as
    for a model in production, is not validated, and the weights of the last epoch stay.

    With sampled ``negatives`` a step moves only those rows of item tables that it touches, see ``RowAdamW``.

    Nothing has to be known of the data: the rate stays, the weights' average over the steps is validated, and the run
    ends when that has stopped improving. The batch follows from the histories' lengths. ``presets.recipe`` has an
    encoder's width and dropout for the data; the paper's settings: ``presets.PAPER_FIT``.

    If ``torch.distributed`` is initialised, every process calls ``fit`` with the same arguments and trains on its rows
    of each batch. Gradients are those of one process on the whole batch, except where rows depend on each other
    (BatchNorm). Each process draws its own masks and dropout. The first one writes, into a folder that all can read.

    Args:
        model: on the device where it is to be trained.
        data: sequences with as many items as the model; ``MappedSequences`` stay on disk, see ``BlockPlan``.
        epochs: passes over the windows; an upper bound with ``schedule=WarmupStableAverage()``. None: until validation
            settles, 100 at most. Another schedule, or data that holds nothing out, needs a number.
        batch_size: windows per step, of all processes together. None: as many as have about 1,600 items, from 8 to 64;
            more where few of these are targets, see ``window_step``.
        lr: Adam's learning rate at ``schedule`` = 1.
        weight_decay: decoupled (AdamW); 0 is plain Adam.
        schedule: share of ``lr`` over the run. With the default it stays, and the model is left with an average of its
            weights; it is validated and kept in their place. With ``Cosine()`` the rate falls all the way, and nothing
            is averaged; the paper's is ``StepDecay()``.
        transfer: share of the weights of all terms but AP over the run, such as ``Ramp(0.25, 0.5)`` or ``Hump()``.
            Terms of weight 0 are not computed. None: all of the weights from the start.
        loss: how wrong item predictions are, and from whom the members learn: ``Mutual()``, from each other;
            ``FromTeacher(ensemble)``, from another ensemble; or an ``ItemLoss`` of your own.
        max_grad_norm: clip each member's gradient to this norm; None: do not.
        window: length of the training windows; None: the longest that the model can train on, or 200 inputs for an
            encoder that reads any number.
        window_step: distance between a user's windows. None: histories longer than a window are cut at places that each
            epoch draws anew, so that an epoch predicts every item once. With masked items each window comes a second
            time without some of its newest items, drawn anew, since all but its end is predicted from both sides. For
            an encoder that returns (b, d), which has one target per window, a window ends at every item; if that took
            more than 1 GiB, at two places of each window, of which one is drawn. ``MappedSequences`` take no memory.
        by_length: encode a batch's rows of similar length together (faster, the same loss), see
            ``EnsembleKD.loss``.
        precision: "bfloat16" trains under autocast; weights, optimizer and losses stay float32. "auto": bfloat16 on a
            CUDA device that computes it natively, else float32: bfloat16 costs about one per cent of accuracy, and is
            often slower on a CPU. Each epoch's entry names which, and a resumed run keeps it. Name one for the same
            numbers on every machine.
        cuda_graphs: run steps as CUDA graphs: one call of the host in place of hundreds of launches. Each shape of
            batches is captured once, in widths that are multiples of 8, whatever ``schedule`` and ``transfer`` do
            (without the terms that a share of 0 leaves out, it is another step); and padding is computed, since a
            graph's shapes cannot follow the lengths. So it suits windows that are mostly full. Simulated only: no GPU
            has run it yet. It needs the full softmax, ``loss=Mutual()`` and a single process.
        exclude: items that validation does not rank, see ``evaluate``.
        metric: of the ensemble, by which the best epoch is chosen: "HR@K", "NDCG@K", "MRR"; or a function of the model,
            in evaluation mode, and the data, which returns a number that is higher for better models. Its name stands
            in the metrics of the epoch.
        patience: stop after so many epochs without a better validation; None: never.
        output_dir: receives best.pt, last.pt, log.jsonl, and TensorBoard events if it is installed. One run at a time
            may write there. None: nothing is written.
        resume: go on from ``output_dir``/last.pt, or start if the folder has no run. On the same CPU with as many
            threads, the end is bit for bit that of a run never stopped. On an accelerator it is but for rounding:
            kernels add in no fixed order there, and ``backend="auto"`` measures anew.
        overwrite: replace the run in ``output_dir``. Without it and ``resume``, a folder with a run is refused.
        checkpoint_every_s: seconds between writes of last.pt within an epoch. It is also written after every epoch.
        log_every: steps between log entries.
        callback: receives each log entry, ``{"kind": "step" | "epoch", ...}``. Losses in it are means over the steps
            since the last entry (of a step), or over the epoch (``entry["train"]``). Every process calls its own.
        progress: show a bar with losses and speed (needs tqdm, the extra ``train``).
        seed: of the order, masks and dropout. The global random state is left as it was.

    Returns:
        The best epoch (from 0), its validation metrics, and an entry per epoch.

    Raises:
        EnsembleKDError: a setting that cannot be used; data that does not fit the model; a folder with another run, or
            one that cannot be written; a damaged checkpoint, or one of other settings; a loss that is not finite (with
            the step and the term; checkpoints keep the last good state).

    Examples:
        >>> from ensemble_kd.data import synthetic
        >>> from ensemble_kd.encoders import SASRec
        >>> data = synthetic(num_users=40, num_items=100)
        >>> model = EnsembleKD(lambda: SASRec(100, d_model=4, max_len=10), n=2)
        >>> result = fit(model, data, epochs=1, progress=False)
        >>> result.best_epoch, list(result.best)
        (0, ['member 0', 'member 1', 'ensemble'])
    """
    given = locals()
    check_model_and_data("fit", model, data)
    given["epochs"] = at_most(epochs, schedule, transfer, data)
    settings = Settings(**{name: value for name, value in given.items() if name not in ("model", "data")})
    # If there are several processes, the rows of a batch are spread over all of them.
    place = model.place if model.place.size > 1 else Place.world()
    run, training = Run(model, data, settings, place), model.training
    try:
        with seeded(settings.seed if place.is_first else member_seed(settings.seed, place.rank, stream=3)):
            run.train()
    finally:
        run.log.close()
        model.train(training)
    return FitResult(run.progress.best.epoch, run.progress.best.rows, run.progress.history, run.precision.name)
