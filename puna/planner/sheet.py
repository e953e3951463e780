"""A plan as sections of figures, each with its formula and its source: what all three faces of `puna plan` show.

text      one page for a terminal; with `--explain` formula and source under each figure
html      the same with plots (`drawn.py`)
json      the same for machines

`sheet_model.py` has the figures about the model, `sheet_run.py` those about the run.
"""

from typing import Any

from puna.planner import sheet_model, sheet_run
from puna.planner.changes import changes
from puna.planner.figures import Figure, Section
from puna.planner.plan import Plan
from puna.planner.wish import DAY_S, Foresight


def sections(plan: Plan, foresight: Foresight) -> list[Section]:
    """The whole plan, in the order in which one asks."""
    found = [
        Section("Answer", tuple(sheet_model.answer(plan))),
        Section("Why", tuple(sheet_model.why(plan))),
        Section("Expected", tuple(sheet_model.expected(plan, foresight))),
        Section("Layout", tuple(sheet_run.layout(plan))),
        Section("Time", tuple(sheet_run.time(plan))),
        Section("Cost", tuple(sheet_run.cost(plan))),
        Section("Serving", tuple(sheet_model.serving(plan))),
        Section("Tokens beyond the optimum", tuple(sheet_model.beyond(plan, foresight))),
        Section("Risk", tuple(sheet_run.risk(plan))),
        Section("What would change the answer", tuple(Figure("", line, line) for line in changes(plan, foresight))),
    ]
    if plan.refused:
        found.insert(0, Section("Not possible as asked", tuple(Figure("", line, line) for line in plan.refused)))
    return [section for section in found if section.figures]


def text(found: list[Section], *, explain: bool = False, width: int = 112) -> str:
    """The sections as one page; with `explain` the formula and source of each figure below it."""
    lines: list[str] = []
    for section in found:
        lines += ["", section.title.upper() if not lines else section.title]
        for figure in section.figures:
            label = f"  {figure.label:<22}" if figure.label else "  "
            lines += _wrapped(label, figure.text, width)
            if explain:
                for name in ("formula", "source"):
                    if getattr(figure, name):
                        lines += _wrapped(" " * 26 + f"{name}: ", getattr(figure, name), width)
    return "\n".join(lines[1:])


def _wrapped(start: str, text: str, width: int) -> list[str]:
    import textwrap

    indent = " " * (24 if start.strip() and not start.startswith(" " * 10) else len(start) if start.strip() else 4)
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=indent) or [start]


def to_json(plan: Plan, found: list[Section]) -> dict[str, Any]:
    """The plan for machines: every figure by section and label, then the plain numbers that programs look for first."""
    choice = plan.choice
    return {
        "granted": plan.granted,
        "refused": list(plan.refused),
        "parameters": choice.config.parameters,
        "tokens": choice.tokens,
        "days": choice.train_seconds / DAY_S,
        "intervals": {"tokens": plan.tokens[1:], "days": [s / DAY_S for s in plan.seconds[1:]]},
        "loss": list(choice.loss),
        "accuracy": list(plan.accuracy) if plan.accuracy else None,
        "layout": str(choice.found.best.layout),
        "recompute": choice.found.best.work.recompute,
        "tokens_per_s": choice.found.best.step.tokens_per_s,
        "mfu": choice.found.best.step.mfu(),
        "train_device_hours": choice.train_hours,
        "serve_device_hours": choice.serve_hours,
        "money": plan.money(choice.hours),
        "sections": {s.title: s.to_json() for s in found},
    }
