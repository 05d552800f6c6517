"""RecBole's training, as its documentation shows it, with a clock around each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shared
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.utils import get_model, get_trainer, init_seed
from torch import Tensor


def prepare(job: dict[str, Any]) -> tuple[Any, Any]:
    """User code: RecBole's own file of the sequences, its configuration, its data."""
    folder = Path(job["folder"])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    with (folder / "data" / "data.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, items in enumerate(shared.read_sequences(job["data"])):
            file.writelines(f"{user}\t{item}\t{time}\n" for time, item in enumerate(items))
    settings = {
        "data_path": str(folder),
        "checkpoint_dir": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "mode": "full", "order": "TO"},
        "train_neg_sample_args": None,
        "device": "cpu",
        "seed": job["seed"],
        **job["settings"],
    }
    config = Config(model=job["model"], dataset="data", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train_data, _, _ = data_preparation(config, dataset)
    return config, train_data


def build(config: Any, train_data: Any) -> tuple[Any, Any]:
    """User code: RecBole's model and trainer."""
    model = get_model(config["model"])(config, train_data._dataset).to(config["device"])
    return model, get_trainer(config["MODEL_TYPE"], config["model"])(config, model)


def train(trainer: Any, train_data: Any) -> None:
    """User code: RecBole's training."""
    trainer.fit(train_data, saved=False, show_progress=False)


@contextmanager
def clocked(model: Any, clock: shared.Watch, batches: int) -> Iterator[None]:
    """Note each step where RecBole asks for the next one's loss; end without an error if the minutes are over."""
    own, done = model.calculate_loss, 0

    def loss(interaction: Any) -> Any:
        nonlocal done
        if done:  # the steps before this one
            clock.step(ends_epoch=done % batches == 0)
        done += 1
        return own(interaction)

    model.calculate_loss = loss
    try:
        yield
        clock.step(ends_epoch=True)
    except shared.Over:
        pass
    model.calculate_loss = own


def run(job: dict[str, Any]) -> None:
    config, train_data = prepare(job)
    dataset = train_data._dataset
    model, trainer = build(config, train_data)
    # Importing RecBole's models switches it on for the whole process. It finds errors, and takes much of the time.
    torch.autograd.set_detect_anomaly(False)
    sequences = shared.read_sequences(job["data"])
    most = max(max(items) for items in sequences)
    tokens = dataset.field2id_token[dataset.iid_field]  # of each of RecBole's numbers
    number = torch.zeros(most + 1, dtype=torch.int64)
    for i, token in enumerate(tokens[1:], start=1):
        number[int(token)] = i
    width = config["MAX_ITEM_LIST_LENGTH"]

    def inputs(histories: Any) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(histories), width, dtype=torch.int64)
        newest = [number[torch.as_tensor(items[-width:])] for items in histories]
        for row, items in zip(ids, newest, strict=True):
            row[: len(items)] = items
        return ids, torch.tensor([len(items) for items in newest])

    def those(split: str, users: list[int]) -> tuple[Any, list[int]]:
        histories, targets = shared.split_of(sequences, split)
        return [histories[user] for user in users], [targets[user] for user in users]

    @torch.no_grad()
    def vectors(histories: Any) -> shared.Vectors:
        model.eval()
        ids, lengths = inputs(histories)
        queries, bias = [], torch.zeros(most + 1)
        for rows in torch.arange(len(ids)).split(shared.BLOCK):
            if job["model"] == "BERT4Rec":
                states = model.forward(model.reconstruct_test_data(ids[rows], lengths[rows]))
                queries.append(model.gather_indexes(states, lengths[rows] - 1))
            else:
                queries.append(model.forward(ids[rows], lengths[rows]))
        if job["model"] == "BERT4Rec":
            bias = model.output_bias.detach()[number].clone()
        bias[number == 0] = -torch.inf
        return shared.Vectors(torch.cat(queries), model.item_embedding.weight.detach()[number], bias)

    everyone, chosen = list(range(len(sequences))), shared.some(len(sequences))

    def validate() -> float:
        histories, targets = those("valid", chosen)
        found: float = shared.ndcg(vectors(histories), histories, targets)
        model.train()
        return found

    best: dict[str, Any] = {}
    clock = shared.Watch(job["minutes"], validate, lambda: best.update(shared.copied(model.state_dict())))
    with clocked(model, clock, len(train_data)):
        train(trainer, train_data)
    peak = shared.peak_mib()
    model.load_state_dict(best)
    model.eval()

    histories, _ = those("test", everyone)

    @torch.no_grad()
    def answer(users: list[int]) -> Tensor:
        """As ``recbole.utils.case_study.full_sort_topk``, from the user's items instead of a row of the test data."""
        ids, lengths = inputs([histories[user] for user in users])
        scores = model.full_sort_predict(Interaction({model.ITEM_SEQ: ids, model.ITEM_SEQ_LEN: lengths}))
        scores = scores.view(len(users), -1)
        scores[:, 0] = -torch.inf
        top: Tensor = scores.scatter_(1, ids, -torch.inf).topk(shared.K).indices
        return top

    few = [user for user in chosen if len(histories[user]) <= width][: shared.ASKED]
    said = [[int(tokens[i]) for i in row] for row in answer(few).tolist()]
    seen = [histories[user] for user in few]
    served = shared.requests(answer, len(sequences))
    parameters = sum(p.numel() for p in model.parameters())
    shared.write(
        Path(job["folder"]),
        vectors(histories),
        {
            **clock.account(len(train_data)),
            "peak_mib": peak,
            "parameters": parameters,
            "serving": served,
            "agreement": shared.agreement(vectors(seen), seen, said),
        },
    )


if __name__ == "__main__":
    shared.main(run)
