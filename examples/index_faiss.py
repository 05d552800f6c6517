"""Serve a whole ensemble from a vector index: FAISS's exact inner-product index returns what ``recommend`` returns.

The mean of the members' logits is one inner product of n·d + 1 numbers, so an index needs to know nothing of ensembles.
Needs ``pip install faiss-cpu``. Without arguments it trains on a synthetic catalogue first.
"""

from __future__ import annotations

import faiss
import torch
from common import ensemble, fit_options, flags, sequences

from ensemble_kd import EnsembleKD, NextItem, fit
from ensemble_kd.encoders import SASRec
from ensemble_kd.serving import Recommendations


def build(model: EnsembleKD) -> faiss.Index:
    """An index over all items; position j is item j + 1."""
    vectors = model.item_vectors().float().numpy()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def search(index: faiss.Index, model: EnsembleKD, item_ids: torch.Tensor, k: int = 10) -> Recommendations:
    """The k best items that are not among ``item_ids`` (b, l): a few more are asked for, and those seen are dropped."""
    most = min(index.ntotal, k + item_ids.shape[1])
    scores, places = index.search(model.query_vectors(item_ids).float().numpy(), most)
    items, scores = torch.from_numpy(places) + 1, torch.from_numpy(scores)
    seen = (items[:, :, None] == item_ids[:, None, :]).any(-1)
    first = (~seen).int().argsort(dim=1, descending=True, stable=True)[:, :k]  # unseen ones, in their order
    return Recommendations(items.gather(1, first), scores.gather(1, first))


if __name__ == "__main__":
    args = flags(__doc__, output="runs/index", views=1, batch_size=64, epochs=3, lr=2e-3).parse_args()
    data, objective = sequences(args), NextItem(views=args.views)
    model = ensemble(
        args, data, lambda data: lambda: SASRec(data.num_items, d_model=args.d_model, max_len=args.window), objective
    )
    options = fit_options(args, objective)
    fit(model, data, **options, output_dir=args.output, resume=args.resume, overwrite=not args.resume)
    index, users = build(model), data.inputs("test", args.window)[:1000]
    found, expected = search(index, model, users), model.recommend(users)
    same = (found.items == expected.items).all(dim=1)
    print(f"The index returns recommend's ten items, in its order, for {int(same.sum())} of {len(users)} users.")
