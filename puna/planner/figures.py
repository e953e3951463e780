"""A figure of a plan as it is shown: how it reads, its value, its formula, and where the formula's constants are from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puna.planner.plan import Plan
from puna.planner.wish import Range

INTERVAL = "how far published runs lie from the planner (docs/planning.md)"


@dataclass(frozen=True)
class Figure:
    """One line: what it is, how it reads, the value for machines, the formula and where its constants are from."""

    label: str
    text: str
    value: Any = None
    formula: str = ""
    source: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any] | list[Any]:
        """Figures by label, those that share one as a list; of a section without labels the values."""
        if not any(f.label for f in self.figures):
            return [f.value for f in self.figures]
        found: dict[str, Any] = {}
        for f in self.figures:
            told = {"value": f.value, "formula": f.formula, "source": f.source}
            before = found.get(f.label)
            found[f.label] = told if before is None else [*(before if isinstance(before, list) else [before]), told]
        return found


def ranged(values: Range, form: Callable[[float], str]) -> str:
    """A value and, where it has one, its interval."""
    value, low, high = map(form, values)
    return value if low == high else f"{value} [{low}, {high}]"


def device_sources(plan: Plan, *names: str) -> str:
    """Where these fields of the plan's device are from."""
    sources = plan.wish.device.sources
    return "; ".join(f"{name}: {sources[name]}" for name in names if name in sources)
