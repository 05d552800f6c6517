"""Serve a whole ensemble from a vector index: FAISS's exact inner-product index returns what ``recommend`` returns.

The mean of the members' logits is one inner product of n·d + 1 numbers, so an index needs to know nothing of ensembles.
Needs ``pip install faiss-cpu``. Trains on a synthetic catalogue in less than a minute on two cores. Its last line of
output::

    The index returns recommend's ten items, in its order, for 1000 of 1000 users.
"""

from __future__ import annotations

import faiss
import torch

from ensemble_kd import EnsembleKD, NextItem, fit
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import SASRec
from ensemble_kd.serving import Recommendations


def build(model: EnsembleKD) -> faiss.Index:
    """Return an index over all items; position j is item j + 1."""
    vectors = model.item_vectors().float().numpy()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def search(index: faiss.Index, model: EnsembleKD, item_ids: torch.Tensor, k: int = 10) -> Recommendations:
    """Return the k best items that are not among ``item_ids`` (b, l): the seen ones of a longer list are dropped."""
    most = min(index.ntotal, k + item_ids.shape[1])
    scores, places = index.search(model.query_vectors(item_ids).float().numpy(), most)
    items, scores = torch.from_numpy(places) + 1, torch.from_numpy(scores)
    seen = (items[:, :, None] == item_ids[:, None, :]).any(-1)
    first = (~seen).int().argsort(dim=1, descending=True, stable=True)[:, :k]  # unseen ones, in their order
    return Recommendations(items.gather(1, first), scores.gather(1, first))


def main(users: int = 1000, epochs: int = 2) -> None:
    """Train, build the index, and compare what it returns with ``recommend``."""
    data = synthetic(users, num_items=600)
    model = EnsembleKD(lambda: SASRec(data.num_items, d_model=32, max_len=20), n=3, objective=NextItem())
    fit(model, data, epochs=epochs, batch_size=64, window=21)
    index, asked = build(model), data.inputs("test", 20)[:1000]
    found, expected = search(index, model, asked), model.recommend(asked)
    same = (found.items == expected.items).all(dim=1)
    print(f"The index returns recommend's ten items, in its order, for {int(same.sum())} of {len(asked)} users.")


if __name__ == "__main__":
    main()
