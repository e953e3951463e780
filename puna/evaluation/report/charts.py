"""The report's charts: small functions from numbers to SVG.

Positions are percentages of an SVG without a viewBox, so that a chart takes the width it gets while its text and marks
keep their size; only curves lie in a stretched inner viewBox, with strokes that do not scale. Colours are CSS classes
(see `page.css`), so that both themes and paper have their own, and no distinction rests on colour alone. Every mark has
a `<title>`, which browsers show as a tooltip and read aloud.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from puna.evaluation.report.markup import Markup, el

Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One row of a chart: a value with its interval, if it has one."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    control: float | None = None  # another value on the same row, drawn as a hollow mark
    tone: str = "plain"  # plain, model, best: classes of page.css
    note: str = ""  # small text behind the label


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def number(value: float) -> str:
    """Three significant digits, with thousands separators; 12,300 rather than 1.23e4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits < 7 else f"{value:.2e}"


def ticks(low: float, high: float, about: int = 5) -> list[tuple[float, str]]:
    """Round numbers from `low` to `high` in steps of 1, 2 or 5 times a power of ten, each with its label."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if rough <= m * power * 1.0001)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    form = "{:.0e}".format if step < 1e-4 else f"{{:,.{digits}f}}".format
    return [(round(i * step, 12), form(i * step) if i else "0") for i in count]


def bars(marks: Sequence[Mark], *, unit: str, form: Format = number, reference: float | None = None) -> Markup:
    """Horizontal bars from zero, each with its label and value; whiskers where there is an interval.

    `reference` draws a vertical line, for comparing all bars with one of them.
    """
    top = max([m.high or m.value or 0 for m in marks] + [reference or 0, 1e-12])
    rows = []
    for mark in marks:
        said = _said(mark, unit, form)
        shapes = [el("title", said)]
        if reference is not None:
            shapes.append(_rule(reference / top, "reference"))
        if mark.value is not None:
            shapes.append(el("rect", x=0, y="22%", height="56%", width=_share(mark.value / top), rx=2, cls="bar"))
        shapes += _whisker(mark, 0, top)
        rows.append(_row(mark, el("svg", shapes, role="img", aria_label=said), form))
    return el("div", rows, el("div", unit, cls="unit"), cls="chart bars")


def whiskers(marks: Sequence[Mark], *, chance: float | None = None, unit: str = "share of items passed") -> Markup:
    """Dots with 95% intervals on a scale from 0 to 100%, and chance as a dashed line."""
    rows = []
    for mark in marks:
        said = _said(mark, unit, percent)
        shapes = [el("title", said), *(_rule(t, "grid") for t in (0, 0.25, 0.5, 0.75, 1))]
        if chance:
            shapes.append(_rule(chance, "chance"))
        shapes += _whisker(mark, 0, 1)
        if mark.control is not None:
            shapes.append(el("circle", cx=_share(mark.control), cy="50%", r=4, cls="control"))
        if mark.value is not None:
            shapes.append(el("circle", cx=_share(mark.value), cy="50%", r=4, cls="dot"))
        rows.append(_row(mark, el("svg", shapes, role="img", aria_label=said), percent))
    axis = [el("text", f"{t:.0%}", x=_share(t), y=11, text_anchor=_anchor(t)) for t in (0, 0.5, 1)]
    rows.append(el("div", el("span"), el("svg", axis, aria_hidden="true"), el("span"), cls="row axis"))
    return el("div", rows, cls="chart")


def _row(mark: Mark, plot: Markup, form: Format) -> Markup:
    label = el("span", mark.label, el("small", f" {mark.note}") if mark.note else None, cls="label")
    value = el("span", form(mark.value) if mark.value is not None else "not measured", cls="value")
    return el("div", label, plot, value, cls=f"row tone-{mark.tone}")


def _whisker(mark: Mark, low: float, high: float) -> list[Markup]:
    if mark.value is None or mark.low is None or mark.high is None:
        return []
    left, right = ((v - low) / (high - low) for v in (mark.low, mark.high))
    ends = [el("line", x1=_share(x), x2=_share(x), y1="36%", y2="64%", cls="whisker") for x in (left, right)]
    return [el("line", x1=_share(left), x2=_share(right), y1="50%", y2="50%", cls="whisker"), *ends]


def _rule(position: float, cls: str) -> Markup:
    return el("line", x1=_share(position), x2=_share(position), y1=0, y2="100%", cls=cls)


def _share(value: float) -> str:
    return f"{100 * min(max(value, 0), 1):.2f}%"


def _anchor(share: float) -> str:
    return "start" if share < 0.02 else "end" if share > 0.98 else "middle"


def _said(mark: Mark, unit: str, form: Format) -> str:
    if mark.value is None:
        return f"{mark.label}: not measured"
    interval = ""
    if mark.low is not None and mark.high is not None:
        interval = f", 95% interval {form(mark.low)} to {form(mark.high)}"
    return f"{mark.label}: {form(mark.value)} {'' if form is percent else unit}".rstrip() + interval


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through `points` (x, y); `style` is a class of page.css: raw, smooth, points, diagonal."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "smooth"


def lines(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    square: bool = False,
    zero: bool = False,
    at: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Curves over a common pair of axes, their labels in a legend above; `zero` starts the vertical axis at 0.

    `at`: where the horizontal axis is labelled, and how, for a scale that is not even; else at round numbers.
    """
    points = [p for c in curves for p in c.points if math.isfinite(p[1])]
    if not points:
        return el("p", "not measured", cls="missing")
    x0, x1 = _extent([x for x, _ in points])
    # A spike in the first steps must not flatten all the rest.
    ys = sorted(y for _, y in points)
    y0, y1 = _extent([0.0 if zero else ys[0], ys[max(0, math.ceil(0.995 * len(ys)) - 1)]])
    x_ticks, y_ticks = at or ticks(x0, x1), ticks(y0, y1, 4)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return 1000 * (point[0] - x0) / (x1 - x0), 1000 * (1 - min(1.0, (point[1] - y0) / (y1 - y0)))

    def down(value: float) -> str:
        return f"{place((x0, value))[1] / 10:.2f}%"

    def across(value: float) -> float:
        return place((value, y0))[0] / 1000

    inner = [_curve(c, place) for c in curves if c.style != "points"]
    plot = [
        *(el("line", x1=0, x2="100%", y1=down(t), y2=down(t), cls="grid") for t, _ in y_ticks),
        el("svg", inner, viewBox="0 0 1000 1000", preserveAspectRatio="none", cls="plane"),
        *(_dot(p, c.label, place, x_label, dict(at)) for c in curves if c.style == "points" for p in c.points),
    ]
    x_axis = [el("text", label, x=_share(across(t)), y=12, text_anchor=_anchor(across(t))) for t, label in x_ticks]
    y_axis = [el("text", label, x="100%", y=down(t), dy=4, text_anchor="end") for t, label in y_ticks]
    legend = [el("span", el("i", cls=f"key key-{c.style}"), c.label) for c in curves if c.label]
    said = "; ".join(f"{c.label} ends at {number(c.points[-1][1])}" for c in curves if c.points and c.label)
    return el(
        "figure",
        el("figcaption", el("b", y_label), legend),
        el("svg", y_axis, cls="y", aria_hidden="true"),
        el("svg", plot, cls="plot", role="img", aria_label=f"{y_label} over {x_label}: {said}"),
        el("svg", x_axis, cls="x", aria_hidden="true"),
        el("div", x_label, cls="x-label"),
        cls="lines square" if square else "lines",
    )


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _curve(curve: Curve, place: Callable) -> Markup:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, (p for p in curve.points if math.isfinite(p[1]))))
    return el("polyline", el("title", curve.label), points=points, cls=f"curve {curve.style}")


