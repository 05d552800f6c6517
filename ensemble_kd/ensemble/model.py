"""``EnsembleKD``: any sequence encoder, n times, as one recommender whose members teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ensemble_kd.data import Vocabulary
from ensemble_kd.distributed import Place
from ensemble_kd.ensemble.classifier import check_tie
from ensemble_kd.ensemble.contract import (
    Attributes,
    check_attributes,
    check_causal,
    check_ids,
    check_lengths,
    check_not_scores,
    check_objective,
    check_vocabulary,
    probe,
)
from ensemble_kd.ensemble.defaults import check_losses, default_losses, default_objective
from ensemble_kd.ensemble.item_loss import ItemLoss, Mutual
from ensemble_kd.ensemble.mixing import check_outputs, check_places, common_sizes
from ensemble_kd.ensemble.packing import Packed, pack
from ensemble_kd.ensemble.scoring import Scoring
from ensemble_kd.ensemble.step import Step, training_step
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import generator as check_generator
from ensemble_kd.internal import whole
from ensemble_kd.losses import Loss
from ensemble_kd.objectives import Objective
from ensemble_kd.stacking import Backend, Factories, Heads, build_members, check_modules, duplicate, factories_of, stack

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

GROUP_FEATURES = 1 << 22  # (positions x d) per member that an accelerator computes in the time of a group's launches


class Options(TypedDict, total=False):
    """The keyword arguments of ``EnsembleKD``."""

    num_items: int | None
    objective: Objective | None
    losses: Loss | Literal[0] | None
    item_attributes: Attributes | None
    classifier: str
    max_len: int | None
    seed: int
    backend: Backend
    vocabulary: Vocabulary | None
    mesh: DeviceMesh | None


class EnsembleKD(Scoring):
    """An ensemble of n sequence encoders, trained together and recommending together (Du et al., SIGIR 2023).

    Args:
        encoder_fn: ``() -> nn.Module``, called once per member under its own seed. The module maps item_ids (b, l)
            int64, 0 = padding on the left, 1..v items, v + 1 the mask token, to hidden states (b, l, d), or (b, d) for
            the newest position alone. A list has one factory per member, and a mapping counts by factory; members of
            one architecture are then stacked together, and those of other widths d join with columns of zeros.
        n: number of members; default: 3, or as many as ``encoder_fn`` has factories.
        num_items: v; may be left out if the encoder has ``.num_items``.
        objective: ``MaskedItem(...)``, ``NextItem(...)`` or an ``Objective`` of your own. Default: ``NextItem()`` if
            the encoder has ``causal = True`` or returns (b, d), else ``MaskedItem()``.
        losses: a weighted sum of ``AP``, ``ICL``, ``CCL``, ``KD``, or 0 for the objective alone.
            Default: ``default_losses``, with AP if ``item_attributes`` are given, and CCL if all d are equal.
        item_attributes: the attributes of each item, for AP.
        classifier: "linear" (Eq. 5), or "tied" to the encoder's ``item_embedding``, or the dotted path of the
            embedding to tie to. This has v + 2 rows, or v + 1 if the objective shows no mask token.
        max_len: longest input that the encoder reads; may be left out if the encoder has ``.max_len`` or reads any.
        seed: of the members' initial weights. The global random state is left as it was.
        backend: "auto", "vmap" or "loop", see ``StackedModule``.
        vocabulary: the source's own ids of the items, as ``data.vocabulary``. ``fit`` takes it from its data if there
            is none, ``export.save`` keeps it, and ``ensemble_kd.recommending`` answers with it.
        mesh: of all processes of ``torch.distributed``, with a dimension "member", over which members are spread, or
            "data", over which the rows of batches are, or both. A process then has the weights of n / (its size)
            members, equal to those of a single process. ``parameters``, ``state_dict``, ``hidden`` and
            ``query_states`` are of these members. Scores and recommendations are of all, and all processes call for
            them together.

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
        encoder_fn: Factories,
        n: int | None = None,
        *,
        num_items: int | None = None,
        objective: Objective | None = None,
        losses: Loss | Literal[0] | None = None,
        item_attributes: Attributes | None = None,
        classifier: str = "linear",
        max_len: int | None = None,
        seed: int = 0,
        backend: Backend = "auto",
        vocabulary: Vocabulary | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        self.place = Place.of(mesh)
        factories = factories_of(encoder_fn, n)
        members = build_members(factories, seed=seed, own=self.place.own_members)
        self.num_items, self.max_len = common_sizes(members, num_items=num_items, max_len=max_len)
        check_vocabulary(vocabulary, self.num_items)
        self.seed, self.classifier, self.vocabulary = seed, classifier, vocabulary
        one_factory = callable(encoder_fn)
        if not one_factory:
            check_places(members, self.place)
        self.encoder = stack(members, backend=backend, mixed=not one_factory)
        kinds, groups = self.encoder.kinds, self.encoder.groups
        outs = [probe(group, max_len=self.max_len, highest=self.num_items) for group in groups]
        check_outputs(outs, kinds)
        self.widths, self.newest_only = tuple(outs[kind].shape[-1] for kind in kinds), outs[0].ndim == 2
        self.hidden_size = max(self.widths)
        self.objective = default_objective(members, newest_only=self.newest_only) if objective is None else objective
        check_objective(self.objective, num_items=self.num_items, newest_only=self.newest_only)
        for group, out in zip(groups, outs, strict=True):
            check_not_scores(group, d=out.shape[-1], num_items=self.num_items)
            if self.objective.needs_causal and not self.newest_only:
                check_causal(group, max_len=self.max_len, num_items=self.num_items)
            if not self.objective.views_are_unmasked:
                probe(group, max_len=self.max_len, highest=self.mask_token)
        check_attributes(item_attributes, self.num_items)
        self.item_attributes = item_attributes
        table = None if item_attributes is None else item_attributes.table.to(outs[0].device)
        self.register_buffer("attribute_table", table, persistent=False)
        usual = default_losses(with_attributes=item_attributes is not None, with_ccl=len(set(self.widths)) == 1)
        losses = usual if losses is None else losses
        # Here, too: torch registers a module that is assigned without a call of the setter.
        check_losses(losses, with_attributes=item_attributes is not None, widths=self.widths)
        self.losses = losses
        self.tied_name = check_tie(self.encoder, classifier, self.objective, self.num_items, self.widths)
        first = self.place.own_members(len(factories)).start
        heads = partial(Heads, len(members), d=self.widths, seed=seed, like=outs[0], first=first)
        self.item_classifier = heads(classes=self.num_items, stream=1, tied=self.tied_name is not None)
        self.start_uniform(len(members), self.item_classifier.bias)
        if item_attributes is not None:
            self.attribute_classifier = heads(classes=item_attributes.num_attributes, stream=2, tied=False)

    @classmethod
    def from_members(cls, members: Sequence[nn.Module], **options: Unpack[Options]) -> EnsembleKD:
        """Return an ensemble of encoders that exist already, of one architecture or several, such as pretrained ones.

        Args:
            members: the encoders. They are copied, and stay as they are.
            **options: the keyword arguments of ``EnsembleKD``.

        Raises:
            EnsembleKDError: as ``EnsembleKD``.

        Examples:
            >>> from ensemble_kd.encoders import SASRec
            >>> len(EnsembleKD.from_members([SASRec(5, d_model=4, max_len=10) for _ in range(4)]))
            4
        """
        check_modules(members, where="from_members")  # of the originals, since copies share nothing
        return cls([partial(duplicate, member) for member in members], **options)

    @property
    def losses(self) -> Loss | Literal[0]:
        """The auxiliary losses; they may be set anew between steps."""
        return self._losses

    @losses.setter
    def losses(self, losses: Loss | Literal[0]) -> None:
        check_losses(losses, with_attributes=self.item_attributes is not None, widths=self.widths)
        self._losses = losses

    def __len__(self) -> int:
        return len(self.encoder) * self.place.member_size

    def extra_repr(self) -> str:
        """Return what ``repr`` shows of the ensemble."""
        chosen = ", ".join(f"{where}: {what}" for where, what in self.backend.items())
        return (
            f"n={len(self)}, num_items={self.num_items}, objective={self.objective!r}, losses={self.losses!r}, "
            f"classifier={self.classifier!r}, backend={self.encoder.requested_backend!r} [{chosen or 'undecided'}]"
        )

    @property
    def backend(self) -> dict[str, str]:
        """The backend that runs the members and its reason, per mode and device that was in use so far.

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

    def states(
        self,
        item_ids: Tensor,
        *,
        by_length: bool,
        training: bool | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Packed:
        """Return the hidden states of k copies of b sequences, (k, b, l), without checks of the ids.

        Args:
            item_ids: (k, b, l) int64, left-padded with 0.
            by_length: encode rows of similar length together, unless BatchNorm makes rows depend on others or the host
                would have to ask an accelerator for the lengths.
            training: the mode of the call; None: the model's own.
            lengths: (b,) the real positions of each sequence, if the host knows them.
        """
        mixes, on_host = self.encoder.mixes_rows and training is not False, item_ids.device.type == "cpu"
        return pack(
            partial(self.encode, training=training),
            item_ids,
            by_length=by_length and not mixes and (on_host or lengths is not None),
            lengths=None if on_host else lengths,
            worth=0 if on_host else GROUP_FEATURES // self.hidden_size,
        )

    def loss(
        self,
        item_ids: Tensor,
        *,
        generator: torch.Generator | None = None,
        validate: bool = True,
        by_length: bool = False,
        place: Place | None = None,
        item_loss: ItemLoss | None = None,
        share: float | Tensor = 1.0,
        lengths: Sequence[int] | None = None,
    ) -> Step:
        """Return the training loss of a batch, Eq. 19.

        Args:
            item_ids: (b, l) int64 sequences, left-padded with 0.
            generator: draws the masks, on the device of ``item_ids``; None: torch's global one.
            validate: check the ids. An accelerator has to report to the host for it, so a loop that has checked its
                data once, as ``fit`` does, switches it off.
            by_length: encode rows of similar length together, so that little padding is computed. The loss is the same
                but for rounding and the draws of dropout. Encoders with BatchNorm, whose rows depend on each other,
                take the batch as it is. So does an accelerator without ``lengths``; with them it forms only groups
                that save more time than their launches cost, as estimated.
            place: this process among those with other rows of the batch or other members; None: ``model.place``.
            item_loss: how wrong the item predictions are, and from whom the members learn; None: ``Mutual()``, from
                each other.
            share: of the weights of ICL, CCL and KD, for a schedule; a term of weight 0 is not computed. A tensor () on
                an accelerator is not read, so that a graph of the step can be repeated with another share.
            lengths: (b,) the number of items of each row, for an accelerator, which would have to report it. With them
                it computes the logits of real targets alone. ``BatchPlan.lengths`` has them. Checked if ``validate``.

        Returns:
            ``Step(total, terms)``: ``total`` is differentiable, ``terms`` are detached and unweighted. If other
            processes have other rows of the batch, the *mean* of the processes' gradients of ``total`` is the whole
            batch's, as ``DistributedDataParallel`` takes it, and ``terms`` are the whole batch's.

        Raises:
            EnsembleKDError: ids of a wrong shape, type or range; a contrastive loss with fewer than two sequences.
        """
        if validate:
            check_generator("loss", generator)
            check_ids("loss", item_ids, highest=self.num_items, at_least=self.objective.min_items)
            check_lengths("loss", item_ids, lengths)
            if item_ids.device != self.device:
                fix = "Move them: item_ids.to(model.device)."
                raise EnsembleKDError("loss", f"item_ids on {self.device}, as the model", item_ids.device, fix)
        return training_step(
            self,
            item_ids,
            generator=generator,
            by_length=by_length,
            place=self.place if place is None else place,
            item_loss=Mutual() if item_loss is None else item_loss,
            share=share,
            lengths=lengths,
        )

    def sparse_tables(self) -> list[str]:
        """Return the names of the parameters that get sparse gradients, because the objective samples its negatives.

        Examples:
            >>> from ensemble_kd import NextItem
            >>> from ensemble_kd.encoders import SASRec
            >>> factory = lambda: SASRec(100, d_model=4, max_len=5)
            >>> EnsembleKD(factory, n=2).sparse_tables()
            []
            >>> EnsembleKD(factory, n=2, objective=NextItem(negatives=4)).sparse_tables()
            ['encoder.item_embedding.weight', 'item_classifier.weight', 'item_classifier.bias']
        """
        if self.objective.negatives is None:
            return []
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return [name for name, p in trained.items() if p.ndim > 1 and p.shape[1] >= self.num_items]

    def member(self, i: int) -> EnsembleKD:
        """Return member i alone, with a copy of its weights: an ``EnsembleKD`` of one, a module that scores by itself.

        Raises:
            EnsembleKDError: there is no such member, or another process has it.
        """
        i = whole("member", "i", i)
        i += len(self) * (-len(self) <= i < 0)
        own = self.place.own_members(len(self))
        if self.place.member is not None and i not in own:
            fix = "Ask the process that has it, or load the weights of all in one process."
            raise EnsembleKDError("member", f"a member in {own.start}..{own.stop - 1}, held here", i, fix)
        i -= own.start
        alone = EnsembleKD.from_members(
            [self.encoder.member(i)],
            num_items=self.num_items,
            objective=self.objective,
            losses=self.losses,
            item_attributes=self.item_attributes,
            classifier=self.classifier,
            max_len=self.max_len,
            seed=self.seed,
            backend=self.encoder.requested_backend,
            vocabulary=self.vocabulary,
        )
        alone.item_classifier = self.item_classifier.member(i)
        if self.item_attributes is not None:
            alone.attribute_classifier = self.attribute_classifier.member(i)
        if self.is_weighted:
            alone.weigh([1.0], self.temperatures[i : i + 1])
        return alone.train(self.training)
