"""Draw the figures of the documentation as SVG: ``python docs/figures/draw.py``. It needs Python alone.

A test draws them anew and compares, so that no figure is changed by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
INDIGO, LIGHT, PALE, TEAL, RED, GREY, BLACK = (
    "#3f51b5",
    "#9fa8da",
    "#e8eaf6",
    "#00796b",
    "#c62828",
    "#757575",
    "#212121",
)
MEMBERS = ("member 0", "member 1", "member 2")


class Canvas:
    """An SVG under construction; all places are in pixels."""

    def __init__(self, width: int, height: int, label: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(label)}" font-family="Helvetica, Arial, sans-serif" font-size="15" '
            'style="white-space:pre">\n'
            f'<rect width="{width}" height="{height}" rx="8" fill="white"/>\n'
        )
        self.parts: list[str] = []
        self.colours: list[str] = []

    def text(self, x: float, y: float, text: str, colour: str = BLACK, size: int = 15, anchor: str = "middle") -> None:
        """Write one line, centred at its height."""
        self.parts.append(
            f'<text x="{x:g}" y="{y + size / 3:g}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def box(self, x: float, y: float, w: float, h: float, text: str, fill: str = PALE, colour: str = BLACK) -> None:
        """Draw a box around its centre, with a line of text."""
        self.parts.append(
            f'<rect x="{x - w / 2:g}" y="{y - h / 2:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" '
            f'stroke="{INDIGO}"/>'
        )
        self.text(x, y, text, colour)

    def arrow(self, x: float, y: float, to_x: float, to_y: float, colour: str = GREY, *, both: bool = False) -> None:
        """Draw an arrow; ``both``: with a head at either end."""
        if colour not in self.colours:
            self.colours.append(colour)
        head = f"url(#a{self.colours.index(colour)})"
        start = f' marker-start="{head}"' if both else ""
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="2" '
            f'marker-end="{head}"{start}/>'
        )

    def bars(self, x: float, y: float, heights: tuple[float, ...], colour: str = LIGHT, best: int = -1) -> None:
        """Draw a small bar chart, which stands for a distribution over items; the bar ``best`` is dark."""
        for i, height in enumerate(heights):
            self.parts.append(
                f'<rect x="{x + 14 * i:g}" y="{y - height:g}" width="11" height="{height:g}" '
                f'fill="{INDIGO if i == best else colour}"/>'
            )

    def svg(self) -> str:
        """Return the drawing."""
        markers = "".join(
            f'<marker id="a{i}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" '
            f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
            for i, colour in enumerate(self.colours)
        )
        return f"{self.head}<defs>{markers}</defs>\n" + "\n".join(self.parts) + "\n</svg>\n"


def ensemble() -> Canvas:
    """Draw what is trained and what recommends."""
    c = Canvas(
        860, 330, "Three encoders read one user's items. KD, ICL and CCL connect them. The mean of scores ranks."
    )
    c.box(85, 150, 130, 56, "a user's items")
    for i, (name, y) in enumerate(zip(MEMBERS, (60, 150, 240), strict=True)):
        c.arrow(150, 150, 208, y)
        c.box(270, y, 120, 50, name)
        c.text(270, y + 38, f"seed {i}", GREY, 12)
        c.arrow(330, y, 383, y)
        c.bars(388, y + 22, ((34, 12, 22, 8), (26, 20, 30, 6), (38, 10, 16, 14))[i], best=(0, 2, 0)[i])
        c.arrow(450, y, 598, 150 if i == 1 else (132, 0, 168)[i])
    c.arrow(300, 90, 300, 121, TEAL, both=True)
    c.arrow(300, 190, 300, 212, TEAL, both=True)
    c.text(344, 105, "ICL, CCL", TEAL, 13)
    c.text(344, 201, "ICL, CCL", TEAL, 13)
    c.arrow(414, 92, 414, 112, RED, both=True)
    c.arrow(414, 182, 414, 202, RED, both=True)
    c.text(440, 100, "KD", RED, 13)
    c.text(440, 194, "KD", RED, 13)
    c.box(650, 150, 104, 50, "mean", INDIGO, "white")
    c.arrow(702, 150, 738, 150)
    c.box(795, 150, 110, 50, "top 10 items")
    c.text(
        430,
        298,
        "While they train, members learn from the data and from each other. Afterwards their scores are averaged.",
        GREY,
    )
    return c


def formula(c: Canvas, y: float, equation: str, words: str) -> Canvas:
    """Write the equation and what it means under a drawing."""
    c.text(380, y, equation, BLACK, 17)
    c.text(380, y + 32, words, GREY, 14)
    return c


def mip() -> Canvas:
    """Draw item prediction, Eqs. 3-7."""
    c = Canvas(760, 300, "Some items are masked. The encoder has to find them among all items.")
    for i, item in enumerate(("12", "[mask]", "431", "9", "[mask]")):
        c.box(90 + 85 * i, 50, 75, 36, item, RED if item == "[mask]" else PALE, "white" if item == "[mask]" else BLACK)
    c.box(260, 125, 430, 46, "encoder")
    c.arrow(260, 70, 260, 100)
    for x in (175, 430):
        c.arrow(x, 148, x, 180)
    c.bars(149, 215, (10, 30, 6, 14), best=1)
    c.bars(404, 215, (8, 12, 32, 5), best=2)
    c.text(610, 195, "softmax over all v items,", GREY, 14)
    c.text(610, 215, "at the masked positions alone", GREY, 14)
    return formula(
        c,
        250,
        "mip  =  Σ over members and views   mean of  −log p(item | position)",
        "The right item (dark) should get all of the probability.",
    )


def ap() -> Canvas:
    """Draw attribute prediction, Eqs. 9-11."""
    c = Canvas(760, 270, "From an item's state the encoder has to tell the item's attributes.")
    c.box(110, 80, 130, 50, "state of item 431")
    c.arrow(178, 80, 248, 80)
    c.box(330, 80, 160, 50, "one classifier")
    for i, (name, yes) in enumerate((("skin care", True), ("hair", False), ("brand 7", True))):
        y = 40 + 40 * i
        c.arrow(410, 80, 488, y)
        c.box(560, y, 140, 30, name, INDIGO if yes else "white", "white" if yes else BLACK)
        c.text(660, y, "yes" if yes else "no", GREY)
    return formula(
        c,
        190,
        "AP  =  Σ over members   mean of  −log p(yes or no | attribute, position)",
        "A separate yes or no for every attribute, at every real position. Padding does not count.",
    )


def contrast(title: str, cross: bool) -> Canvas:
    """Draw ICL (within one member) or CCL (from one member to another)."""
    c = Canvas(760, 330, title)
    left, right = (
        ("member x: whole sequences", "member y: a view of u, sequences of others")
        if cross
        else ("whole sequences", "their views")
    )
    c.text(200, 30, left, GREY)
    c.text(560, 30, right + ("" if cross else " (same member)"), GREY)
    for i, name in enumerate(("user u", "user k", "user l")):
        y = 70 + 62 * i
        c.box(200, y, 120, 40, name)
        c.box(560, y, 120, 40, name + ("" if cross else ", view"))
    c.arrow(264, 70, 496, 70, TEAL, both=True)
    c.text(380, 58, "close", TEAL)
    if cross:
        c.arrow(264, 76, 496, 128, RED, both=True)
        c.arrow(264, 82, 496, 186, RED, both=True)
        c.text(330, 150, "apart", RED)
        return formula(
            c,
            262,
            "CCL  =  −log  exp(cos(xᵤ, view of yᵤ)/τ)  /  Σ over k ≠ u  exp(cos(xᵤ, yₖ)/τ)",
            "Member x's picture of a user should match member y's picture of the same user, for each pair x ≠ y.",
        )
    c.arrow(200, 92, 200, 111, RED, both=True)
    c.arrow(120, 92, 120, 174, RED, both=True)
    c.text(80, 132, "apart", RED)
    return formula(
        c,
        262,
        "ICL  =  −log  exp(cos(sᵤ, view of sᵤ)/τ)  /  Σ over k ≠ u  exp(cos(sᵤ, sₖ)/τ)",
        "A user stays close to a masked view of the same user, and apart from all other users of the batch.",
    )


def icl() -> Canvas:
    """Draw the loss within a member, Eqs. 12-13."""
    return contrast("Within one member a user is close to its own view, and apart from other users.", cross=False)


def ccl() -> Canvas:
    """Draw the loss between members, Eqs. 14-15."""
    return contrast("Between two members the same user is close, and other users are apart.", cross=True)


def kd() -> Canvas:
    """Draw distillation, Eqs. 16-18."""
    c = Canvas(760, 310, "Each member's distribution over items teaches every other member's.")
    shapes = ((40, 14, 26, 8), (30, 24, 34, 6), (44, 10, 20, 14))
    for i, (name, x) in enumerate(zip(MEMBERS, (150, 380, 610), strict=True)):
        c.text(x, 40, name)
        c.bars(x - 27, 110, shapes[i], best=(0, 2, 0)[i])
    c.arrow(205, 88, 325, 88, RED, both=True)
    c.arrow(435, 88, 555, 88, RED, both=True)
    c.parts.append(f'<path d="M150 124 C 200 190, 560 190, 610 124" fill="none" stroke="{RED}" stroke-width="2"/>')
    c.text(380, 158, "all pairs, both ways", RED, 14)
    return formula(
        c,
        225,
        "KD  =  Σ over x ≠ y   mean of  KL( softmax(xᵢ/τ)  ‖  softmax(yᵢ/τ) )",
        "The teacher x is cut off from the gradient: only the student y moves. Every member is both in turn.",
    )


def linear() -> Canvas:
    """Draw why KD of n members costs n, not n²."""
    c = Canvas(760, 300, "The sum over all pairs needs two sums over members, not a loop over pairs.")
    c.text(190, 30, "pair by pair: n (n − 1) terms", GREY)
    c.text(570, 30, "through two sums: 2 n terms", GREY)
    places = {"0": (100, 90), "1": (280, 90), "2": (100, 180), "3": (280, 180)}
    for a, (x, y) in places.items():
        for b, (to_x, to_y) in places.items():
            if a < b:
                c.arrow(x, y, to_x, to_y, LIGHT, both=True)
    for name, (x, y) in places.items():
        c.box(x, y, 40, 34, name)
    for i in range(4):
        c.box(440, 66 + 46 * i, 40, 34, str(i))
        c.arrow(462, 66 + 46 * i, 598, 135, INDIGO)
    c.box(650, 135, 100, 60, "S,  Λ", INDIGO, "white")
    return formula(
        c,
        245,
        "Σ over x ≠ y  KL(zₓ ‖ zᵧ)  =  N Σ zₓ·log zₓ  −  S·Λ,   S = Σ zₓ,   Λ = Σ log zᵧ",
        "Exact, not an approximation. The gradient of student y is (N zᵧ − S) / τ.",
    )


def step() -> Canvas:
    """Draw how a training step runs."""
    c = Canvas(860, 250, "A step: draw, encode once, gather targets, walk over tiles of the catalogue, add up.")
    boxes = (
        ("draw", "masks, targets"),
        ("encode", "all views in one call"),
        ("gather", "target positions alone"),
        ("tiles", "targets × items × members"),
        ("total", "Σ weight × loss"),
    )
    for i, (name, words) in enumerate(boxes):
        x = 90 + 170 * i
        c.box(x, 70, 110, 50, name, INDIGO if name == "tiles" else PALE, "white" if name == "tiles" else BLACK)
        c.text(x, 112, words, GREY, 12)
        if i:
            c.arrow(x - 113, 70, x - 57, 70)
    c.text(600, 150, "logits, softmax, cross-entropy, KD and their gradients", BLACK, 14)
    c.text(600, 172, "of one tile at a time, while it is in the cache", BLACK, 14)
    c.text(
        90,
        205,
        "The logits of all targets and all items are never stored, so memory does not grow with targets × items.",
        GREY,
        14,
        "start",
    )
    return c


FIGURES: dict[str, Callable[[], Canvas]] = {f.__name__: f for f in (ensemble, mip, ap, icl, ccl, kd, linear, step)}


def main() -> None:
    """Write every figure."""
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
