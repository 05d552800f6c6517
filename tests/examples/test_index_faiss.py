"""A vector index serves the ensemble: the example's own functions, against ``recommend``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ensemble_kd import EnsembleKD
from ensemble_kd.data import synthetic
from ensemble_kd.encoders import BERT4Rec, SASRec

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("encoder", [SASRec, BERT4Rec])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of FAISS's own bindings
def test_an_exact_index_returns_what_recommend_returns(
    encoder: type[SASRec] | type[BERT4Rec], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "index_faiss", raising=False)
    import index_faiss

    data = synthetic(num_users=1000, num_items=500)
    model = EnsembleKD(lambda: encoder(500, d_model=16, max_len=12, init_std=0.3), 3).eval()
    with torch.no_grad():
        model.item_classifier.bias.normal_()
    users = data.inputs("test", 11)
    assert len(users) == 1000
    found, expected = index_faiss.search(index_faiss.build(model), model, users), model.recommend(users)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    # Two items may change places only where their scores are equal to rounding.
    differing = found.items != expected.items
    assert differing.float().mean() < 0.001
    assert all(set(a) == set(b) for a, b in zip(found.items.tolist(), expected.items.tolist(), strict=True))
