"""Scores, recommendations and vectors of an ensemble: everything that a trained model is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape

import torch
from torch import Tensor, nn

from ensemble_kd import serving
from ensemble_kd.distributed import Place, gather_members, mean_members
from ensemble_kd.ensemble.classifier import whole_classifier
from ensemble_kd.ensemble.contract import check_ids, check_output
from ensemble_kd.ensemble.weights import Weighted
from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.internal import flag, in_turn, to_device
from ensemble_kd.objectives import Objective
from ensemble_kd.serving import Aggregate, Recommendations, Uncertainty
from ensemble_kd.stacking import Heads, MixedModule, StackedModule


class Scoring(Weighted):
    """The part of ``EnsembleKD`` that scores; its constructor sets the attributes."""

    encoder: StackedModule | MixedModule
    item_classifier: Heads
    objective: Objective
    place: Place
    num_items: int
    max_len: int | None
    widths: tuple[int, ...]  # d of each member that this process has
    hidden_size: int  # d of the widest; the hidden states of others are filled up with zeros
    newest_only: bool  # the encoder returns (b, d)
    tied_name: str | None  # of the parameter that the classifier is tied to; None: it has weights of its own

    @property
    def mask_token(self) -> int:
        """The id of [mask], v + 1."""
        return self.num_items + 1

    def _repr_html_(self) -> str:
        """Return what the ensemble is made of, for a notebook."""
        rows = {
            "members": str(len(self.item_classifier.bias)),
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
            "items": f"{self.num_items:,}",
            "objective": repr(self.objective),
            "losses": repr(self.losses),
            "device": str(self.device),
        }
        lines = (f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{''.join(lines)}</table>"

    def classifier_weights(self) -> tuple[Tensor, Tensor]:
        """Return W (n, v, d) and b (n, v) of Eq. 5; row j scores item j + 1."""
        return whole_classifier(self)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.item_classifier.bias.device

    def _is_spread(self) -> bool:
        return self.place.member is not None

    def hidden(self, item_ids: Tensor) -> Tensor:
        """Return the hidden states of every member: (b, l) -> (n, b, l, d), or (n, b, d)."""
        item_ids = self._checked("hidden", item_ids, highest=self.mask_token)
        return self.encode(item_ids)

    def encode(self, item_ids: Tensor, *, training: bool | None = None, newest: bool = False) -> Tensor:
        """Return the hidden states of every member without checks of the ids.

        Args:
            item_ids: (b, l).
            training: the mode of this call; None: the model's. The model itself is left as it is.
            newest: return those of the last position alone, (n, b, d).
        """
        if self.place.sharded and hasattr(self.item_classifier.bias, "full_tensor"):
            fix = "Use it within `with ensemble_kd.distributed.gathered(model):`."
            raise EnsembleKDError("EnsembleKD", "a model with all its weights here", "weights in shards", fix)
        is_short = newest and self.encoder.gives_newest and not self.newest_only
        run = self.encoder.newest if is_short else self.encoder
        out: Tensor = run(item_ids, training=training)
        check_output(out, item_ids, newest_only=self.newest_only or is_short)
        return out[:, :, -1] if newest and out.ndim == 4 else out

    def member_scores(self, item_ids: Tensor) -> Tensor:
        """Return each member's next-item logits: (b, l) -> (n, b, num_items + 1), column 0 is -inf."""
        item_ids = self._checked("member_scores", item_ids, highest=self.num_items)
        newest = self._newest(item_ids)
        weight, bias = self.classifier_weights()
        with torch.autocast(newest.device.type, enabled=False):
            logits = newest.new_empty(*newest.shape[:2], self.num_items + 1)
            logits[..., 0] = -torch.inf
            logits[..., 1:] = torch.baddbmm(bias[:, None], newest, weight.mT)
        return gather_members(logits, self.place)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Return the mean of the members' next-item logits, Eq. 20: (b, l) -> (b, num_items + 1), column 0 is -inf.

        Members count by ``weights`` / ``temperatures``, see ``weigh``.
        """
        item_ids = self._checked("forward", item_ids, highest=self.num_items)
        newest = self._newest(item_ids)
        weight, bias = self.classifier_weights()
        with torch.autocast(newest.device.type, enabled=False):
            mean = mean_members(serving.mean_logits(newest, weight, bias, self.factors), self.place)
            return nn.functional.pad(mean, (1, 0), value=-torch.inf)

    def query_states(self, item_ids: Tensor, *, training: bool | None = None) -> Tensor:
        """Return the states whose product with W of Eq. 5 gives each member's scores: (b, l) -> (n, b, d).

        Args:
            item_ids: (b, l) int64 sequences, left-padded with 0.
            training: the mode of the call; None: the model's own.
        """
        item_ids = self._checked("query_states", item_ids, highest=self.num_items)
        return self._newest(item_ids, training=training)

    def _newest(self, item_ids: Tensor, *, training: bool | None = None) -> Tensor:
        query = self.objective.query(item_ids, mask_token=self.mask_token, max_len=self.max_len)
        return self.encode(query, training=training, newest=True).to(self.item_classifier.bias.dtype)

    @in_turn
    @torch.no_grad()
    def recommend(
        self,
        item_ids: Tensor,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        aggregate: Aggregate = "logits",
    ) -> Recommendations:
        """Return the k best next items of each sequence, in evaluation mode, some sequences at a time.

        Args:
            item_ids: (b, l) int64 sequences, left-padded with 0; the encoder reads the newest of long ones.
            k: how many.
            exclude_seen: leave out the items of ``item_ids`` itself.
            candidates: (c,) or (b, c) items to choose from, for all or for each, the second form padded with 0; None:
                all. Repeated ones count once.
            aggregate: what is averaged over members: "logits" (Eq. 20), "probabilities" or "ranks".

        Returns:
            Items and scores, (b, k). If fewer than k items are left for a sequence, its last ones are 0, no item.

        Raises:
            EnsembleKDError: arguments that cannot be used, or scores that are not finite.

        Examples:
            >>> from ensemble_kd import EnsembleKD
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2)
            >>> items, scores = model.recommend(torch.tensor([[0, 1, 2, 3]]), k=2)
            >>> sorted(items[0].tolist())
            [4, 5]
        """
        flag("recommend", "exclude_seen", exclude_seen)
        item_ids = self._checked("recommend", item_ids, highest=self.num_items)
        states = self._serve(item_ids)
        seen = item_ids if exclude_seen else None
        with torch.autocast(states.device.type, enabled=False):
            return serving.top_items(
                states,
                *self.classifier_weights(),
                k=k,
                seen=seen,
                candidates=candidates,
                aggregate=aggregate,
                mean=partial(mean_members, place=self.place),
                weights=self.weights.to(states.dtype),
                temperatures=self.temperatures.to(states.dtype),
            )

    @in_turn
    @torch.no_grad()
    def query_vectors(self, item_ids: Tensor) -> Tensor:
        """Return one vector per sequence, (b, l) -> (b, n d + 1); its products with ``item_vectors`` are the scores.

        If the members' widths differ, n d is their sum. Any index of maximum inner products serves the whole ensemble
        with these vectors, exactly where the index is.

        Examples:
            >>> from ensemble_kd import EnsembleKD
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(5, d_model=4, max_len=10), n=2).eval()
            >>> ids = torch.tensor([[0, 1, 2, 3]])
            >>> torch.allclose(model.query_vectors(ids) @ model.item_vectors().T, model(ids)[:, 1:], atol=1e-6)
            True
        """
        checked = self._checked("query_vectors", item_ids, highest=self.num_items)
        return self.joined(gather_members(self._serve(checked), self.place))

    def joined(self, states: Tensor) -> Tensor:
        """Return all members' states (n, t, d) as one vector each, (t, n d + 1), as ``query_vectors`` does."""
        factors = gather_members(self.factors, self.place)
        return serving.query_vectors(factors[:, None, None] * states, self.widths * self.place.member_size)

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """Return one vector per item, (num_items, n d + 1); row j is item j + 1's. See ``query_vectors``."""
        weight, bias = (gather_members(part, self.place) for part in self.classifier_weights())
        bias = gather_members(self.factors, self.place)[:, None] * bias
        return serving.item_vectors(weight, bias, self.widths * self.place.member_size)

    @in_turn
    @torch.no_grad()
    def uncertainty(self, item_ids: Tensor, *, k: int = 10) -> Uncertainty:
        """Return entropy, mutual information and disagreement about each sequence's next item: (b, l) -> three of (b,).

        Examples:
            >>> from ensemble_kd import EnsembleKD
            >>> from ensemble_kd.encoders import SASRec
            >>> model = EnsembleKD(lambda: SASRec(20, d_model=4, max_len=10), n=2)
            >>> found = model.uncertainty(torch.tensor([[0, 1, 2, 3]]))
            >>> bool(found.mutual_information <= found.entropy)
            True
        """
        states = self._serve(self._checked("uncertainty", item_ids, highest=self.num_items))
        with torch.autocast(states.device.type, enabled=False):
            return serving.uncertainty(
                states,
                *self.classifier_weights(),
                k=k,
                gather=partial(gather_members, place=self.place),
                weights=self.weights.to(states.dtype),
                temperatures=self.temperatures.to(states.dtype),
            )

    def _checked(self, where: str, item_ids: Tensor, *, highest: int) -> Tensor:
        """Return ids that were checked, on the device of the weights."""
        check_ids(where, item_ids, highest=highest)
        return item_ids if item_ids.device == self.device else to_device(item_ids, self.device)

    def _serve(self, item_ids: Tensor) -> Tensor:
        """Return the members' query states in evaluation mode, some sequences at a time.

        The mode is this call's alone, so that other threads may score with the model, or train it.
        """
        newest = partial(self._newest, training=False)
        return serving.encoded(newest, item_ids, n=len(self.encoder), d=self.hidden_size, longest=self.max_len)
