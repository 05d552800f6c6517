"""The small part of each search, and searches that have to find what is wrong."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.faults import calls, damage, surface
from tests.faults.junk import KINDS
from tests.faults.outcome import Outcome
from tests.test_public import SURFACE

# Public functions that are not called with malformed arguments, and why.
PLUMBING = "between the library's own rooms: its arguments come from checked ones"
NOT_CALLED = {
    "distributed": f"functions of tensors and a place, {PLUMBING}",
    "ensemble": PLUMBING,
    "errors": "makes errors",
    "stacking": f"build_members, check_members and Heads, {PLUMBING}; StackedModule is called",
}
# Types, tables of names, values, small functions that only other functions call, and push_to_hub, which needs a server
# (tests/export/test_hub.py).
NOT_CALLED_NAMES = """
    held_out_states MappedWindows Networks Recipe Teacher Weight weighted
    Aggregate Ambiguity AnySequences AP AtTime autocast Between best_device Calibration Callback Candidates
    Check check_model_and_data Classifier compile_status Contrast Cuts default_losses Distilled Draw encoded
    EnsembleKDError Evaluation Exclude facts FitResult Gate Holdout ItemLosses Loss LossName LossSum main Mutual
    NamedRecommendations Need Objective On paper Part Picture places Pool Precision Prefixes protocol push_to_hub
    Quality Recommendations Report scale_transfer Schedule self_test selects Split Spread Step strong_kd Table table
    Term terms_by_name Uncertainty Unknown Variant
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calls", "threads", "files", "kills"])
def test_a_quick_search_finds_nothing(name: str) -> None:
    command = [sys.executable, "-m", "tests.faults", name, "--quick"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_call_works_before_it_is_malformed(tmp_path: Path) -> None:
    for call in surface.surface(tmp_path):
        call.function(**call.arguments())
        assert call.kinds.keys() <= call.arguments().keys(), call.name
        assert {kind.rstrip("?") for kind in call.kinds.values()} <= KINDS.keys()


def test_every_argument_of_the_great_functions_is_drawn(tmp_path: Path) -> None:
    called = {call.name: call for call in surface.surface(tmp_path)}
    for name in ("EnsembleKD", "fit", "distill", "recommend", "load", "save", "evaluate", "SASRec", "check_encoder"):
        parameters = inspect.signature(called[name].function).parameters
        missing = {p for p in parameters if p not in called[name].kinds} - {"self", "options"}
        assert not missing, (name, missing)


def test_the_search_for_malformed_calls_knows_a_fault_when_it_sees_one() -> None:
    def careless(size: int) -> list[int]:
        return [0] * (size if size < 3 else len(size))  # type: ignore[arg-type]

    outcome, call = Outcome("calls"), surface.Call("careless", careless, lambda: {"size": 1}, {"size": "natural"})
    for value in (-1, 3, "x"):
        calls._judge(call, {"size": value}, outcome)
    assert outcome.counts["accepted"] == 1
    assert outcome.counts["raw"] == 2


def test_the_search_for_damage_knows_a_fault_when_it_sees_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345678" * 20)
    trusting = damage.Subject("f", "f", lambda folder: (folder / "f").read_bytes().hex())
    outcome, draw = Outcome("damage"), random.Random(0)
    damage._one(trusting, tmp_path, trusting.read(tmp_path), [b"x"], draw, outcome)
    assert outcome.counts["silently wrong"] == 1


def test_seen_differs_where_content_does() -> None:
    one, other = {"a": [torch.tensor([1.0, 2.0])], "train_s": 1.0}, {"a": [torch.tensor([1.0, 2.5])], "train_s": 1.0}
    assert damage.seen(one) != damage.seen(other)
    assert damage.seen(one) == damage.seen({**one, "train_s": 2.0})


def test_no_public_function_is_left_out(tmp_path: Path) -> None:
    called = {call.function for call in surface.surface(tmp_path)}
    names = {getattr(function, "__name__", "") for function in called}
    for room, listed in SURFACE.items():
        if room in NOT_CALLED:
            continue
        module = import_module(f"ensemble_kd.{room}".rstrip("."))
        for name in listed.split():
            if callable(getattr(module, name)) and name not in NOT_CALLED_NAMES.split():
                assert name in names, f"{room}.{name} is called nowhere in surface.py, nor listed with a reason"
