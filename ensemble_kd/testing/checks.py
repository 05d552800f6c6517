"""The checks of ``check_encoder``: each tries one thing on small batches, and returns what it saw or raises."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from ensemble_kd.ensemble import check_output, probe
from ensemble_kd.errors import EnsembleKDError, first_line
from ensemble_kd.internal import dropout_rate, member_seed, seeded
from ensemble_kd.stacking import StackedModule, build_members, duplicate
from ensemble_kd.testing.subject import Subject, difference


class NotApplicableError(Exception):
    """Ends a check that does not apply to this encoder."""


class WrongError(Exception):
    """Ends a check that has found a fault."""


def factory(subject: Subject) -> str:
    """Build two members that can be stacked, and find V."""
    size = sum(p.numel() for p in subject.build().parameters())
    return f"Two members of {size:,} parameters each, num_items = {subject.num_items}."


def contract(subject: Subject) -> str:
    """Compare the outputs' form with the inputs' at several lengths."""
    stack = subject.stack(subject.members)
    out = probe(stack, max_len=subject.longest, highest=subject.num_items)
    subject.newest_only, d = out.ndim == 2, out.shape[-1]
    lengths = sorted({1, min(2, subject.longest), subject.longest})
    for length in lengths:
        ids = subject.ids(3, length)
        before = ids.clone()
        try:
            out = subject.evaluate(stack, ids)
        except Exception as error:
            short = "" if length == 1 else " Pass max_len if it reads fewer columns."
            raise WrongError(f"{first_line(error)}, for l = {length}.{short}") from error
        check_output(out, ids, newest_only=subject.newest_only)
        if out.shape[-1] != d:
            raise WrongError(f"d is {d} and {out.shape[-1]} for other lengths; make it one number.")
        if not torch.equal(ids, before):
            raise WrongError("forward writes into item_ids; work on a copy.")
        if not bool(subject.real(out, ids).isfinite().all()):
            raise WrongError(f"Hidden states of items are not finite for l = {length}; is a row of keys all hidden?")
    own = {t.dtype for t in (*stack.parameters(), *stack.buffers()) if t.is_floating_point()}
    if own and out.dtype not in own:
        names = ", ".join(str(dtype) for dtype in sorted(own, key=str))
        raise WrongError(
            f"Hidden states are {out.dtype}, the weights {names}: a plain tensor of another type takes part? "
            "Register it as a buffer of the weights' type."
        )
    subject.move(out.dtype)
    if stack.gives_newest and not subject.newest_only:
        _compare_newest(subject, stack, lengths)
    shape = f"(b, {d})" if subject.newest_only else f"(b, l, {d})"
    return f"Hidden states {shape}, {out.dtype}, for l = {', '.join(map(str, lengths))}."


def _compare_newest(subject: Subject, stack: StackedModule, lengths: list[int]) -> None:
    for ids in (subject.ids(3, length) for length in lengths):
        with torch.no_grad():
            alone = stack.newest(ids, training=False)
        if (error := difference(alone, subject.evaluate(stack, ids)[:, :, -1])) > subject.tolerance:
            raise WrongError(
                f"With newest=True, forward's last position differs by {error:.1%} for l = {ids.shape[1]}. Return the "
                "same state there, (b, d), or give that keyword another name."
            )


def mask_token(subject: Subject) -> str:
    """Try the mask token, for which the embedding needs a row."""
    try:
        probe(subject.stack(subject.members), max_len=subject.longest, highest=subject.num_items + 1)
        subject.masks = True
    except EnsembleKDError as error:
        if subject.newest_only or subject.causal:
            raise NotApplicableError(
                f"id {subject.num_items + 1} is refused, so masked views are out; NextItem() needs none."
            ) from error
        raise
    return f"id {subject.num_items + 1} is accepted."


def dropout(subject: Subject) -> str:
    """Compare two calls in training, and two in evaluation."""
    if not subject.repeats:
        raise WrongError("Two calls in eval() differ. Draw, and write buffers, only while self.training.")
    stack, ids = subject.stack(subject.members), subject.ids(3, subject.longest)
    outs = []
    for draw in (1, 2):  # from the same buffers, so that only random numbers differ
        with stack.undisturbed(), torch.no_grad():
            torch.manual_seed(draw)
            outs.append(subject.real(stack.train().call_member(0, ids), ids))
    asked = [name for name, module in subject.members[0].named_modules() if dropout_rate(module) > 0]
    if not torch.equal(*outs):
        return "Random in training, not in evaluation."
    if asked:
        raise WrongError(f"{asked[0]!r} drops nothing in training. Is it called, and is no seed set in forward?")
    raise NotApplicableError("Nothing is random in training; members then differ by their initial weights alone.")


def padding(subject: Subject) -> str:
    """Put more padding before the items."""
    room = min(3, subject.longest - 1)
    if room < 1:
        raise NotApplicableError("The encoder reads one column, so there is no padding.")
    items = subject.ids(3, min(4, subject.longest - room), padded=False)
    want, padded = subject.call(items), subject.call(F.pad(items, (room, 0)))
    got = padded if subject.newest_only else padded[:, room:]
    if (error := difference(got, want)) > subject.tolerance:
        raise WrongError(
            f"{room} more columns of padding change the items' hidden states by {error:.1%}. Hide id 0 from "
            "attention, means and recurrences, and count positions from the newest item."
        )
    return f"{room} more columns of padding change nothing."


def rows(subject: Subject) -> str:
    """Compare a sequence alone with the same sequence beside others."""
    ids = subject.ids(3, subject.longest)
    alone = torch.cat([subject.real(subject.call(row), row) for row in ids[:, None]])
    if (error := difference(subject.real(subject.call(ids), ids), alone)) > subject.tolerance:
        raise WrongError(
            f"A sequence's hidden states differ by {error:.1%} beside other sequences. Are two axes "
            "confused (batch_first=True)?"
        )
    return "Each sequence's hidden states depend on it alone."


def causality(subject: Subject) -> str:
    """Change the newest item, and look at earlier hidden states."""
    if subject.newest_only:
        raise NotApplicableError("One vector per sequence: its target comes after all items that are read.")
    if subject.longest < 2 or subject.num_items < 2:
        raise NotApplicableError("It takes two positions and two items to see a leak.")
    items = subject.ids(3, min(subject.longest, 6), padded=False)
    changed = items.clone()
    changed[:, -1] = changed[:, -1] % subject.num_items + 1
    error = difference(subject.call(changed)[:, :-1], subject.call(items)[:, :-1])
    if subject.causal:
        if error > subject.tolerance:
            subject.leaks = True
            raise WrongError(
                f"causal is True, but a later item changes earlier hidden states by {error:.1%}: the target "
                "leaks. Mask what comes after each position."
            )
        return "No hidden state depends on a later item."
    hint = (
        ""
        if error > subject.tolerance
        else " Its outputs are causal, though: set causal = True, and NextItem is the default."
    )
    raise NotApplicableError(f"causal is not True, so MaskedItem is the default.{hint}")


def seeds(subject: Subject) -> str:
    """Build the members again, under equal seeds and other ones."""
    first, second = (dict(member.named_parameters()) for member in subject.members)
    ends = []
    for i in range(2):
        with seeded(member_seed(subject.seed, i)):
            module = subject.encoder_fn()
            ends.append(torch.get_rng_state())
        for name, tensor in module.state_dict().items():
            if not torch.equal(tensor, subject.members[i].state_dict()[name]):
                raise WrongError(f"Equal seeds give different {name!r}. Draw from torch's global generator.")
    if not first:
        raise NotApplicableError("There are no parameters.")
    equal = [name for name, tensor in first.items() if torch.equal(tensor, second[name])]
    if len(equal) == len(first):
        raise WrongError("All seeds give equal weights. Set no seed, and load no weights, in the factory.")
    if torch.equal(*ends):
        raise WrongError(f"A seed is set inside the factory, so members share weights: {_some(equal)}. Set none.")
    constant = all(bool((first[name] == first[name].flatten()[0]).all()) for name in equal if first[name].numel())
    return "Equal seeds give equal weights, other seeds other weights" + (
        "." if constant else f"; the same in all members: {_some(equal)}."
    )


def ties(subject: Subject) -> str:
    """Train a step, and compare parameters of several names."""
    first = subject.members[0]
    names: dict[int, list[str]] = {}
    stored: dict[tuple[int, torch.Size], tuple[int, str]] = {}
    for name, p in first.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
        if not p.numel() or p.is_meta:
            continue
        owner, earlier = stored.setdefault((p.data_ptr(), p.shape), (id(p), name))
        if owner != id(p):
            raise WrongError(
                f"{earlier!r} and {name!r} share memory, but are two parameters, which training would separate. Tie "
                "the parameters, a.weight = b.weight, and not their .data."
            )
    tied = [group for group in names.values() if len(group) > 1]
    if not tied:
        raise NotApplicableError("No parameter has two names.")
    model = subject.ensemble()
    subject.loss(model, backward=True)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
    trained = model.encoder.member(0).state_dict()
    for one, *others in tied:
        for other in others:
            if not torch.equal(trained[one], trained[other]):
                raise WrongError(f"{one!r} and {other!r} separate in training. Tie them once, in __init__.")
    return "; ".join(" = ".join(group) for group in tied) + " stay equal when trained."


def loop(subject: Subject) -> str:
    """Compare the backend of CPUs with plain modules."""
    _compare_backend(subject, "loop")
    return "As plain modules in evaluation."


def vmap(subject: Subject) -> str:
    """Compare the backend of accelerators with plain modules, if it can serve."""
    stack, ids = subject.stack(subject.moved, "vmap"), subject.ids(3, subject.longest)
    for mode in (True, False):
        obstacle = stack.train(mode).vmap_obstacle(ids)
        if obstacle is not None:
            raise NotApplicableError(f'{obstacle}; backend="auto" takes the loop.')
    _compare_backend(subject, "vmap")
    return "As plain modules in evaluation."


def _compare_backend(subject: Subject, backend: Literal["loop", "vmap"]) -> None:
    """Compare stacked members with plain ones."""
    stack, ids = subject.stack(subject.moved, backend), subject.ids(3, subject.longest)
    want = torch.stack([subject.call(ids, i) for i in range(2)])
    with torch.no_grad():
        got = stack.eval()(ids)
    pairs = zip(got, want, strict=True)
    error = max(difference(subject.real(g, ids), subject.real(w, ids)) for g, w in pairs)
    if error > 10 * subject.tolerance:
        raise WrongError(f"Outputs differ by {error:.1%} from plain modules'. Is there state outside of the module?")


def state_dict(subject: Subject) -> str:
    """Load a state into members of another seed."""
    ids = subject.ids(3, subject.longest)
    source = subject.stack(subject.moved)
    with torch.no_grad(), seeded(subject.seed):
        source.train()(ids)  # moves running statistics and other buffers
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = subject.stack(build_members(subject.encoder_fn, 2, seed=subject.seed + 1))
    target.load_state_dict(torch.load(file, weights_only=True))
    got, want = (subject.real(subject.evaluate(stack, ids)[0], ids) for stack in (target, source))
    if (error := difference(got, want)) > subject.tolerance:
        raise WrongError(
            f"With the same state_dict outputs differ by {error:.1%}. Register all that they depend on: "
            "nn.Parameter, or register_buffer."
        )
    return "Loaded into new members, it gives the same outputs."


def training(subject: Subject) -> str:
    """Take one step on one batch, with the same random numbers before and after."""
    model = subject.ensemble()
    first = subject.loss(model, backward=True)
    encoder = {name: p for name, p in model.encoder.named_parameters() if p.requires_grad}
    for name, p in encoder.items():
        if p.grad is not None and not bool(p.grad.isfinite().all()):
            raise WrongError(
                f"The gradient of {name!r} is not finite. Is a row of attention keys all hidden, or 0 divided?"
            )
    unused = [name for name, p in encoder.items() if p.grad is None or not bool(p.grad.any())]
    if encoder and len(unused) == len(encoder):
        raise WrongError("No gradient reaches the encoder. Is its output detached?")
    aside = f" Without gradient: {_some(unused)}." if unused else ""
    # Only the encoder's weights: training the classifiers alone would lower the loss of any encoder.
    trained = [(p, p.detach().clone(), p.grad) for p in encoder.values() or model.parameters()]
    for lr in (1e-3, 1e-5):  # steps like Adam's first; the smaller one for encoders that 1e-3 is too much for
        with torch.no_grad():
            for p, start, grad in trained:
                p.copy_(start if grad is None else start - lr * grad.sign())
        if (after := subject.loss(model)) < first:
            return f"One step of {lr:g} lowers the loss from {first:.5f} to {after:.5f}.{aside}"
    raise WrongError(f"One step raises the loss from {first:.5f} to {after:.5f}. Are gradients those of forward?")


def compiled(subject: Subject) -> str:
    """Compare a compiled member with a plain one."""
    ids = subject.ids(3, subject.longest)
    with torch.no_grad():
        got = torch.compile(duplicate(subject.moved[0]))(ids)
    if (error := difference(subject.real(got, ids), subject.real(subject.call(ids), ids))) > 10 * subject.tolerance:
        raise WrongError(f"The compiled module's outputs differ by {error:.1%}.")
    return "torch.compile gives the same outputs."


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


Checks = dict[str, Callable[[Subject], str]]
# In the order in which they run. If a basic check fails, none of the later ones is tried; the comparing ones need
# outputs that repeat.
BASIC: Checks = {"factory": factory, "contract": contract}
LATER: Checks = {
    "mask token": mask_token,
    "dropout": dropout,
    "padding": padding,
    "rows": rows,
    "causality": causality,
    "seeds": seeds,
    "ties": ties,
    "loop": loop,
    "vmap": vmap,
    "state_dict": state_dict,
    "training": training,
    "compile": compiled,
}
COMPARING = {"padding", "rows", "causality", "loop", "vmap", "state_dict", "compile"}
