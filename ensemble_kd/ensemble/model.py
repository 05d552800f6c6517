"""``EnsembleKD``: any sequence encoder, n times, as one recommender whose members teach each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ensemble_kd import functional as ekd
from ensemble_kd import serving
from ensemble_kd.distributed import Ranks
from ensemble_kd.ensemble.contract import (
    Attributes,
    check_attributes,
    check_ids,
    check_output,
    positive,
    probe,
)
from ensemble_kd.ensemble.packing import Packed, pack
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.losses import (
    AP,
    CCL,
    ICL,
    KD,
    ItemLosses,
    Loss,
    LossName,
    Spread,
    attribute_losses,
    item_losses,
    sampled_item_losses,
    terms_by_name,
)
from ensemble_kd.losses.sampled import Candidates
from ensemble_kd.objectives import (
    Draw,
    MaskedItem,
    NextItem,
    Objective,
    selects,
)
from ensemble_kd.serving import Aggregate, Recommendations, Uncertainty
from ensemble_kd.stacking import (
    Backend,
    Heads,
    StackedModule,
    build_members,
    check_members,
    duplicate,
    inner_rows,
    share_table,
    sparse_lookups,
    take_rows,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Step(NamedTuple):
    """The losses of one training step."""

    total: Tensor  # () what to call backward() on
    terms: dict[str, Tensor]  # each term by its key, () detached and unweighted, for reports


class EnsembleKD(nn.Module):
    """An ensemble of n sequence encoders, trained together and recommending together (Du et al., SIGIR 2023).

    Args:
        encoder_fn: ``() -> nn.Module``, called once per member under its own seed. The module maps item_ids (b, l)
            int64, 0 = padding on the left, 1..v items, v + 1 the mask token, to hidden states (b, l, d), or (b, d) for
            the newest position alone.
        n: number of members.
        num_items: v; may be left out where the encoder has ``.num_items``.
        objective: ``MaskedItem(...)`` or ``NextItem(...)``. Default: ``NextItem()`` where the encoder says
            ``causal = True`` or returns (b, d), else ``MaskedItem()``.
        losses: a weighted sum of ``AP``, ``ICL``, ``CCL``, ``KD``, or 0 for the objective alone.
            Default: ``default_losses``, with AP where ``item_attributes`` are given.
        item_attributes: which attributes each item has, for AP.
        classifier: "linear" (Eq. 5), or "tied" to the encoder's ``item_embedding``, or the dotted path of the
            embedding to tie to.
        max_len: longest input that the encoder reads; may be left out where the encoder has ``.max_len`` or reads any.
        seed: of the members' initial weights. The global random state is left as it was.
        backend: "auto", "vmap" or "loop", see ``StackedModule``.
        mesh: of all processes of ``torch.distributed``, with a dimension "member", over which members are spread, or
            "data", over which the rows of batches are, or both. A process then has the weights of n / (its size)
            members, the same as in one process, and ``parameters``, ``state_dict``, ``hidden`` and ``query_states``
            are of these; scores and recommendations are of all, and all processes ask for them together.

    Shapes:
        item_ids (b, l) int64 -> scores (b, num_items + 1), column 0 (padding) is -inf: mean of the members' logits for
        the next item, Eq. 20.

    Raises:
        EnsembleKDError: for any argument, encoder or batch that cannot be used; it says what to do.

    Examples:
        >>> from ensemble_kd.encoders import BERT4Rec
        >>> model = EnsembleKD(lambda: BERT4Rec(100, d_model=8, max_len=10), n=3, seed=0)
        >>> item_ids = torch.tensor([[0, 0, 3, 7, 9], [4, 8, 15, 16, 23]])
        >>> step = model.loss(item_ids)
        >>> step.total.backward()
        >>> list(step.terms), model(item_ids).shape
        (['mip', 'kd', 'icl', 'ccl'], torch.Size([2, 101]))
    """

    attribute_table: Tensor | None

    def __init__(
        self,
        encoder_fn: Callable[[], nn.Module],
        n: int = 3,
        *,
        num_items: int | None = None,
        objective: Objective | None = None,
        losses: Loss | Literal[0] | None = None,
        item_attributes: Attributes | None = None,
        classifier: str = "linear",
        max_len: int | None = None,
        seed: int = 0,
        backend: Backend = "auto",
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        ranks = Ranks.of(mesh)
        self._build(
            build_members(encoder_fn, n, seed=seed, own=ranks.own_members),
            num_items=num_items,
            objective=objective,
            losses=losses,
            item_attributes=item_attributes,
            classifier=classifier,
            max_len=max_len,
            seed=seed,
            backend=backend,
            ranks=ranks,
        )

    @classmethod
    def from_members(
        cls,
        members: Sequence[nn.Module],
        *,
        num_items: int | None = None,
        objective: Objective | None = None,
        losses: Loss | Literal[0] | None = None,
        item_attributes: Attributes | None = None,
        classifier: str = "linear",
        max_len: int | None = None,
        seed: int = 0,
        backend: Backend = "auto",
        mesh: DeviceMesh | None = None,
    ) -> EnsembleKD:
        """An ensemble of encoders that exist already, pretrained ones say; arguments as for ``EnsembleKD``.

        The modules are copied, and stay as they are.
        """
        check_members(members, where="from_members")  # of the originals, since copies share nothing
        model, ranks = cls.__new__(cls), Ranks.of(mesh)
        nn.Module.__init__(model)
        model._build(
            [duplicate(members[i]) for i in ranks.own_members(len(members))],
            num_items=num_items,
            objective=objective,
            losses=losses,
            item_attributes=item_attributes,
            classifier=classifier,
            max_len=max_len,
            seed=seed,
            backend=backend,
            ranks=ranks,
        )
        return model

    def _build(
        self,
        members: list[nn.Module],
        *,
        num_items: int | None,
        objective: Objective | None,
        losses: Loss | Literal[0] | None,
        item_attributes: Attributes | None,
        classifier: str,
        max_len: int | None,
        seed: int,
        backend: Backend,
        ranks: Ranks,
    ) -> None:
        first = members[0]
        self.ranks = ranks
        self.num_items = positive(
            "num_items", num_items if num_items is not None else getattr(first, "num_items", None)
        )
        length = max_len if max_len is not None else getattr(first, "max_len", None)
        self.max_len = None if length is None else positive("max_len", length)
        causal = bool(getattr(first, "causal", False))
        self.encoder = StackedModule(members, backend=backend)
        out = probe(self.encoder, max_len=self.max_len, highest=self.num_items)
        self.hidden_size, self.newest_only = out.shape[-1], out.ndim == 2
        default: Objective = NextItem() if causal or self.newest_only else MaskedItem()
        self.objective = default if objective is None else objective
        if isinstance(self.objective, type) or not callable(getattr(self.objective, "draw", None)):
            fix = "Pass one, such as objective=NextItem()."
            raise EnsembleKDError("objective", "MaskedItem(...) or NextItem(...)", repr(objective), fix)
        negatives = self.objective.negatives if isinstance(self.objective, MaskedItem | NextItem) else None
        if negatives is not None and negatives > self.num_items:
            expected, fix = f"1 <= negatives <= {self.num_items} (num_items)", "Pass None for the full softmax."
            raise EnsembleKDError("objective", expected, negatives, fix)
        if self.newest_only and isinstance(self.objective, MaskedItem):
            self.objective.draw(torch.ones(1, 1, dtype=torch.long), mask_token=2, newest_only=True)
        if not self.objective.views_are_unmasked:
            probe(self.encoder, max_len=self.max_len, highest=self.mask_token)
        check_attributes(item_attributes, self.num_items)
        self.num_attributes = 0 if item_attributes is None else item_attributes.num_attributes
        table = None if item_attributes is None else item_attributes.table.to(out.device)
        self.register_buffer("attribute_table", table, persistent=False)
        self.losses = default_losses(with_attributes=item_attributes is not None) if losses is None else losses
        self.classifier = classifier
        n, d, tied = len(self.encoder), self.hidden_size, classifier != "linear"
        if tied:
            self._check_tie(d)
        heads = partial(Heads, n, d=d, seed=seed, like=out, first=ranks.own_members(len(self)).start)
        self.item_classifier = heads(classes=self.num_items, stream=1, tied=tied)
        if self.num_attributes:
            self.attribute_classifier = heads(classes=self.num_attributes, stream=2, tied=False)

    def _check_tie(self, d: int) -> None:
        where, fix = "classifier", 'Use classifier="linear", "tied", or the dotted path of the item embedding.'
        self._tied_name = f"{'item_embedding' if self.classifier == 'tied' else self.classifier}.weight"
        shapes = {name: tuple(p.shape[1:]) for name, p in self.encoder.named_parameters(remove_duplicate=False)}
        if self._tied_name not in shapes:
            raise EnsembleKDError(where, "'linear', 'tied' or the path of an embedding", repr(self.classifier), fix)
        if shapes[self._tied_name] != (self.num_items + 2, d):
            expected = f"an embedding of shape {(self.num_items + 2, d)}"
            raise EnsembleKDError(where, expected, f"{self._tied_name} of shape {shapes[self._tied_name]}", fix)

    @property
    def losses(self) -> Loss | Literal[0]:
        """The auxiliary losses; may be set anew between steps, to change weights on a schedule."""
        return self._losses

    @losses.setter
    def losses(self, losses: Loss | Literal[0]) -> None:
        named = terms_by_name(losses)
        if "ap" in named and not self.num_attributes:
            fix = "Pass item_attributes, or leave AP out of losses."
            raise EnsembleKDError("losses", "item_attributes, which AP needs", "none", fix)
        icl, ccl = named.get("icl"), named.get("ccl")
        self._one_contrast = bool(icl and ccl) and vars(icl[1]) == vars(ccl[1])  # type: ignore[index]
        self._losses, self._terms = losses, named

    @property
    def mask_token(self) -> int:
        """The id of [mask], v + 1."""
        return self.num_items + 1

    def __len__(self) -> int:
        return len(self.encoder) * self.ranks.member_size

    def _told(self) -> dict[str, str]:
        """What else has to be the same for a run to go on, by name; for subclasses."""
        return {}

    def extra_repr(self) -> str:
        """What ``repr`` shows of the ensemble."""
        chosen = ", ".join(f"{where}: {what}" for where, what in self.backend.items())
        return (
            f"n={len(self)}, num_items={self.num_items}, objective={self.objective!r}, losses={self.losses!r}, "
            f"classifier={self.classifier!r}, backend={self.encoder.requested_backend!r} [{chosen or 'undecided'}]"
        )

    @property
    def backend(self) -> dict[str, str]:
        """The backend that runs the members and why, for each mode and device that was in use so far.

        Examples:
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
            >>> _ = model(torch.tensor([[1, 2, 3]]))
            >>> model.backend
            {'train on cpu': 'loop (on a CPU the loop is faster than vmap)'}
        """
        return {
            f"{'train' if mode else 'eval'} on {device}": f"{name} ({why})"
            for (mode, device), (name, why) in self.encoder.decisions.items()
        }

    def classifier_weights(self) -> tuple[Tensor, Tensor]:
        """W (n, v, d) and b (n, v) of Eq. 5; row j scores item j + 1."""
        own = self.item_classifier.weight
        if own is not None:
            return own, self.item_classifier.bias
        return inner_rows(self._tied_embedding()).to(self.item_classifier.bias.dtype), self.item_classifier.bias

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.item_classifier.bias.device

    def hidden(self, item_ids: Tensor) -> Tensor:
        """Hidden states of every member: (b, l) -> (n, b, l, d), or (n, b, d)."""
        check_ids("hidden", item_ids, highest=self.mask_token)
        return self._encode(item_ids)

    def _encode(self, item_ids: Tensor) -> Tensor:
        if self.ranks.sharded and hasattr(self.item_classifier.bias, "full_tensor"):
            fix = "Use it within `with ensemble_kd.distributed.gathered(model):`."
            raise EnsembleKDError("EnsembleKD", "a model with all its weights here", "weights in shards", fix)
        out: Tensor = self.encoder(item_ids)
        check_output(out, item_ids, newest_only=self.newest_only)
        return out

    def _pack(self, item_ids: Tensor, *, by_length: bool) -> Packed:
        """Hidden states of k copies of sequences (k, b, l); by length where the host sees lengths and rows are free."""
        return pack(
            self._encode,
            item_ids,
            by_length=by_length and item_ids.device.type == "cpu" and not self.encoder.mixes_rows,
        )

    def loss(
        self,
        item_ids: Tensor,
        *,
        generator: torch.Generator | None = None,
        validate: bool = True,
        by_length: bool = False,
    ) -> Step:
        """The training loss of a batch, Eq. 19.

        Args:
            item_ids: (b, l) int64 sequences, left-padded with 0.
            generator: draws the masks, on the device of ``item_ids``; None: torch's global one.
            validate: check the ids. It makes an accelerator report to the host, so a loop that has checked its data
                once, as ``fit`` does, switches it off.
            by_length: on a CPU, encode rows of similar length together, so that little padding is computed; the loss is
                the same but for rounding and the draws of dropout. Encoders with BatchNorm, whose rows depend on each
                other, take the batch as it is.

        Returns:
            ``Step(total, terms)``: ``total`` is differentiable, ``terms`` are detached and unweighted. Where ``ranks``
            has other processes hold other rows of the batch, ``total`` is such that the *mean* of the processes'
            gradients is the whole batch's, as ``DistributedDataParallel`` takes it, and ``terms`` are the whole's.

        Raises:
            EnsembleKDError: ids of a wrong shape, type or range; a contrastive loss with fewer than two sequences.
        """
        if validate:
            at_least = 2 if isinstance(self.objective, NextItem) else 1
            check_ids("loss", item_ids, highest=self.num_items, at_least=at_least)
        generator = self.ranks.same_draws(generator, item_ids.device)
        draw = self.objective.draw(
            item_ids, mask_token=self.mask_token, newest_only=self.newest_only, generator=generator
        )
        named, m = self._terms, self.objective.views
        anchored = any("anchor" in term.needs for _, term in named.values())
        # Where views are unmasked and nothing contrasts them with the anchor, view 0 is the anchor.
        separate = anchored and not (self.objective.views_are_unmasked and not {"icl", "ccl"} & named.keys())
        with self._step_classifier(draw) as classifier:
            copies = torch.cat([draw.inputs, draw.anchor[None]]) if separate else draw.inputs
            hidden = self._pack(copies, by_length=by_length)
        views, anchor = hidden.copies(slice(m)), hidden.copies(slice(m, None) if separate else slice(1))
        product_dtype = _product_dtype(hidden.flat)
        with torch.autocast(item_ids.device.type, enabled=False):
            return self._losses_of(draw, views, anchor, classifier, product_dtype=product_dtype)

    @contextmanager
    def _step_classifier(self, draw: Draw) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights and bias of the classes that a step scores; within, look-ups do what is cheapest beside them."""
        at_least = self.num_items + 2
        if self.ranks.sharded:  # gradients are averaged in shards, which are dense
            weight, bias = self.classifier_weights()
            rows = slice(None) if draw.candidates is None else draw.candidates.items - 1
            yield weight[:, rows], bias[:, rows]
        elif draw.candidates is not None:
            with sparse_lookups(self.encoder, at_least=at_least):
                yield self._candidate_weights(draw.candidates)
        elif self.classifier != "linear" and draw.inputs.device.type == "cpu":
            # The classifier's gradient is dense anyway: the look-ups' few rows are added to it, in place of a second
            # table that is filled, stacked and added.
            embedding = self._tied_embedding()
            lookups, weight = share_table(embedding)
            with sparse_lookups(self.encoder, at_least=at_least, shared=(embedding, lookups)):
                yield weight.to(self.item_classifier.bias.dtype), self.item_classifier.bias
        else:
            yield self.classifier_weights()

    def _losses_of(
        self,
        draw: Draw,
        views: Packed,
        anchor: Packed,
        classifier: tuple[Tensor, Tensor],
        *,
        product_dtype: torch.dtype,
    ) -> Step:
        named, m = self._terms, self.objective.views
        main = self._item_losses(draw, views.at(draw.positions), classifier, product_dtype)
        shares = self._shares(draw, main.total.dtype)
        if shares is not None:
            main = ItemLosses(*(shares[0] * part for part in main))
        total, terms = main.total, {self.objective.name: m * main.cross_entropy.sum()}
        if "kd" in named:
            terms["kd"] = m * main.kd
        if "ap" in named:
            value = self._attribute_loss(draw, anchor, product_dtype)
            value = value if shares is None else shares[1] * value
            total, terms["ap"] = total + named["ap"][0] * value, value.detach()
        for name, value in self._contrastive_losses(views, anchor).items():
            # All processes have computed it, with the members of all: their sum is to hold it once.
            total, terms[name] = total + named[name][0] * value, value.detach() / self.ranks.member_size
        return Step(total, self.ranks.reduced(terms))

    def _shares(self, draw: Draw, dtype: torch.dtype) -> Tensor | None:
        """What this process's means over targets and over attributed positions count, where others hold other rows."""
        if self.ranks.data is None:
            return None
        targets = len(draw.targets) if draw.valid is None else draw.valid.sum()
        return self.ranks.shares(targets, (draw.anchor_items != 0).sum()).to(dtype)

    def _item_losses(
        self, draw: Draw, hidden: Tensor, classifier: tuple[Tensor, Tensor], product_dtype: torch.dtype
    ) -> ItemLosses:
        (weight, bias), m = classifier, self.objective.views
        kd_weight, kd = self._terms.get("kd", (0.0, KD()))
        assert isinstance(kd, KD)
        # Every view has equally many targets, so a sum over views of means is m times the mean over all.
        options: dict[str, Any] = {
            "valid": draw.valid,
            "ce_weight": float(m),
            "kd_weight": kd_weight * m,
            "temperature": kd.temperature,
            "scale_by_temperature_squared": kd.scale_by_temperature_squared,
            "product_dtype": product_dtype,
            "spread": Spread(len(self), self.ranks.sum_members_) if self.ranks.member is not None else None,
        }
        if draw.candidates is None:
            return item_losses(hidden.to(weight.dtype), weight, bias, draw.targets - 1, **options)
        return sampled_item_losses(hidden.to(weight.dtype), weight, bias, draw.candidates, **options)

    def _candidate_weights(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """The candidates' rows of ``classifier_weights()``, whose gradients are sparse."""
        own, bias, classes = self.item_classifier.weight, self.item_classifier.bias, candidates.items - 1
        if own is not None:
            return take_rows(own, classes), take_rows(bias, classes)
        return take_rows(self._tied_embedding(), candidates.items).to(bias.dtype), take_rows(bias, classes)

    def _tied_embedding(self) -> Tensor:
        """The item embeddings that the classifier is tied to, (n, v + 2, d)."""
        embedding = self.encoder.stacked_parameter(self._tied_name)
        assert embedding is not None
        return embedding

    def _attribute_loss(self, draw: Draw, anchor: Packed, product_dtype: torch.dtype) -> Tensor:
        assert self.attribute_table is not None
        items = draw.anchor_items.flatten()
        real = items != 0
        if selects(items):
            kept = real.nonzero()[:, 0]
            states, items, real = anchor.at(kept), items[kept], real[kept]
        else:
            states = anchor.flat
        weight, bias = self.attribute_classifier.weight, self.attribute_classifier.bias
        assert weight is not None
        return attribute_losses(
            states, weight, bias, self.attribute_table[items], real, product_dtype=product_dtype
        ).sum()

    def _contrastive_losses(self, views: Packed, anchor: Packed) -> dict[LossName, Tensor]:
        values: dict[LossName, Tensor] = {}
        for name, (_, term) in self._terms.items():
            if name in values or not isinstance(term, ICL | CCL):
                continue
            if self.ranks.size > 1:
                both = torch.cat([anchor.pooled(term.pool), views.pooled(term.pool)], dim=1)
                both = self.ranks.gather_members(self.ranks.gather_rows(_at_least_float(both), dim=2))
                anchors, others = [both[:, 0]], [both[:, 1:]]
            else:
                anchors = [_at_least_float(group[:, 0]) for group in anchor.by_group(term.pool)]
                others = [_at_least_float(group) for group in views.by_group(term.pool)]
            found = ekd.contrast(anchors, others, temperature=term.temperature, variant=term.variant)
            values[name] = found.icl if name == "icl" else found.ccl
            if self._one_contrast:
                values["icl"], values["ccl"] = found
        return values

    def member_scores(self, item_ids: Tensor) -> Tensor:
        """Each member's next-item logits: (b, l) -> (n, b, num_items + 1), column 0 is -inf."""
        newest = self._newest_hidden("member_scores", item_ids)
        weight, bias = self.classifier_weights()
        with torch.autocast(newest.device.type, enabled=False):
            logits = newest.new_empty(*newest.shape[:2], self.num_items + 1)
            logits[..., 0] = -torch.inf
            logits[..., 1:] = torch.baddbmm(bias[:, None], newest, weight.mT)
        return self.ranks.gather_members(logits)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Mean of the members' next-item logits, Eq. 20: (b, l) -> (b, num_items + 1), column 0 is -inf."""
        newest = self._newest_hidden("forward", item_ids)
        weight, bias = self.classifier_weights()
        with torch.autocast(newest.device.type, enabled=False):
            # The mean of n inner products is one product of concatenated vectors; member by member it needs no copy.
            mean = bias.mean(dim=0).expand(newest.shape[1], -1)
            for h, w in zip(newest / len(weight), weight, strict=True):
                mean = torch.addmm(mean, h, w.mT)
            mean = self.ranks.mean_members(mean)
            return nn.functional.pad(mean, (1, 0), value=-torch.inf)

    def query_states(self, item_ids: Tensor) -> Tensor:
        """What each member scores the next item by, as a product with W of Eq. 5: (b, l) -> (n, b, d)."""
        return self._newest_hidden("query_states", item_ids)

    def _newest_hidden(self, where: str, item_ids: Tensor) -> Tensor:
        check_ids(where, item_ids, highest=self.num_items)
        query = self.objective.query(item_ids, mask_token=self.mask_token, max_len=self.max_len)
        out = self._encode(query)
        return (out if self.newest_only else out[:, :, -1]).to(self.item_classifier.bias.dtype)

    @torch.no_grad()
    def recommend(
        self,
        item_ids: Tensor,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Tensor | None = None,
        aggregate: Aggregate = "logits",
    ) -> Recommendations:
        """The k best next items of each sequence, in evaluation mode, some sequences at a time.

        Args:
            item_ids: (b, l) int64 sequences, left-padded with 0; the encoder reads the newest of long ones.
            k: how many.
            exclude_seen: leave out the items of ``item_ids`` itself.
            candidates: (c,) or (b, c) int64 items to choose from, for all or for each; None: all.
            aggregate: what is averaged over members: "logits" (Eq. 20), "probabilities" or "ranks".

        Examples:
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
            >>> items, scores = model.recommend(torch.tensor([[0, 1, 2, 3]]), k=2)
            >>> sorted(items[0].tolist())
            [4, 5]
        """
        states = self._serve("recommend", item_ids)
        seen = item_ids if exclude_seen else None
        with torch.autocast(states.device.type, enabled=False):
            return serving.top_items(
                states,
                *self.classifier_weights(),
                k=k,
                seen=seen,
                candidates=candidates,
                aggregate=aggregate,
                mean=self.ranks.mean_members,
            )

    @torch.no_grad()
    def query_vectors(self, item_ids: Tensor) -> Tensor:
        """One vector a sequence, (b, l) -> (b, n d + 1), whose inner products with ``item_vectors`` are the scores.

        Any index of maximum inner products serves the whole ensemble with them, exactly where the index is.

        Examples:
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2).eval()
            >>> ids = torch.tensor([[0, 1, 2, 3]])
            >>> torch.allclose(model.query_vectors(ids) @ model.item_vectors().T, model(ids)[:, 1:], atol=1e-6)
            True
        """
        return serving.query_vectors(self.ranks.gather_members(self._serve("query_vectors", item_ids)))

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """One vector an item, (num_items, n d + 1); row j is item j + 1's. See ``query_vectors``."""
        return serving.item_vectors(*map(self.ranks.gather_members, self.classifier_weights()))

    @torch.no_grad()
    def uncertainty(self, item_ids: Tensor, *, k: int = 10) -> Uncertainty:
        """Entropy, mutual information and disagreement about each sequence's next item: (b, l) -> three of (b,).

        Examples:
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(20, d_model=4, max_len=10), n=2)
            >>> found = model.uncertainty(torch.tensor([[0, 1, 2, 3]]))
            >>> bool(found.mutual_information <= found.entropy)
            True
        """
        states = self._serve("uncertainty", item_ids)
        with torch.autocast(states.device.type, enabled=False):
            return serving.uncertainty(states, *self.classifier_weights(), k=k, gather=self.ranks.gather_members)

    def _serve(self, where: str, item_ids: Tensor) -> Tensor:
        """The members' query states in evaluation mode."""
        training = self.training
        self.eval()
        try:
            return self._newest_hidden(where, item_ids)
        finally:
            self.train(training)

    def member(self, i: int) -> EnsembleKD:
        """Member i alone, with a copy of its weights: an ``EnsembleKD`` of one, a module that scores by itself.

        Raises:
            EnsembleKDError: there is no such member, or another process holds it.
        """
        own = self.ranks.own_members(len(self))
        if self.ranks.member is not None and i not in own:
            fix = "Ask the process that holds it, or load the weights of all in one process."
            raise EnsembleKDError("member", f"a member in {own.start}..{own.stop - 1}, held here", i, fix)
        i -= own.start
        alone = copy.copy(self)
        # Registries of its own, hooks among them: what is done to the member must not reach the ensemble.
        alone.__dict__.update({k: copy.copy(v) for k, v in self.__dict__.items() if isinstance(v, dict)})
        alone._parameters, alone._modules, alone.ranks = {}, {}, Ranks()
        alone.encoder = StackedModule([self.encoder.member(i)], backend=self.encoder.requested_backend)
        alone.item_classifier = self.item_classifier.member(i)
        if self.num_attributes:
            alone.attribute_classifier = self.attribute_classifier.member(i)
        return alone.train(self.training)


def default_losses(*, with_attributes: bool) -> Loss:
    """The losses that ``EnsembleKD`` uses where none are given: weights of the authors' code, but AP's.

    AP at weight 1 (the paper's) made networks on Beauty learn later and no better than at 0.2.

    Examples:
        >>> default_losses(with_attributes=False)
        0.01 * ICL(temperature=0.3) + 0.01 * CCL(temperature=0.3) + 0.001 * KD(temperature=0.3)
    """
    transfer = 0.01 * (ICL(temperature=0.3) + CCL(temperature=0.3)) + 0.001 * KD(temperature=0.3)
    return 0.2 * AP() + transfer if with_attributes else transfer


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The autocast type where autocast is on (a final LayerNorm returns float32 under it), else the hidden states'.

    Never float16, which has too little range for the gradients of logits.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return torch.float32 if dtype == torch.float16 else dtype
