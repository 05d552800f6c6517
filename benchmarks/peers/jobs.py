"""What is trained: each library's networks, with the settings that it publishes, and where those stand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATASETS = ("Beauty", "ML-1M")  # by file
SYNTHETIC = "synthetic"  # made up
RUNNERS = Path(__file__).parent / "runners"


@dataclass(frozen=True)
class Job:
    """One network, or three, of one library.

    Args:
        name: as the tables print it.
        library: the environment that runs it, and the runner.
        model: of the library.
        settings: for every dataset.
        by_dataset: for one dataset besides.
        source: where the settings stand.
        after: the job whose trained networks teach this one.
        script: the runner, if it is not the library's own.
        average: the job of which three seeds, each with a third of the minutes, are averaged in place of a run.
        datasets: those on which it says something that no other job does.
    """

    name: str
    library: str
    model: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_dataset: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    after: str | None = None
    script: str | None = None
    average: str | None = None
    datasets: tuple[str, ...] = (*DATASETS, SYNTHETIC)

    @property
    def runner(self) -> Path:
        """The script that runs it."""
        return RUNNERS / f"run_{self.script or self.library}.py"

    def of(self, dataset: str, *, small: bool = False) -> dict[str, Any]:
        """Return the settings for a dataset."""
        smaller = SMALL[self.script or self.library] if small else {}
        return {**self.settings, **self.by_dataset.get(dataset, {}), **smaller}

    def key(self, dataset: str, seed: int, minutes: float | None) -> str:
        """Return the name of its folder."""
        return f"{dataset}-{self.name.replace(' ', '-').replace(',', '')}-{seed}-{minutes or 0:g}m"

    def write(self, folder: Path, *, data: Path, dataset: str, minutes: float | None, seed: int, small: bool) -> Path:
        """Write the file that a runner reads, into the folder where it writes its results.

        Results of other settings, of a teacher's other settings or of other data, which the folder may have, are
        removed.
        """
        teacher = None if self.after is None else by_name(self.after)
        job = {
            "data": str(data.resolve()),
            "folder": str(folder.resolve()),
            "model": self.model,
            "settings": self.of(dataset, small=small),
            "minutes": minutes,
            "seed": seed,
            "after": None if teacher is None else str((folder.parent / teacher.key(dataset, seed, minutes)).resolve()),
            "teacher_settings": None if teacher is None else teacher.of(dataset, small=small),
        }
        path, text = folder / "job.json", json.dumps(job)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


# RecBole publishes searches on ML-1M, Amazon-Books and Yelp; Amazon-Books is nearest to Beauty. Width 64 and 50 items
# are those of all its searches. Its best rate for SASRec on Amazon-Books is .0003 (NDCG@10 .1131), with .001 (.1110)
# the third best. Within minutes the slower rate would not leave the start, so the faster one stands here.
_RECBOLE = {"MAX_ITEM_LIST_LENGTH": 50, "epochs": 500}
_RECBOLE_BATCH = {"Beauty": {"train_batch_size": 1024}, "ML-1M": {"train_batch_size": 4096}}
_RECBOLE_SOURCE = "RecBole, benchmark/hyper/sequential (Amazon-Books, ML-1M)"


def _recbole(model: str, settings: Mapping[str, Any], beauty: Mapping[str, Any], ml_1m: Mapping[str, Any]) -> Job:
    by_dataset = {
        "Beauty": {**_RECBOLE_BATCH["Beauty"], **beauty},
        "ML-1M": {**_RECBOLE_BATCH["ML-1M"], **ml_1m},
    }
    return Job(f"RecBole {model}", "recbole", model, _RECBOLE_SOURCE, {**_RECBOLE, **settings}, by_dataset)


# RecTools: the settings of its own training guide, without its least number of interactions a user (5), which would
# leave half of Beauty's users out. Its benchmark's networks are 256 wide and 100 items long, of which one epoch
# takes more than the whole budget on one thread.
_RECTOOLS = {
    "n_factors": 64,
    "n_blocks": 2,
    "n_heads": 2,
    "dropout_rate": 0.2,
    "session_max_len": 50,
    "lr": 1e-3,
    "batch_size": 128,
}
_RECTOOLS_SOURCE = "RecTools, examples/tutorials/transformers_advanced_training_guide.ipynb"
# RecTools and RePlay have the newest 50 of each user for targets: the first has none before it, and two are held out.
_SAME_TARGETS = {"newest": 53}

JOBS = (
    _recbole("SASRec", {}, {"learning_rate": 0.001}, {"learning_rate": 0.0005}),
    _recbole("GRU4Rec", {"num_layers": 1}, {"learning_rate": 0.001}, {"learning_rate": 0.001}),
    _recbole("BERT4Rec", {}, {"learning_rate": 0.0003}, {"learning_rate": 0.0003}),
    Job("RecTools SASRec, softmax", "rectools", "SASRec", _RECTOOLS_SOURCE, {**_RECTOOLS, "loss": "softmax"}),
    Job(
        "RecTools SASRec, sampled",
        "rectools",
        "SASRec",
        "as softmax, with gBCE, 256 negatives and t = .75 of its paper (Petrov and Macdonald, gSASRec, RecSys 2023)",
        {**_RECTOOLS, "loss": "gBCE", "n_negatives": 256, "gbce_t": 0.75},
    ),
    Job(
        "RecTools BERT4Rec",
        "rectools",
        "BERT4Rec",
        _RECTOOLS_SOURCE,
        {**_RECTOOLS, "loss": "softmax", "mask_prob": 0.15},
    ),
    Job("RecTools SASRec, three separate", "rectools", "SASRec", _RECTOOLS_SOURCE, average="RecTools SASRec, softmax"),
    Job(
        "RecTools SASRec, three under ensemble_kd",
        "rectools",
        "RecTools",
        "the network as RecTools SASRec, softmax, on ML-1M with its targets alone, too; fit with its defaults",
        {"n": 3, "d": 64, "max_len": 50, "heads": 2, "blocks": 2, "dropout": 0.2},
        {"ML-1M": _SAME_TARGETS},
        script="around",
    ),
    Job("RecBole SASRec, three separate", "recbole", "SASRec", _RECBOLE_SOURCE, average="RecBole SASRec"),
    Job(
        "RecBole SASRec, three under ensemble_kd",
        "recbole",
        "RecBole",
        "the network as RecBole SASRec; fit with its defaults",
        {"n": 3, "d": 64, "max_len": 50, "heads": 2, "blocks": 2, "dropout": 0.5},
        script="around",
    ),
    Job(
        "RePlay SASRec",
        "replay",
        "SASRec",
        "RePlay, the defaults of SasRec.from_params and OptimizerFactory, 64 wide in place of 192; batches of its"
        " documentation's example of ParquetModule",
        {
            "embedding_dim": 64,
            "num_heads": 4,
            "num_blocks": 2,
            "max_sequence_length": 50,
            "dropout": 0.3,
            "learning_rate": 1e-3,
            "batch_size": 64,
        },
    ),
    Job(
        "ensemble_kd SASRec",
        "ensemble_kd",
        "SASRec",
        "ensemble_kd.presets.recipe",
        {"n": 1},
        datasets=("Beauty", SYNTHETIC),  # on ML-1M the recipe is 64 wide by itself: the next one
    ),
    Job(
        "ensemble_kd SASRec, width 64",
        "ensemble_kd",
        "SASRec",
        "presets.recipe, but for the width",
        {"n": 1, "d_model": 64},
    ),
    Job(
        "ensemble_kd SASRec, width 64, 50 items",
        "ensemble_kd",
        "SASRec",
        "presets.recipe, but for the width and the 50 items that the others read, which are each user's targets, too",
        {"n": 1, "d_model": 64, "max_len": 50, **_SAME_TARGETS},
        datasets=("ML-1M", SYNTHETIC),  # elsewhere the recipe reads 50 by itself
    ),
    Job("ensemble_kd SASRec, three", "ensemble_kd", "SASRec", "ensemble_kd.presets.recipe", {"n": 3}),
    Job(
        "ensemble_kd SASRec, three that teach each other",
        "ensemble_kd",
        "SASRec",
        "ensemble_kd.presets.recipe, KD(temperature=1.0), rising from the second epoch to the fifth",
        {"n": 3, "taught": True},
    ),
    Job(
        "ensemble_kd SASRec, student of three",
        "ensemble_kd",
        "SASRec",
        "ensemble_kd.presets.recipe, distill",
        {"n": 1},
        after="ensemble_kd SASRec, three",
    ),
)

# For a run that is over in seconds, on made-up data.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "recbole": {"train_batch_size": 256, "epochs": 2, "hidden_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "rectools": {"n_factors": 16, "session_max_len": 10, "epochs": 2},
    "replay": {"embedding_dim": 16, "max_sequence_length": 10, "epochs": 2},
    "ensemble_kd": {"d_model": 16, "epochs": 2},
    "around": {"d": 16, "max_len": 10, "fit": {"epochs": 2}},
}


def by_name(name: str) -> Job:
    """Return a job by its name.

    Raises:
        KeyError: there is none.
    """
    return {job.name: job for job in JOBS}[name]
