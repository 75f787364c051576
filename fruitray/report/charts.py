"""Charts as SVG to stand within the page: matplotlib draws, the page's style sheet colours, light or dark."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, LINE = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306", "#030307")
"""Stand-ins, in the SVG, for the colours that `page.css` defines."""
_COLOURS = {INK: "ink", LINE: "line"} | {stand_in: f"series-{number}" for number, stand_in in enumerate(SERIES)}
_MARKERS = "osD^vPX"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fruitray",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

LONGEST = 28
"""Letters of a name in a chart."""
WIDEST = 60
"""And in a legend, which has a line for it."""

Points = tuple[Sequence[float], Sequence[float]]
"""x and y of each point."""


@mpl.rc_context(_STYLE)
def lines(series: Mapping[str, Points], *, x: str, y: str, says: str, marks: Mapping[str, int] | None = None) -> Markup:
    """A line per name; `marks` is the x of a point on it that stands out. `says` is read to who cannot see it."""
    figure, axes = _axes(x, y)
    for number, (name, (xs, ys)) in enumerate(series.items()):
        colour = _colour(number)
        axes.plot(xs, ys, color=colour, label=name, linewidth=1.6, marker="." if len(xs) < 3 else None)
        if marks and name in marks and marks[name] in xs:
            at = list(xs).index(marks[name])
            axes.plot(xs[at], ys[at], "o", color=colour, markersize=6)
    _legend(figure, axes, list(series))
    return _svg(figure, says)


@mpl.rc_context(_STYLE)
def curves(groups: Mapping[str, Sequence[tuple[Sequence[float], int]]], *, x: str, y: str, says: str) -> Markup:
    """Many lines, coloured by group: for each the values at 1, 2, ... and which of them, from 1, stands out."""
    figure, axes = _axes(x, y)
    for number, (name, members) in enumerate(groups.items()):
        for place, (ys, best) in enumerate(members):
            colour, label = _colour(number), None if place else _short(name, WIDEST)
            axes.plot(range(1, len(ys) + 1), ys, _dashes(number), label=label, color=colour, linewidth=1.0, alpha=0.8)
            if 0 < best <= len(ys):
                axes.plot(best, ys[best - 1], _marker(number), color=colour, markersize=4)
    _legend(figure, axes, list(groups))
    return _svg(figure, says)


@mpl.rc_context(_STYLE)
def scatter(groups: Mapping[str, Points], *, x: str, y: str, says: str) -> Markup:
    """A point per pair, its colour and form by group; x on a logarithmic scale where it spans more than tenfold."""
    figure, axes = _axes(x, y)
    for number, (name, (xs, ys)) in enumerate(groups.items()):
        form, colour = _marker(number), _colour(number)
        axes.scatter(xs, ys, color=colour, label=_short(name, WIDEST), s=28, marker=form, alpha=0.85, linewidths=0)
    every = [value for xs, _ in groups.values() for value in xs if value > 0]
    if max(every) > 10 * min(every):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    _legend(figure, axes, list(groups))
    return _svg(figure, says)


@mpl.rc_context(_STYLE)
def stacked(rows: Mapping[str, Mapping[str, int]], *, x: str, says: str) -> Markup:
    """A bar per row, to the right, of parts one behind the other."""
    height = 1.2 + 0.28 * len(rows)
    figure, axes = _axes(x, "", height=height)
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    places, left = range(len(rows)), [0] * len(rows)
    for number, part in enumerate(parts):
        counts = [row.get(part, 0) for row in rows.values()]
        axes.barh(places, counts, left=left, color=_colour(number), label=part, height=0.7)
        left = [start + count for start, count in zip(left, counts, strict=True)]
    axes.set_yticks(places, [_short(name) for name in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    if len(parts) > 1:
        figure.legend(loc="outside upper left", ncols=len(parts), fontsize=8, columnspacing=1.2, handlelength=1)
    return _svg(figure, says)


@mpl.rc_context(_STYLE)
def histogram(groups: Mapping[str, Sequence[float]], *, x: str, y: str, says: str) -> Markup:
    """How often values of each group lie in which part of 0..1, as steps: shares of the group."""
    figure, axes = _axes(x, y)
    for number, (name, values) in enumerate(groups.items()):
        weights = [1 / len(values)] * len(values)
        kind: Literal["step", "stepfilled"] = "stepfilled" if len(groups) == 1 else "step"
        axes.hist(
            values,
            bins=20,
            range=(0, 1),
            weights=weights,
            histtype=kind,
            color=_colour(number),
            label=name,
            linewidth=1.6,
        )
    _legend(figure, axes, list(groups))
    return _svg(figure, says)


@mpl.rc_context(_STYLE)
def reliability(confidences: Sequence[float], shares: Sequence[float], *, says: str) -> Markup:
    """The share that was right of photos of about that confidence, beside the line where both are alike."""
    figure, axes = _axes("confidence", "share that is right")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="as sure as right")
    axes.plot(confidences, shares, color=_colour(0), marker="o", markersize=4, linewidth=1.6, label="this model")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    _legend(figure, axes, ["", ""])
    return _svg(figure, says)


def _axes(x: str, y: str, *, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, height))
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _marker(number: int) -> str:
    """Another one where colours begin anew."""
    return _MARKERS[(number + number // len(SERIES)) % len(_MARKERS)]


def _dashes(number: int) -> str:
    return ("-", "--", ":", "-.")[number // len(SERIES) % 4]


def _short(name: str, longest: int = LONGEST) -> str:
    """What there is room for; tables have the whole name."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    if len(names) > 2 or (len(names) > 1 and max(map(len, names)) > LONGEST):  # within, they would hide points
        figure.set_figheight(figure.get_figheight() + 0.18 * len(names))
        figure.legend(loc="outside lower left", fontsize=8)
    elif len(names) > 1:
        axes.legend(loc="best", fontsize=8)


def _svg(figure: Figure, says: str) -> Markup:
    """The figure as an element of the page, as wide as there is room for."""
    drawn = io.StringIO()
    with warnings.catch_warnings(action="ignore"):  # of letters that its own fonts lack: the reader's have them
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>|<g id=\"[^\"]*\"/>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # ids that nothing points to, and that other figures have, too
    svg = re.sub("|".join(_COLOURS), lambda found: f"var(--{_COLOURS[found[0]]})", svg)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    head = re.match(r"<svg[^>]*>", svg)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head[0])
    assert box is not None
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(says)}">{svg[head.end() :]}')
