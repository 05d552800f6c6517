"""The checks behind ``ensemble_kd.testing.check_encoder``, each a question put to small batches."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_kd.ensemble import EnsembleKD
from ensemble_kd.ensemble.contract import check_output, positive, probe
from ensemble_kd.errors import EnsembleKDError, first_line
from ensemble_kd.objectives import NextItem
from ensemble_kd.seeding import member_seed, seeded
from ensemble_kd.stacking import StackedModule, build_members, duplicate

Verdict = Literal["ok", "wrong", "not applicable"]

TOLERANCE = 1e-4  # of a relative difference in float32; what leaks or moves is far above, rounding far below
LONGEST = 64  # columns that are tried where an encoder reads more
MOVED = 0.1  # standard deviation of the noise on trained weights, so that no check rests on a start of zeros


class Check(NamedTuple):
    """One line of a report."""

    name: str
    verdict: Verdict
    seen: str  # what was seen, and the way out where it is wrong


class _NotApplicableError(Exception):
    """Ends a check that has nothing to ask of this encoder."""


class _WrongError(Exception):
    """Ends a check that has found a fault."""


class Kit:
    """One call of ``check_encoder``. Each check returns what it saw, or raises."""

    members: list[nn.Module]  # two, as built
    moved: list[nn.Module]  # the same in evaluation mode, their weights as if trained
    num_items: int
    repeats: bool  # two calls in evaluation give the same

    def __init__(
        self, encoder_fn: Callable[[], nn.Module], num_items: int | None, max_len: int | None, compile: bool, seed: int
    ) -> None:
        self.encoder_fn, self.given_items, self.given_len = encoder_fn, num_items, max_len
        self.compile, self.seed = compile, seed
        self.newest_only = self.causal = self.masks = False

    def run(self) -> tuple[Check, ...]:
        """Every check in turn; one that needs what an earlier one found wanting is not tried."""
        basic = {"factory": self.factory, "contract": self.contract}
        any_output = {"mask token": self.mask_token, "dropout": self.dropout}
        repeatable = {"padding": self.padding, "rows": self.rows, "causality": self.causality}
        weights = {"seeds": self.seeds, "ties": self.ties}
        backends = {"loop": self.loop, "vmap": self.vmap, "state_dict": self.state_dict}
        last = {"training": self.training, "compile": self.compiled}
        done: list[Check] = []
        blocked: str | None = None
        for name, check in {**basic, **any_output, **repeatable, **weights, **backends, **last}.items():
            compares = name in repeatable or name in backends or name == "compile"
            if blocked is not None or (compares and not self.repeats):
                why = f"{blocked} is wrong" if blocked else "outputs in evaluation are random"
                done.append(Check(name, "not applicable", f"Not tried, since {why}."))
                continue
            done.append(Check(name, *_outcome(check)))
            if name in basic and done[-1].verdict == "wrong":
                blocked = name
        return tuple(done)

    def factory(self) -> str:
        """Two members, and V."""
        self.members = build_members(self.encoder_fn, 2, seed=self.seed)
        first = self.members[0]
        known = self.given_items if self.given_items is not None else getattr(first, "num_items", None)
        self.num_items = positive("num_items", known)
        length = self.given_len if self.given_len is not None else getattr(first, "max_len", None)
        self.longest = 10 if length is None else min(positive("max_len", length), LONGEST)
        self.causal = bool(getattr(first, "causal", False))
        self.device = next((t.device for t in first.parameters()), torch.device("cpu"))
        return f"Two members of {sum(p.numel() for p in first.parameters()):,} parameters each, num_items = {known}."

    def contract(self) -> str:
        """What comes out for what goes in, at several lengths."""
        stack = self.stack(self.members)
        out = probe(stack, max_len=self.longest, highest=self.num_items)
        self.newest_only, d = out.ndim == 2, out.shape[-1]
        lengths = sorted({1, min(2, self.longest), self.longest})
        for length in lengths:
            ids = self.ids(3, length)
            before = ids.clone()
            try:
                out = self.evaluate(stack, ids)
            except Exception as error:
                short = "" if length == 1 else " Pass max_len where it reads fewer columns."
                raise _WrongError(f"{first_line(error)}, for l = {length}.{short}") from error
            check_output(out, ids, newest_only=self.newest_only)
            if out.shape[-1] != d:
                raise _WrongError(f"d is {d} and {out.shape[-1]} for other lengths; make it one number.")
            if not torch.equal(ids, before):
                raise _WrongError("forward writes into item_ids; work on a copy.")
            if not bool(self.real(out, ids).isfinite().all()):
                raise _WrongError(
                    f"Hidden states of items are not finite for l = {length}; is a row of keys all hidden?"
                )
        own = {t.dtype for t in (*stack.parameters(), *stack.buffers()) if t.is_floating_point()}
        if own and out.dtype not in own:
            names = ", ".join(str(dtype) for dtype in sorted(own, key=str))
            raise _WrongError(
                f"Hidden states are {out.dtype}, the weights {names}: a plain tensor of another type takes part? "
                "Register it as a buffer of the weights' type."
            )
        self.tolerance = max(TOLERANCE, 10 * torch.finfo(out.dtype).eps)
        self.moved = [_moved(duplicate(member)).eval() for member in self.members]
        ids = self.ids(3, self.longest)
        if not bool(self.real(self.call(ids), ids).isfinite().all()):  # such weights are none that training would reach
            self.moved = [duplicate(member).eval() for member in self.members]
        with torch.no_grad():  # under two seeds, or what is drawn would be equal
            with seeded(1):
                first = self.moved[0](ids)
            with seeded(2):
                second = self.moved[0](ids)
        self.repeats = _difference(first, second) <= self.tolerance
        shape = f"(b, {d})" if self.newest_only else f"(b, l, {d})"
        return f"Hidden states {shape}, {out.dtype}, for l = {', '.join(map(str, lengths))}."

    def mask_token(self) -> str:
        """Whether the embedding has a row for it."""
        try:
            probe(self.stack(self.members), max_len=self.longest, highest=self.num_items + 1)
            self.masks = True
        except EnsembleKDError as error:
            if self.newest_only or self.causal:
                raise _NotApplicableError(
                    f"id {self.num_items + 1} is refused, so masked views are out; NextItem() needs none."
                ) from error
            raise
        return f"id {self.num_items + 1} is accepted."

    def dropout(self) -> str:
        """Random in training alone."""
        if not self.repeats:
            raise _WrongError("Two calls in eval() differ. Draw, and write buffers, only while self.training.")
        stack, ids = self.stack(self.members), self.ids(3, self.longest)
        outs = []
        for draw in (1, 2):  # from the same buffers, so that only random numbers differ
            with stack.undisturbed(), torch.no_grad():
                torch.manual_seed(draw)
                outs.append(self.real(stack.train().call_member(0, ids), ids))
        asked = [
            name
            for name, module in self.members[0].named_modules()
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        ]
        if not torch.equal(*outs):
            return "Random in training, not in evaluation."
        if asked:
            raise _WrongError(f"{asked[0]!r} drops nothing in training. Is it called, and is no seed set in forward?")
        raise _NotApplicableError("Nothing is random in training; members then differ by their start alone.")

    def padding(self) -> str:
        """Items with more padding before them."""
        room = min(3, self.longest - 1)
        if room < 1:
            raise _NotApplicableError("The encoder reads one column, so nothing is ever padded.")
        items = self.ids(3, min(4, self.longest - room), padded=False)
        want, padded = self.call(items), self.call(F.pad(items, (room, 0)))
        got = padded if self.newest_only else padded[:, room:]
        if (error := _difference(got, want)) > self.tolerance:
            raise _WrongError(
                f"{room} more columns of padding change the items' hidden states by {error:.1%}. Hide id 0 from "
                "attention, means and recurrences, and count positions from the newest item."
            )
        return f"{room} more columns of padding change nothing."

    def rows(self) -> str:
        """A sequence alone and beside others."""
        ids = self.ids(3, self.longest)
        alone = torch.cat([self.real(self.call(row), row) for row in ids[:, None]])
        if (error := _difference(self.real(self.call(ids), ids), alone)) > self.tolerance:
            raise _WrongError(
                f"A sequence's hidden states differ by {error:.1%} beside other sequences. Is an axis taken for "
                "another one (batch_first=True)?"
            )
        return "Each sequence's hidden states depend on it alone."

    def causality(self) -> str:
        """A change of the newest item."""
        if self.newest_only:
            raise _NotApplicableError("One vector a sequence: its target comes after all that is read.")
        if self.longest < 2 or self.num_items < 2:
            raise _NotApplicableError("It takes two positions and two items to see any.")
        items = self.ids(3, min(self.longest, 6), padded=False)
        changed = items.clone()
        changed[:, -1] = changed[:, -1] % self.num_items + 1
        error = _difference(self.call(changed)[:, :-1], self.call(items)[:, :-1])
        if self.causal:
            if error > self.tolerance:
                raise _WrongError(
                    f"It says causal = True, and a later item changes earlier hidden states by {error:.1%}: the target "
                    "leaks. Mask what comes after each position."
                )
            return "No hidden state depends on a later item."
        hint = (
            ""
            if error > self.tolerance
            else " It is causal, as it happens: say causal = True, and NextItem is the default."
        )
        raise _NotApplicableError(f"It does not say causal = True, so MaskedItem is the default.{hint}")

    def seeds(self) -> str:
        """Members built again."""
        first, second = (dict(member.named_parameters()) for member in self.members)
        ends = []
        for i in range(2):
            with seeded(member_seed(self.seed, i)):
                module = self.encoder_fn()
                ends.append(torch.get_rng_state())
            for name, tensor in module.state_dict().items():
                if not torch.equal(tensor, self.members[i].state_dict()[name]):
                    raise _WrongError(f"Equal seeds give other {name!r}. Draw from torch's global generator.")
        if not first:
            raise _NotApplicableError("There are no parameters.")
        equal = [name for name, tensor in first.items() if torch.equal(tensor, second[name])]
        if len(equal) == len(first):
            raise _WrongError("All seeds give equal weights. Set no seed, and load no weights, in the factory.")
        if torch.equal(*ends):
            raise _WrongError(f"A seed is set inside the factory, so members share weights: {_some(equal)}. Set none.")
        constant = all(bool((first[name] == first[name].flatten()[0]).all()) for name in equal if first[name].numel())
        return "Equal seeds give equal weights, other seeds others" + (
            "." if constant else f"; the same in all members: {_some(equal)}."
        )

    def ties(self) -> str:
        """Names of one parameter, and parameters of one memory."""
        first = self.members[0]
        names: dict[int, list[str]] = {}
        stored: dict[tuple[int, torch.Size], tuple[int, str]] = {}
        for name, p in first.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
            if not p.numel() or p.is_meta:
                continue
            owner, earlier = stored.setdefault((p.data_ptr(), p.shape), (id(p), name))
            if owner != id(p):
                raise _WrongError(
                    f"{earlier!r} and {name!r} share memory, but are two parameters, which training would part. Tie "
                    "the parameters, a.weight = b.weight, and not their .data."
                )
        tied = [group for group in names.values() if len(group) > 1]
        if not tied:
            raise _NotApplicableError("No parameter has two names.")
        model = self.ensemble()
        self.loss(model, backward=True)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
        trained = model.encoder.member(0).state_dict()
        for one, *others in tied:
            for other in others:
                if not torch.equal(trained[one], trained[other]):
                    raise _WrongError(f"{one!r} and {other!r} part in training. Tie them once, in __init__.")
        return "; ".join(" = ".join(group) for group in tied) + " stay one when trained."

    def loop(self) -> str:
        """The backend of a CPU."""
        self.compare_backend("loop")
        return "As plain modules in evaluation."

    def vmap(self) -> str:
        """The backend of an accelerator, wherever it serves."""
        stack, ids = self.stack(self.moved, "vmap"), self.ids(3, self.longest)
        for mode in (True, False):
            obstacle = stack.train(mode).vmap_obstacle(ids)
            if obstacle is not None:
                raise _NotApplicableError(f'{obstacle}; backend="auto" takes the loop.')
        self.compare_backend("vmap")
        return "As plain modules in evaluation."

    def compare_backend(self, backend: Literal["loop", "vmap"]) -> None:
        """Stacked against plain, member by member."""
        stack, ids = self.stack(self.moved, backend), self.ids(3, self.longest)
        want = torch.stack([self.call(ids, i) for i in range(2)])
        with torch.no_grad():
            got = stack.eval()(ids)
        pairs = zip(got, want, strict=True)
        if (error := max(_difference(self.real(g, ids), self.real(w, ids)) for g, w in pairs)) > 10 * self.tolerance:
            raise _WrongError(
                f"Outputs differ by {error:.1%} from plain modules'. Is there state outside of the module?"
            )

    def state_dict(self) -> str:
        """Into members of another seed."""
        ids = self.ids(3, self.longest)
        source = self.stack(self.moved)
        with torch.no_grad(), seeded(self.seed):
            source.train()(ids)  # moves running statistics and other buffers
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target = self.stack(build_members(self.encoder_fn, 2, seed=self.seed + 1))
        target.load_state_dict(torch.load(file, weights_only=True))
        got, want = (self.real(self.evaluate(stack, ids)[0], ids) for stack in (target, source))
        if (error := _difference(got, want)) > self.tolerance:
            raise _WrongError(
                f"With the same state_dict outputs differ by {error:.1%}. Register all that they depend on: "
                "nn.Parameter, or register_buffer."
            )
        return "Loaded into new members, it gives the same outputs."

    def training(self) -> str:
        """One step on one batch, with the same draws before and after."""
        model = self.ensemble()
        first = self.loss(model, backward=True)
        encoder = {name: p for name, p in model.encoder.named_parameters() if p.requires_grad}
        for name, p in encoder.items():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                raise _WrongError(
                    f"The gradient of {name!r} is not finite. Is a row of attention keys all hidden, or 0 divided?"
                )
        unused = [name for name, p in encoder.items() if p.grad is None or not bool(p.grad.any())]
        if encoder and len(unused) == len(encoder):
            raise _WrongError("No gradient reaches the encoder. Is its output detached?")
        aside = f" Without gradient: {_some(unused)}." if unused else ""
        # The encoder's weights alone: the classifiers on top would lower the loss whatever stands below them.
        trained = [(p, p.detach().clone(), p.grad) for p in encoder.values() or model.parameters()]
        for lr in (1e-3, 1e-5):  # a step as of Adam's first; the smaller one for what 1e-3 is too much for
            with torch.no_grad():
                for p, start, grad in trained:
                    p.copy_(start if grad is None else start - lr * grad.sign())
            if (after := self.loss(model)) < first:
                return f"One step of {lr:g} lowers the loss from {first:.5f} to {after:.5f}.{aside}"
        raise _WrongError(f"One step raises the loss from {first:.5f} to {after:.5f}. Are gradients those of forward?")

    def compiled(self) -> str:
        """torch.compile of one member."""
        if not self.compile:
            raise _NotApplicableError("Not asked for: compile=True tries it.")
        ids = self.ids(3, self.longest)
        with torch.no_grad():
            got = torch.compile(duplicate(self.moved[0]))(ids)
        if (error := _difference(self.real(got, ids), self.real(self.call(ids), ids))) > 10 * self.tolerance:
            raise _WrongError(f"The compiled module's outputs differ by {error:.1%}.")
        return "torch.compile gives the same outputs."

    def ids(self, b: int, length: int, *, padded: bool = True) -> Tensor:
        """(b, l) items; row 0 is full, the others have padding where asked for and possible."""
        generator = torch.Generator().manual_seed(self.seed)
        out = torch.randint(1, self.num_items + 1, (b, length), generator=generator)
        if padded:
            out *= torch.arange(length) >= (torch.arange(b) % length)[:, None]
        return out.to(self.device)

    def real(self, out: Tensor, ids: Tensor) -> Tensor:
        """What is read of an output: never what stands at padding."""
        return out if self.newest_only else out[..., ids != 0, :]

    def call(self, ids: Tensor, i: int = 0) -> Tensor:
        """Plain member i in evaluation, weights as if trained."""
        with torch.no_grad(), seeded(self.seed):
            out: Tensor = self.moved[i](ids)
        return out

    def evaluate(self, stack: StackedModule, ids: Tensor) -> Tensor:
        """The stack in evaluation: (2, ...)."""
        with torch.no_grad():
            return stack.eval()(ids)  # type: ignore[no-any-return]

    def stack(self, members: list[nn.Module], backend: Literal["loop", "vmap"] = "loop") -> StackedModule:
        """Copies of the members as one."""
        return StackedModule([duplicate(member) for member in members], backend=backend)

    def ensemble(self) -> EnsembleKD:
        """The members as an ensemble with the default losses."""
        return EnsembleKD.from_members(
            self.members,
            num_items=self.num_items,
            objective=None if self.masks else NextItem(),
            max_len=self.given_len,
            seed=self.seed,
            backend="loop",
        )

    def loss(self, model: EnsembleKD, *, backward: bool = False) -> float:
        """The training loss with the same draws each time, from the same buffers."""
        shortest = 2 if isinstance(model.objective, NextItem) else 1
        length = max(self.longest, shortest)  # next-item training reads one item less than a window has
        ids = self.ids(8, length, padded=False)
        ids[4:, : length - shortest] = 0
        with model.encoder.undisturbed():
            model.train()
            total = model.loss(ids, generator=torch.Generator(ids.device).manual_seed(self.seed)).total
            if backward:
                total.backward()
        return float(total.detach())


def _outcome(check: Callable[[], str]) -> tuple[Verdict, str]:
    try:
        return "ok", check()
    except _NotApplicableError as reason:
        return "not applicable", str(reason)
    except (_WrongError, EnsembleKDError) as fault:
        return "wrong", str(fault)
    except Exception as error:  # whatever an encoder of somebody else's raises
        return "wrong", f"{first_line(error)}. It comes from the encoder: call it by itself."


def _moved(module: nn.Module) -> nn.Module:
    """The module with noise on all that training moves: not on frozen weights, nor on an embedding's padding row."""
    fixed = {
        id(layer.weight): layer.padding_idx
        for layer in module.modules()
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    }
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad and p.is_floating_point():
                noise = MOVED * torch.randn_like(p)
                if id(p) in fixed:
                    noise[fixed[id(p)]] = 0
                p.add_(noise)
    return module


def _difference(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where one is NaN or of another shape."""
    if got.shape != want.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6))
    return error if error == error else float("inf")


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
