"""The auxiliary losses of EMKD as values: small, frozen, and an algebra.

``AP() + 0.01 * (ICL(temperature=0.3) + CCL(temperature=0.3))`` is an object that describes what to compute. A loss
declares what it needs (``needs``), so that a training step computes only that. The maths is in ``functional`` and
``items``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args

from typing_extensions import override

from ensemble_kd.errors import EnsembleKDError
from ensemble_kd.functional import Pool, Variant
from ensemble_kd.internal import choice, flag, number
from ensemble_kd.losses.pairs import Between, Gate
from ensemble_kd.losses.peers import Part

Need = Literal["anchor", "views", "logits", "attributes"]
On = Literal["batch", "spliced"]
Teacher = Literal["peers", "ema"]
DECAY = 0.999  # of the averages, if none is given
LossName = Literal["ap", "icl", "ccl", "kd", "ambiguity"]


class Loss:
    """A loss: it can be added, be scaled by a number, and list its weighted terms. Only ``Ambiguity`` takes one < 0."""

    __array_ufunc__ = None  # so that NumPy leaves the product of an array and a loss to __rmul__, which refuses it

    def weighted(self) -> tuple[tuple[float, Term], ...]:
        """Return the terms with their weights, in the order in which they were written; equal terms are merged."""
        raise NotImplementedError

    def __add__(self, other: object) -> Loss:
        if isinstance(other, int | float) and other == 0:  # sum([...]) starts from 0
            return self
        if not isinstance(other, Loss):
            return NotImplemented
        merged: dict[Term, float] = {}
        for weight, term in self.weighted() + other.weighted():
            merged[term] = merged.get(term, 0.0) + weight
        return _sum(tuple((weight, term) for term, weight in merged.items()))

    __radd__ = __add__

    def __mul__(self, weight: object) -> Loss:
        if isinstance(weight, Loss):
            return NotImplemented
        signed = all(term.least_weight < 0 for _, term in self.weighted())
        factor = number("losses", "the weight of a loss", weight, least=None if signed else 0)
        return _sum(tuple((factor * own, term) for own, term in self.weighted()))

    __rmul__ = __mul__


class Term(Loss):
    """One loss term of the paper."""

    name: ClassVar[LossName]
    needs: ClassVar[frozenset[Need]]
    least_weight: ClassVar[float] = 0.0

    @override
    def weighted(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default or f.name == "temperature"
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class LossSum(Loss):
    """A weighted sum of terms, as ``+`` and ``*`` make it."""

    terms: tuple[tuple[float, Term], ...]

    @override
    def weighted(self) -> tuple[tuple[float, Term], ...]:
        return self.terms

    def __repr__(self) -> str:
        return " + ".join(repr(term) if weight == 1 else f"{weight!r} * {term!r}" for weight, term in self.terms) or "0"


def _sum(terms: tuple[tuple[float, Term], ...]) -> Loss:
    """Return the sum of weighted terms. One term of weight 1 is the term itself: what prints alike is equal."""
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else LossSum(terms)


@dataclass(frozen=True, repr=False)
class AP(Term):
    """Attribute prediction, Eqs. 9–11. It needs ``item_attributes``.

    Where we differ: the authors' code uses the masked positions of the last view only.

    Examples:
        >>> AP() + 0.5 * KD(temperature=2.0)
        AP() + 0.5 * KD(temperature=2.0)
    """

    name: ClassVar[LossName] = "ap"
    needs: ClassVar[frozenset[Need]] = frozenset({"anchor", "attributes"})


@dataclass(frozen=True, repr=False)
class _Contrastive(Term):
    temperature: float = 0.3
    pool: Pool = "flatten"
    variant: Variant = "paper"

    needs: ClassVar[frozenset[Need]] = frozenset({"anchor", "views"})

    def __post_init__(self) -> None:
        where = type(self).__name__
        _set_temperature(self)
        choice(where, "pool", self.pool, get_args(Pool))
        choice(where, "variant", self.variant, get_args(Variant))


@dataclass(frozen=True, repr=False)
class ICL(_Contrastive):
    """Intra-network contrastive learning, Eqs. 12–13: a member's views against the other sequences of the batch.

    Args:
        temperature: τ, > 0.
        pool: H(s) as the whole sequence ("flatten", the paper), its "mean" or its "last" position.
        variant: "paper", or "reference_code" for the formula of the authors' public code.

    Examples:
        >>> sum([ICL(temperature=0.5), ICL(temperature=0.5)])
        2.0 * ICL(temperature=0.5)
    """

    name: ClassVar[LossName] = "icl"


@dataclass(frozen=True, repr=False)
class CCL(_Contrastive):
    """Cross-network contrastive learning, Eqs. 14–15: member x's anchors against member y's views. Arguments as ICL.

    Examples:
        >>> 0.1 * (ICL() + CCL(pool="mean"))
        0.1 * ICL(temperature=0.3) + 0.1 * CCL(temperature=0.3, pool='mean')
    """

    name: ClassVar[LossName] = "ccl"


@dataclass(frozen=True, repr=False)
class KD(Term):
    """Knowledge distillation between members' item predictions, Eqs. 16–18, with teachers cut off from the gradient.

    Args:
        temperature: τ of Eq. 16, > 0.
        scale_by_temperature_squared: multiply by τ², as Hinton et al. (2015) do and the paper does not.
        between: who teaches whom in an ensemble of several architectures: "all" each other, only members of the "same"
            architecture, or only those of "other" ones.
        part: what is passed on: "all" of the teacher's distribution, or the probability of the "target" alone, so that
            the order of all other items stays the student's own: the first half of decoupled KD (Zhao et al., CVPR
            2022). At temperature 1 it costs no second softmax.
        gate: "open", or "better": on each target, a member learns only from those that give it a higher probability
            (after Guo et al., "Online knowledge distillation via collaborative learning", CVPR 2020, whose teacher is
            the best member alone).
        on: "batch", or "spliced": on as many sequences that begin as one user's and end as another's, instead of the
            batch's own. On what it was trained on, a teacher repeats the targets. A step then takes nearly twice as
            long. There are no true items there, so it goes with ``part="all"`` and an open gate alone.
        teacher: "peers", as they are now, or "ema": exponential moving averages of the other members' weights
            (``functional.mean_teacher_distillation``), which differ less from step to step. ``fit`` keeps the averages
            and its checkpoints have them; the saved model does not. Members are encoded a second time, without gradient
            and without dropout. It goes with ``part="all"``, an open gate and the full softmax.
        decay: of these averages, in [0, 1); they span about 1 / (1 − decay) steps. See ``functional.moving_average``.

    Examples:
        >>> KD(between="same")
        KD(temperature=0.3, between='same')
        >>> 3 * KD(temperature=1.0, part="target")
        3.0 * KD(temperature=1.0, part='target')
        >>> KD(temperature=1.0, teacher="ema", decay=0.99)
        KD(temperature=1.0, teacher='ema', decay=0.99)
        >>> KD(temperature=0)
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: KD: expected temperature, a finite number > 0, got 0. Pass such a number.
    """

    temperature: float = 0.3
    scale_by_temperature_squared: bool = False
    between: Between = "all"
    part: Part = "all"
    gate: Gate = "open"
    on: On = "batch"
    teacher: Teacher = "peers"
    decay: float = DECAY

    name: ClassVar[LossName] = "kd"
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        _set_temperature(self)
        for name, allowed in (("between", Between), ("part", Part), ("gate", Gate), ("on", On), ("teacher", Teacher)):
            choice("KD", name, getattr(self, name), get_args(allowed))
        flag("KD", "scale_by_temperature_squared", self.scale_by_temperature_squared)
        if self.on == "spliced" and (self.part, self.gate) != ("all", "open"):
            fix = "Spliced sequences have no true items: leave part and gate out, or on."
            raise EnsembleKDError("KD", "part='all' and gate='open' with on='spliced'", repr(self), fix)
        object.__setattr__(self, "decay", number("KD", "decay", self.decay, least=0, below=1))
        if self.teacher == "ema" and (self.part, self.gate) != ("all", "open"):
            fix = "Averages pass on all they know: leave part and gate out, or teacher."
            raise EnsembleKDError("KD", "part='all' and gate='open' with teacher='ema'", repr(self), fix)
        if self.teacher == "peers" and self.decay != DECAY:
            fix = "Pass teacher='ema', too, or leave decay out."
            raise EnsembleKDError("KD", "no decay where peers teach as they are", repr(self), fix)


@dataclass(frozen=True, repr=False)
class Ambiguity(Term):
    """The spread of the members around their ensemble, ``functional.ambiguity``: one knob from alone to joint.

    The cross-entropy of the ensemble's mean logits is the mean of the members' cross-entropies minus the ambiguity per
    member (Krogh and Vedelsby, 1995). So a weight of −1 trains the ensemble as one network, and one between −1 and 0 is
    negative correlation learning: members may be worse alone as long as they are so in different ways. At 0 members
    are on their own. A weight > 0 is distillation from the ensemble into its members. Near −1 members lean on each
    other: watch the ensemble, not them. Below −1 the sum has no minimum, and is refused.

    Source: Webb et al., "To ensemble or not ensemble: when does end-to-end training fail?", ECML 2020; Jeffares et al.,
    "Joint training of deep ensembles fails due to learner collusion", NeurIPS 2023.

    Examples:
        >>> AP() + -0.5 * Ambiguity()
        AP() + -0.5 * Ambiguity()
        >>> terms_by_name(-2 * Ambiguity())
        Traceback (most recent call last):
            ...
        ensemble_kd.errors.EnsembleKDError: losses: expected a weight of Ambiguity >= -1, got -2.0. Below it the loss \
