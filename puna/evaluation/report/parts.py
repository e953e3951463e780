"""What the report's sections are put together from: tables, panels, and numbers as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from puna.evaluation.report.charts import Mark, percent
from puna.evaluation.report.markup import Child, Markup, el

MISSING = el("p", "not measured", cls="missing")


def section(id: str, title: str, lead: str, *children: Child) -> Markup:
    return el("section", el("h2", title), el("p", lead, cls="lead"), *children, id=id, aria_label=title)


def panel(title: Child, *children: Child) -> Markup:
    return el("div", el("h3", title), *children, cls="panel")


def panels(children: Sequence[Child], *, three: bool = False) -> Markup:
    return el("div", children, cls="panels three" if three else "panels")


def more(summary: str, *children: Child) -> Markup:
    return el("details", el("summary", summary), *children)


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], *, numeric: Sequence[int] = ()) -> Markup:
    """A table; the columns whose indices are in `numeric` are right-aligned."""
    right = ["num" if i in numeric else None for i in range(len(head))]
    top = el("tr", [el("th", h, cls=c, scope="col") for h, c in zip(head, right)])
    body = [el("tr", [el("td", cell, cls=c) for cell, c in zip(row, right)]) for row in rows]
    return el("div", el("table", el("thead", top), el("tbody", body)), cls="scroll", tabindex=0)


def mark(
    label: str,
    estimate: Mapping[str, Any] | None,
    *,
    tone: str = "plain",
    note: str = "",
    control: float | None = None,
) -> Mark:
    """A chart's row from an estimate as JSON."""
    given = estimate or {}
    low, high = given.get("low"), given.get("high")
    return Mark(label=label, value=given.get("value"), low=low, high=high, tone=tone, note=note, control=control)


def size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def amount(count: float) -> str:
    """12,345 as it is; 4,210,000 as 4.21 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:,.0f}"


def interval(estimate: Mapping[str, Any], form=percent) -> str:
    """`low to high`, or nothing where there is no interval."""
    low, high = estimate.get("low"), estimate.get("high")
    return f"{form(low)} to {form(high)}" if low is not None and high is not None else ""


def signed(value: float) -> str:
    return f"{100 * value:+.2f}%".replace("-", "−")


def p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
