"""The cost of n members: encoders of a training step, forward and backward, by backend; and of a mixed ensemble.

"alone" is one plain module, "separate" n of them in turn: what an ensemble costs without this library. The inputs are
those of a step on Beauty with two views and the anchor. For SASRec, GRU4Rec and Caser in one ensemble, a whole training
step is compared with those of three models of one member each, in turn. With KD, which a member alone cannot have, it
is also compared with a third of the steps of three ensembles with KD, each of three members of one architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from benchmarks import recipes
from benchmarks.common import Row, Step, beauty, interleaved, sig
from ensemble_kd import KD, EnsembleKD
from ensemble_kd.data import SequenceData
from ensemble_kd.encoders import Caser, GRU4Rec, SASRec
from ensemble_kd.errors import first_line
from ensemble_kd.losses import Loss
from ensemble_kd.stacking import StackedModule

VIEWS = 3  # two masked ones and the anchor, in one call
PLAIN = ("loop", "vmap")
BACKENDS = (*PLAIN, "loop, compiled", "loop, compiled, CUDA graphs", "vmap, compiled")
Model = TypeVar("Model", StackedModule, EnsembleKD)


def builder(name: str, num_items: int, d: int) -> Callable[[], nn.Module]:
    """A factory of encoders for one of ``BACKENDS``: plain, or with a compiled forward."""

    def build() -> nn.Module:
        module = recipes.encoder(num_items, d)
        if name.startswith("loop, compiled"):
            module.compile(mode="reduce-overhead" if "graphs" in name else None, dynamic="graphs" not in name)
        return module

    return build


def compile_stack(name: str, model: Model) -> Model:
    """Compile the stack's own forward, where that is what ``name`` says."""
    if name == "vmap, compiled":
        (model.encoder if isinstance(model, EnsembleKD) else model).compile()
    return model


def drop_failing(steps: dict[str, Step]) -> dict[str, str]:
    """Run each step once; take out those that cannot run, and say why: compilers and vmap have their limits."""
    failed = {}
    for name in list(steps):
        try:
            steps[name]()
        except Exception as error:
            failed[name] = first_line(error)
            del steps[name]
    return failed


def plain_step(modules: Sequence[nn.Module], item_ids: Tensor, d_hidden: Tensor) -> Step:
    """Forward and backward of modules in turn, with a given gradient of the hidden states (b, l, d)."""

    def step() -> None:
        for module in modules:
            module.zero_grad(set_to_none=True)
            module(item_ids).backward(d_hidden)

    return step


def stacked_step(stack: StackedModule, item_ids: Tensor, d_hidden: Tensor) -> Step:
    gradient = d_hidden.expand(len(stack), *d_hidden.shape)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        stack.zero_grad(set_to_none=True)
        stack(item_ids).backward(gradient)

    return step


def variants(n: int, d: int, num_items: int, item_ids: Tensor, names: Sequence[str]) -> dict[str, Step]:
    device = item_ids.device
    d_hidden = torch.randn(*item_ids.shape, d, device=device)
    plain = [recipes.encoder(num_items, d).to(device) for _ in range(n)]
    steps = {
        "alone": plain_step(plain[:1], item_ids, d_hidden),
        "separate": plain_step(plain, item_ids, d_hidden),
    }
    for name in names:
        built = [builder(name, num_items, d)() for _ in range(n)]
        stack = StackedModule(built, backend="vmap" if "vmap" in name else "loop").to(device)
        steps[name] = stacked_step(compile_stack(name, stack), item_ids, d_hidden)
    return steps


def chosen_backend(n: int, num_items: int, item_ids: Tensor) -> str:
    """Return the backend that ``backend="auto"`` chooses."""
    stack = StackedModule([recipes.encoder(num_items, 8) for _ in range(n)]).to(item_ids.device)
    return stack.backend_for(item_ids)[0]


def mixed_rows(data: SequenceData, quick: bool, device: str) -> list[Row]:
    """Rows: ms of a training step of a mixed ensemble, and of its members' own steps in turn."""
    v, d, window = data.num_items, 8 if quick else 64, recipes.WINDOW
    kinds = {"SASRec": SASRec, "GRU4Rec": GRU4Rec, "Caser": Caser}
    factories = [partial(kind, v, d_model=d, max_len=window) for kind in kinds.values()]
    item_ids = recipes.batch(data, 8 if quick else recipes.BATCH, device)

    def step(*chosen: Callable[[], nn.Module], losses: Loss | Literal[0] = 0) -> Step:
        return recipes.ensemble_step(EnsembleKD(list(chosen), losses=losses).to(device), item_ids, by_length=True)

    alone = [step(factory) for factory in factories]

    def in_turn() -> None:
        for each in alone:
            each()

    steps: dict[str, Step] = {"separate": in_turn, "mixed": step(*factories)}
    kd = 0.001 * KD()
    steps["mixed, KD"] = step(*factories, losses=kd)
    alike = {f"three {name}, KD": step(*3 * [f], losses=kd) for name, f in zip(kinds, factories, strict=True)}
    steps |= alike
    found = interleaved(f"members, {' + '.join(kinds)}, d={d}", steps, rounds=9, quick=quick)
    separate, with_kd = found["separate"].median, sum(found[name].median for name in alike) / len(alike)
    return [
        {"d": d, "n": len(kinds), "variant": f"{' + '.join(kinds)}, {name}", **times.row()}
        | {"times_separate": sig(times.median / separate, 3)}
        | ({"times_alike": sig(times.median / with_kd, 3)} if name == "mixed, KD" else {})
        for name, times in found.items()
    ]


def run(quick: bool, device: str = "cpu", compiled: bool = False) -> list[Row]:
    """Rows: ms, in units of one member alone, over n separate modules; ``auto`` is what the library would choose."""
    data = beauty(quick)
    item_ids = recipes.batch(data, 8 if quick else recipes.BATCH, device).repeat(VIEWS, 1)
    rows: list[Row] = []
    for d, n in [(8, 2)] if quick else [(64, 1), (64, 2), (64, 3), (64, 8), (256, 3)]:
        # Compiling takes a minute or more on a CPU, so only the paper's three members are compiled.
        usual = PLAIN if quick or d != 64 else (*PLAIN, "loop, compiled")
        names = PLAIN if n != recipes.N else BACKENDS if compiled else usual
        torch.compiler.reset()  # torch gives up on a function that was compiled for many models before
        steps = variants(n, d, data.num_items, item_ids, names)
        failed = drop_failing(steps)
        found = interleaved(f"members, d={d}, n={n}", steps, rounds=9, quick=quick)
        chosen = chosen_backend(n, data.num_items, item_ids)
        for name, times in found.items():
            row: Row = {"d": d, "n": n, "variant": name, **times.row()}
            row["times_alone"] = sig(times.median / found["alone"].median, 3)
            row["times_separate"] = sig(times.median / found["separate"].median, 3)
            rows.append(row | {"auto": "chosen" if name == chosen else None})
        rows += [{"d": d, "n": n, "variant": name, "error": text} for name, text in failed.items()]
    return rows + mixed_rows(data, quick, device)