has no minimum: at -1 the ensemble is trained as one network.
    """

    name: ClassVar[LossName] = "ambiguity"
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})
    least_weight: ClassVar[float] = -1.0


def _set_temperature(term: KD | _Contrastive) -> None:
    """Check the temperature and make it a ``float``: a NumPy number would print as what nobody types."""
    object.__setattr__(term, "temperature", number(type(term).__name__, "temperature", term.temperature, above=0))


def terms_by_name(losses: Loss | int) -> dict[LossName, tuple[float, Term]]:
    """Return the terms of a sum by name, without terms of weight 0, which need not be computed.

    Raises:
        EnsembleKDError: ``losses`` is no loss, two terms of one name have different settings, or a weight is too low.

    Examples:
        >>> terms_by_name(0.1 * ICL() + 0 * KD())
        {'icl': (0.1, ICL(temperature=0.3))}
    """
    if isinstance(losses, int) and losses == 0:
        return {}
    if not isinstance(losses, Loss):
        raise EnsembleKDError(
            "losses", "a sum of ICL, CCL, KD, Ambiguity, AP, or 0 for none", repr(losses), "See ensemble_kd.losses."
        )
    named: dict[LossName, tuple[float, Term]] = {}
    for weight, term in losses.weighted():
        if weight == 0:
            continue
        if weight < term.least_weight:
            fix = "Below it the loss has no minimum: at -1 the ensemble is trained as one network."
            raise EnsembleKDError("losses", f"a weight of Ambiguity >= {term.least_weight:g}", weight, fix)
        if term.name in named:
            raise EnsembleKDError(
                "losses",
                f"one {type(term).__name__} term",
                f"{named[term.name][1]!r} and {term!r}",
                "Give both the same settings, or leave one out.",
            )
        named[term.name] = (weight, term)
    return named


def scale_transfer(losses: Loss, share: float) -> Loss:
    """Return the sum with ``share`` of the weight of all terms but AP, which pass between members or between views.

    Examples:
        >>> scale_transfer(AP() + 0.2 * ICL() + 0.5 * KD(temperature=1.0), 0.5)
        AP() + 0.1 * ICL(temperature=0.3) + 0.25 * KD(temperature=1.0)
    """
    return _sum(tuple((weight if term.name == "ap" else share * weight, term) for weight, term in losses.weighted()))
