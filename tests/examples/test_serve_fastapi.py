"""The service of the example, asked over the loopback by eight clients at once."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_kd import EnsembleKD
from ensemble_kd.data import Vocabulary
from ensemble_kd.export import save

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
CALLERS, REQUESTS = 8, 25


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    for needed in ("fastapi", "uvicorn", "httpx"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "serve_fastapi", raising=False)
    import serve_fastapi

    return serve_fastapi


def test_eight_callers_at_once(example: Any, tmp_path: Path) -> None:
    import httpx
    import uvicorn

    names = Vocabulary(f"item {i}" for i in range(1, example.ITEMS + 1))
    made = EnsembleKD(example.encoder, 2, vocabulary=names)
    save(made, tmp_path / "model.safetensors")
    model = example.load(tmp_path / "model.safetensors", example.encoder)

    def expected(history: list[int]) -> list[str]:
        return [f"item {i}" for i in made.eval().recommend(torch.tensor([history]), k=5).items[0].tolist()]

    histories = [[1 + (7 * i + j) % example.ITEMS for j in range(1 + i % 9)] for i in range(CALLERS)]
    server = uvicorn.Server(uvicorn.Config(example.app_of(model), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        for _ in range(600):
            if server.started:
                break
            time.sleep(0.1)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/recommend"

        def call(i: int) -> list[list[str]]:
            question = {"history": [f"item {item}" for item in histories[i]], "k": 5}
            with httpx.Client(trust_env=False, timeout=60) as client:
                answers = [client.post(url, json=question) for _ in range(REQUESTS)]
            assert {answer.status_code for answer in answers} == {200}
            return [answer.json()["items"] for answer in answers]

        with ThreadPoolExecutor(CALLERS) as pool:
            found = list(pool.map(call, range(CALLERS)))
        for history, answers in zip(histories, found, strict=True):
            assert answers == [expected(history)] * REQUESTS
        unknown = httpx.post(url, json={"history": ["rum"]}, trust_env=False, timeout=60)
        assert unknown.status_code == 422
        assert "'rum'" in unknown.json()["detail"]
        assert httpx.post(url, json={"history": []}, trust_env=False, timeout=60).status_code == 422
    finally:
        server.should_exit = True
        thread.join()
