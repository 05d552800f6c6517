"""RePlay's training, as its documentation shows it, with a clock as a Lightning callback."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import shared
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms


def prepare(job: dict[str, Any], histories: Any, items: int) -> tuple[TensorSchema, ParquetModule]:
    """User code: a Parquet file of encoded sequences, items from 0; what is in it; its batches."""
    path = str(Path(job["folder"]) / "train.parquet")
    rows = [[item - 1 for item in history] for history in histories]
    pd.DataFrame({"user_id": range(len(rows)), "item_id": rows}).to_parquet(path)
    settings = job["settings"]
    schema = TensorSchema(
        TensorFeatureInfo(
            "item_id",
            is_seq=True,
            feature_type=FeatureType.CATEGORICAL,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
            embedding_dim=settings["embedding_dim"],
            cardinality=items,
            padding_value=items,
        )
    )
    read = {"user_id": {}, "item_id": {"shape": settings["max_sequence_length"] + 1, "padding": items}}
    transforms = make_default_sasrec_transforms(schema)
    return schema, ParquetModule(settings["batch_size"], {"train": read}, transforms, train_path=path)


def build(job: dict[str, Any], schema: TensorSchema) -> LightningModule:
    """User code: the model and its optimizer."""
    seed_everything(job["seed"], workers=True)
    names = ("embedding_dim", "num_heads", "num_blocks", "max_sequence_length", "dropout")
    model = SasRec.from_params(schema, **{name: job["settings"][name] for name in names})
    return LightningModule(model, OptimizerFactory(learning_rate=job["settings"]["learning_rate"]))


def train(job: dict[str, Any], module: LightningModule, batches: ParquetModule, clock: Callback) -> None:
    """User code: training; the clock is ours."""
    epochs = job["settings"].get("epochs", 500)
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=[clock], **shared.QUIET)
    trainer.fit(module, batches)


def run(job: dict[str, Any]) -> None:
    sequences = shared.read_sequences(job["data"])
    most, length = max(max(items) for items in sequences), job["settings"]["max_sequence_length"]
    schema, batches = prepare(job, [items[:-2] for items in sequences], most)
    module = build(job, schema)
    model, chosen = module.model, shared.some(len(sequences))
    histories, targets = shared.split_of(sequences, "valid")
    tests = shared.split_of(sequences, "test")[0]
    best: dict[str, Any] = {}

    def given(some: Any) -> dict[str, Any]:
        """Left-padded newest items of some histories, and where they are."""
        ids = torch.full((len(some), length), most)
        for row, items in enumerate(some):
            newest = torch.tensor(items[-length:]) - 1
            ids[row, length - len(newest) :] = newest
        return {"feature_tensors": {"item_id": ids}, "padding_mask": ids != most}

    @torch.inference_mode()
    def vectors(some: Any) -> shared.Vectors:
        model.eval()
        parts = [some[start : start + shared.BLOCK] for start in range(0, len(some), shared.BLOCK)]
        queries = torch.cat([model.body(**given(part))[:, -1] for part in parts])
        items = model.body.embedder.get_item_weights(None)
        table = torch.cat([torch.zeros(1, items.shape[1]), items])
        return shared.Vectors(queries.clone(), table.clone(), torch.zeros(most + 1))

    @torch.inference_mode()
    def recommend(some: Any) -> Any:
        """Ten items for each history by the logits that the model returns, without the history's own."""
        logits = model(**given(some))["logits"]
        for row, items in zip(logits, some, strict=True):
            row[torch.tensor(items) - 1] = -torch.inf
        return logits.topk(shared.K).indices + 1

    number = math.ceil(len(sequences) / job["settings"]["batch_size"])

    class Clock(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.watch, self.done = shared.Watch(job["minutes"], self.validate, self.keep), 0

        def validate(self) -> float:
            found = vectors([histories[user] for user in chosen])
            model.train()
            value: float = shared.ndcg(found, [histories[user] for user in chosen], [targets[user] for user in chosen])
            return value

        def keep(self) -> None:
            best.update(shared.copied(model.state_dict()))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.done += 1
            try:
                self.watch.step(ends_epoch=self.done % number == 0)
            except shared.Over:
                trainer.should_stop = True

    clock = Clock()
    train(job, module, batches, clock)
    peak = shared.peak_mib()
    model.load_state_dict(best)
    model.eval()
    few = [tests[user] for user in chosen[: shared.ASKED]]
    served = shared.requests(lambda users: recommend([tests[user] for user in users]), len(sequences))
    account = {
        **clock.watch.account(number),
        "peak_mib": peak,
        "parameters": sum(p.numel() for p in model.parameters()),
        "serving": served,
        "agreement": shared.agreement(vectors(few), few, recommend(few).tolist()),
    }
    shared.write(Path(job["folder"]), vectors(tests), account)


if __name__ == "__main__":
    shared.main(run)
