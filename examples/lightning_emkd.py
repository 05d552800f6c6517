"""EMKD inside a LightningModule: the loss and the metrics are ours, the Trainer does the rest.

Needs ``pip install 'ensemble_kd[lightning]'``. Without arguments it trains on a synthetic catalogue in a few minutes.
On real data::

    python examples/lightning_emkd.py --data Beauty.txt --attributes Beauty_item2attributes.json --window 50
"""

from __future__ import annotations

import time
from argparse import Namespace
from datetime import timedelta

import torch
from common import ensemble, flags, report, sequences
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from ensemble_kd import EnsembleKD, NextItem
from ensemble_kd.data import SequenceData
from ensemble_kd.distributed import Place
from ensemble_kd.encoders import SASRec
from ensemble_kd.ensemble import choose_precision
from ensemble_kd.evaluation import evaluate
from ensemble_kd.losses import scale_transfer
from ensemble_kd.training import Cosine, Ramp, Schedule, StepDecay


class EMKD(LightningModule):
    """An ensemble, how it learns, and how it is judged after every epoch."""

    def __init__(self, model: EnsembleKD, data: SequenceData, args: Namespace) -> None:
        super().__init__()
        self.model, self.data, self.args, self.losses = model, data, args, model.losses

    def training_step(self, item_ids: Tensor, _: int) -> Tensor:
        done = self.global_step / self.trainer.estimated_stepping_batches
        share = Ramp(*self.args.transfer)(done, 1)
        self.model.losses = scale_transfer(self.losses, share)
        step = self.model.loss(item_ids)
        self.log_dict(dict(step.terms), prog_bar=True)
        return step.total

    def on_train_epoch_end(self) -> None:
        rows = evaluate(self.model, self.data, "valid", exclude=self.args.exclude).rows
        self.log("valid_ndcg", rows["ensemble"]["NDCG@10"], prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.args.lr, weight_decay=self.args.weight_decay)
        share: Schedule = Cosine() if self.args.schedule == "cosine" else StepDecay()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: share(epoch, self.args.epochs))
        return {"optimizer": optimizer, "lr_scheduler": schedule}


if __name__ == "__main__":
    parser = flags(__doc__, output="runs/lightning", views=1, batch_size=64, epochs=6, lr=2e-3, dropout=0.3)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=1)
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    data = sequences(args)
    sizes = {"d_model": args.d_model, "num_layers": args.num_layers, "num_heads": args.num_heads}
    model = ensemble(
        args,
        data,
        lambda data: lambda: SASRec(data.num_items, max_len=args.window, dropout=args.dropout, **sizes),
        NextItem(views=args.views),
    )
    windows = data.train_windows(args.window + 1, args.window_step, min_len=2)  # the newest item is a target
    batches = DataLoader(windows, args.batch_size, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    best = ModelCheckpoint(args.output, monitor="valid_ndcg", mode="max", save_on_train_epoch_end=True)
    every = timedelta(seconds=args.checkpoint_every)
    last = ModelCheckpoint(args.output, filename="last", train_time_interval=every, enable_version_counter=False)
    patience = args.patience or args.epochs
    stop = EarlyStopping("valid_ndcg", mode="max", patience=patience, check_on_train_epoch_end=True)
    precision = choose_precision(
        "lightning_emkd",
        args.precision,
        model.encoder,
        model.device,
        num_items=data.num_items,
        classes=(data.num_items, args.d_model),
        place=Place(),
    )
    trainer = Trainer(
        accelerator="gpu" if args.device.startswith("cuda") else "cpu",
        devices=1,
        max_epochs=args.epochs,
        precision="bf16-mixed" if precision.name == "bfloat16" else "32-true",
        logger=CSVLogger(args.output),
        callbacks=[best, last, stop],
        enable_model_summary=False,
    )
    module, started = EMKD(model, data, args), time.monotonic()
    trainer.fit(module, batches, ckpt_path=args.output / "last.ckpt" if args.resume else None)
    minutes = (time.monotonic() - started) / 60
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    report(args, model, data, f"the best of {trainer.current_epoch} epochs", minutes)
