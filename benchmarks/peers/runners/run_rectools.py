"""RecTools' training, as its guide shows it, with a clock as a Lightning callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import shared
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel


def prepare(histories: Any) -> Dataset:
    """User code: interactions as a data frame."""
    rows = [(user, item, time) for user, items in enumerate(histories) for time, item in enumerate(items)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "datetime"])
    frame["datetime"] = pd.Timestamp("2000-01-01") + pd.to_timedelta(frame["datetime"], unit="D")
    frame["weight"] = 1
    return Dataset.construct(frame)


def train(job: dict[str, Any], dataset: Dataset, clock: Callback) -> Any:
    """User code: the model, its trainer, fit; the clock is ours."""
    seed_everything(job["seed"], workers=True)
    settings = dict(job["settings"])
    epochs = settings.pop("epochs", 500)

    def trainer() -> Trainer:
        return Trainer(max_epochs=epochs, callbacks=[clock], **shared.QUIET)

    kind = {"SASRec": SASRecModel, "BERT4Rec": BERT4RecModel}[job["model"]]
    return kind(**settings, get_trainer_func=trainer).fit(dataset)


def run(job: dict[str, Any]) -> None:
    sequences = shared.read_sequences(job["data"])
    most = max(max(items) for items in sequences)
    training = prepare([items[:-2] for items in sequences])
    everyone, chosen = list(range(len(sequences))), shared.some(len(sequences))
    histories, targets = shared.split_of(sequences, "valid")
    models: dict[str, Any] = {}  # the trainer has it before ``fit`` returns it
    best: dict[str, Any] = {}

    def vectors(dataset: Dataset, users: list[int]) -> shared.Vectors:
        model = models["model"]
        given = model.data_preparator.transform_dataset_u2i(dataset, np.array(users))
        found = given.user_id_map.external_ids.tolist()  # a user without a known item is left out
        loader = model.data_preparator.get_dataloader_recommend(given, model.recommend_batch_size)
        states, items = model.lightning_model._get_user_item_embeddings(loader, "cpu")
        place = {user: row for row, user in enumerate(users)}
        queries = torch.zeros(len(users), states.shape[1])
        queries[[place[user] for user in found]] = states
        known = torch.as_tensor(model.data_preparator.get_known_item_ids().astype(np.int64))
        inner = torch.as_tensor(model.data_preparator.get_known_items_sorted_internal_ids())
        vectors = torch.zeros(most + 1, items.shape[1])
        vectors[known] = items.detach()[inner]
        bias = torch.full((most + 1,), -torch.inf)  # an item that training has not seen has no score
        bias[known] = 0.0
        return shared.Vectors(queries, vectors, bias)

    shown = prepare([histories[user] if user in set(chosen) else [] for user in everyone])

    class Clock(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.module = module
            models["model"], models["batches"] = _Inside(module), trainer.num_training_batches
            models["watch"] = shared.Watch(job["minutes"], self.validate, self.keep)

        def validate(self) -> float:
            found = vectors(shown, chosen)
            self.module.torch_model.train()
            value: float = shared.ndcg(found, [histories[user] for user in chosen], [targets[user] for user in chosen])
            return value

        def keep(self) -> None:
            best.update(shared.copied(self.module.state_dict()))

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            try:
                models["watch"].step(ends_epoch=index + 1 == trainer.num_training_batches)
            except shared.Over:
                trainer.should_stop = True

    model = models["model"] = train(job, training, Clock())  # which fit copies
    peak = shared.peak_mib()
    model.lightning_model.load_state_dict(best)
    test = prepare(shared.split_of(sequences, "test")[0])
    few = chosen[: shared.ASKED]
    table = model.recommend(np.array(few), test, k=shared.K, filter_viewed=True)
    said = [table["item_id"][table["user_id"] == user].tolist() for user in few]
    seen = [shared.split_of(sequences, "test")[0][user] for user in few]
    served = shared.requests(
        lambda users: model.recommend(np.array(users), test, k=shared.K, filter_viewed=True), len(sequences)
    )
    parameters = sum(p.numel() for p in model.torch_model.parameters())
    account = {
        **models["watch"].account(models["batches"]),
        "peak_mib": peak,
        "parameters": parameters,
        "serving": served,
        "agreement": shared.agreement(vectors(test, few), seen, said),
    }
    shared.write(Path(job["folder"]), vectors(test, everyone), account)


class _Inside:
    """What ``vectors`` reads of a model, before its ``fit`` returns."""

    recommend_batch_size = 256

    def __init__(self, module: Any) -> None:
        self.lightning_model, self.data_preparator = module, module.data_preparator


if __name__ == "__main__":
    shared.main(run)
