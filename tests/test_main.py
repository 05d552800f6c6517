"""``python -m ensemble_kd``: what a report of a bug needs."""

from __future__ import annotations

import pytest
import torch

import ensemble_kd
from ensemble_kd import __main__ as report


def test_it_names_what_a_run_depends_on_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    lines = {line[:15].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}
    assert lines["ensemble_kd"] == ensemble_kd.__version__
    assert lines["torch"] == str(torch.__version__)
    assert lines["CPU"].startswith(f"{torch.get_num_threads()} threads")
    assert {"Python", "accelerators", "tiles", *report.EXTRAS} <= lines.keys()
    assert lines["fit"].startswith("ok, ")
    assert lines["recommend"] == "ok, 200 users"


def test_what_an_extra_is_missing_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert dict(report.self_test())["save and load"] == "left out: pip install 'ensemble_kd[export]' for it"


def test_a_loaded_model_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    load = report.load

    def damaged(*given: object) -> ensemble_kd.EnsembleKD:
        model = load(*given)  # type: ignore[arg-type]
        with torch.no_grad():
            model.item_classifier.bias.copy_(torch.arange(100.0).expand(2, -1))
        return model

    monkeypatch.setattr(report, "load", damaged)
    with pytest.raises(RuntimeError, match="recommends other items"):
        dict(report.self_test())
