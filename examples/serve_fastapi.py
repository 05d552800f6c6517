"""Serve recommendations over HTTP: a saved model, raw ids in, raw ids out, many callers at once.

Needs ``pip install 'ensemble_kd[serve]'``. Without arguments it trains a small model first. Ask it, and it answers::

    curl localhost:8000/recommend -H 'content-type: application/json' -d '{"history": ["item 3", "item 7"], "k": 3}'
    {"items":["item 381","item 549","item 10"],"scores":[2.0392017364501953,1.905738353729248,1.586312174797058]}

FastAPI runs ``recommend`` in its pool of threads; a model needs no lock for it. One torch thread per request is best.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from ensemble_kd import EnsembleKD, EnsembleKDError, fit
from ensemble_kd.data import SequenceData, Vocabulary, synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.export import load, save
from ensemble_kd.recommending import recommend

ITEMS, LENGTH = 600, 50


class Question(BaseModel):
    """The names of a user's items, oldest first."""

    history: list[str] = Field(min_length=1)
    k: int = Field(default=10, ge=1, le=100)


class Answer(BaseModel):
    """The names of the best items, best first, and their scores."""

    items: list[str]
    scores: list[float]


def encoder() -> SASRec:
    return SASRec(ITEMS, d_model=32, max_len=LENGTH)


def app_of(model: EnsembleKD) -> FastAPI:
    """The service of a model."""
    app = FastAPI(title="ensemble_kd")

    @app.post("/recommend")
    def answer(question: Question) -> Answer:
        try:
            found = recommend(model, [question.history], k=question.k)
        except EnsembleKDError as error:  # an unknown item: the text says which
            raise HTTPException(status_code=422, detail=str(error)) from error
        return Answer(items=[str(item) for item in found.item_id], scores=found.score)

    return app


def train(path: Path) -> None:
    """Train on made-up sequences of named items, and save the model with the names."""
    data: SequenceData = synthetic(num_items=ITEMS)
    model = EnsembleKD(encoder, 3, vocabulary=Vocabulary(f"item {i}" for i in range(1, ITEMS + 1)))
    fit(model, data, epochs=2)
    save(model, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/serve/model.safetensors"), help="made if missing")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not args.model.exists():
        train(args.model)
    torch.set_num_threads(1)
    uvicorn.run(app_of(load(args.model, encoder)), host="127.0.0.1", port=args.port)