def _dot(point: tuple[float, float], label: str, place: Callable, x_label: str, names: Mapping[float, str]) -> Markup:
    x, y = place(point)
    said = f"{label}: {number(point[1])} at {x_label} {names.get(point[0], number(point[0]))}"
    return el("circle", el("title", said), cx=_share(x / 1000), cy=_share(y / 1000), r=3.5, cls="dot")


def histogram(counts: Sequence[int], *, x_label: str) -> Markup:
    """Ten bins of [0, 1] as columns with their counts; heights on a square-root scale, so that few stay visible."""
    top = math.sqrt(max([*counts, 1]))
    columns = []
    for i, count in enumerate(counts):
        height, left = 100 * math.sqrt(count) / top * 0.8, 100 * i / len(counts)
        said = f"{i / len(counts):.0%} to {(i + 1) / len(counts):.0%}: {count:,} examples"
        columns.append(
            el(
                "rect",
                el("title", said),
                x=f"{left + 0.5:.1f}%",
                width=f"{100 / len(counts) - 1:.1f}%",
                y=f"{100 - height:.1f}%",
                height=f"{height:.1f}%",
                cls="bar",
            )
        )
        if count:
            middle = left + 50 / len(counts)
            columns.append(el("text", f"{count:,}", x=f"{middle:.1f}%", y=f"{97 - height:.1f}%", text_anchor="middle"))
    axis = [el("text", f"{t:.0%}", x=_share(t), y=12, text_anchor=_anchor(t)) for t in (0, 0.5, 1)]
    said = f"{x_label}: counts by tenths {', '.join(map(str, counts))}"
    return el(
        "div",
        el("svg", columns, role="img", aria_label=said, cls="columns"),
        el("svg", axis, cls="columns-axis", aria_hidden="true"),
        el("div", x_label, cls="unit"),
        cls="chart histogram",
    )


ROW = 30  # pixels between two rows of the lineage


def arcs(edges: Sequence[tuple[int, int]], rows: int) -> Markup:
    """Who came from whom, among `rows` rows: an arc from each input (an earlier row) to what was made of it.

    Fixed pixels, since the rows beside it are of fixed height; longer arcs swing wider.
    """
    swings = [round(24 * math.sqrt(b - a)) for a, b in edges]
    width = 24 + round(0.75 * max(swings, default=1))  # a curve comes three quarters of the way to its handles
    shapes = []
    for (a, b), swing in zip(edges, swings):
        y1, y2 = ROW * (a + 0.5), ROW * (b + 0.5)
        path = f"M{width - 8} {y1} C{width - 8 - swing} {y1} {width - 8 - swing} {y2} {width - 8} {y2}"
        shapes.append(el("path", d=path, cls="arc", data_from=a, data_to=b))
    dots = [el("circle", cx=width - 8, cy=ROW * (i + 0.5), r=4, cls="node", data_row=i) for i in range(rows)]
    return el("svg", shapes, dots, width=width, height=ROW * rows, cls="arcs", aria_hidden="true")
