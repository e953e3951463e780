"""What a simulation found, as one HTML file: no network, no library; drawn with the report's own charts."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from puna.evaluation.report.charts import Curve, Mark, bars, lines, percent
from puna.evaluation.report.markup import Markup, el
from puna.evaluation.report.page import document
from puna.evaluation.report.parts import panel, panels, section, table
from puna.log import duration
from puna.planner import account as to
from puna.planner.reliability import hanging
from puna.planner.run import PLANNED

_NAVIGATION = (
    ("time", "Time"),
    ("causes", "Causes"),
    ("change", "What to change"),
    ("sweeps", "Sweeps"),
    ("timeline", "One run"),
    ("settings", "Settings"),
)
_SHOWN_EVENTS = 200


def page(found: Mapping[str, Any]) -> str:
    """The whole document for what `reliability.collect` found."""
    sections = (
        _head(found),
        _time(found),
        _causes(found),
        _change(found),
        _sweeps(found),
        timeline(found["first_run"], days=found["scenario"]["days"], step_s=found["scenario"]["step_s"]),
        section(
            "settings",
            "Settings",
            "Everything that was assumed. Save it as a file and give it to the same command with --config.",
            el("div", el("pre", json.dumps(found["scenario"], indent=1)), cls="settings"),
        ),
    )
    return document("Puna: a simulated run", sections, _NAVIGATION)


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _head(found: Mapping[str, Any]) -> Markup:
    scenario, effective = found["scenario"], found["effective_training_time"]
    unexpected = found["unexpected"]["mean"]
    between = found["between_unexpected_s"]
    tiles = [
        ("Effective training time", percent(effective["mean"]), _nine(effective, percent)),
        ("By closed form", percent(found["closed_form"]), "Young and Daly, without what only a simulation knows"),
        (
            "Steps made",
            f"{found['steps']:,.0f}",
            f"{percent(found['steps_of_undisturbed']['mean'])} of an undisturbed run",
        ),
        (
            "Interruptions",
            f"{unexpected + found['counts'][PLANNED]:,.0f}",
            f"{unexpected:,.0f} unexpected"
            + (f", one in {duration(between)}" if between else "")
            + ", the others planned",
        ),
    ]
    boxes = [
        el("li", el("div", a, cls="what"), el("div", b, cls="figure"), el("div", c, cls="interval"))
        for a, b, c in tiles
    ]
    nodes = -(-scenario["gpus"] // scenario["gpus_per_node"])
    lead = (
        f"{scenario['gpus']:,} GPUs on {nodes:,} nodes with {scenario['spares']:,} spare nodes, {scenario['days']:g} days, a step "
        f"of {scenario['step_s']:g} s, simulated {len(found['seeds'])} times."
    )
    warned = [el("p", note, cls="note") for note in found["notes"]]
    return el("header", el("h1", "A simulated run"), el("p", lead, cls="lead"), warned, el("ul", boxes, cls="tiles"))


def _nine(spread: Mapping[str, Any], form: Any) -> str:
    return f"nine of ten runs {form(spread['low'])} to {form(spread['high'])}" if spread["n"] > 1 else "one run"


def _time(found: Mapping[str, Any]) -> Markup:
    rows = [
        Mark(label=kind, value=share, tone="model" if kind in to.COUNTS else "plain")
        for kind, share in sorted(found["time"].items(), key=lambda row: -row[1])
        if share > 0
    ]
    lost = [row for row in rows if row.label != to.TRAINING]
    return section(
        "time",
        "Where the time went",
        "Every second is in one of these. Effective training time is training, with what slow nodes and warm days added to "
        "steps that count.",
        panels(
            [
                panel("All", bars(rows, unit="", form=percent)),
                panel("All but training", bars(lost, unit="", form=_fine)),
            ]
        ),
    )


def _fine(value: float) -> str:
    return f"{100 * value:.2f}%"


def _causes(found: Mapping[str, Any]) -> Markup:
    hours = found["scenario"]["days"] * 24
    marks = [Mark(label=row["cause"], value=row["share"]) for row in found["causes"][:16] if row["share"] > 0]
    rows = [
        (
            row["cause"],
            f"{row['times']:,.1f}" if row["times"] else "",
            _fine(row["share"]),
            f"{row['share'] * hours:,.1f}",
        )
        for row in found["causes"]
    ]
    return section(
        "causes",
        "What each cause cost",
        "Noticing, stopping, waiting, restarting and the steps made again, on the account of what began it.",
        panels(
            [
                panel("Share of all time", bars(marks, unit="", form=_fine)),
                panel("In numbers", table(("cause", "times", "of all time", "hours"), rows, numeric=(1, 2, 3))),
            ]
        ),
    )


def _change(found: Mapping[str, Any]) -> Markup | None:
    if not found["knobs"]:
        return None

    def side(value: Mapping[str, Any] | None) -> tuple[str, str]:
        return (value["value"], _points(value["mean"])) if value else ("", "")

    rows = [
        (k["knob"], "yours" if k["yours"] else "assumed", k["now"], *side(k["better"]), *side(k["worse"]))
        for k in hanging(found)
    ]
    head = ("one setting", "", "now", "better", "points", "worse", "points")
    return section(
        "change",
        "What to change first, and what the answer hangs on",
        "One setting at a time, everything else as it is, with the same faults: points of effective training time. What is "
        "yours can be changed; what is assumed should be measured, the larger effects first.",
        table(head, rows, numeric=(4, 6)),
    )


def _sweeps(found: Mapping[str, Any]) -> Markup | None:
    drawn = [panel(swept["title"], sweep_chart(swept)) for swept in found["sweeps"] if len(swept["points"]) > 1]
    if not drawn:
        return None
    return section(
        "sweeps",
        "One setting, varied",
        "The mean, where nine of ten runs lie, and the closed form, which knows nothing of spares.",
        panels(drawn),
    )


def sweep_chart(swept: Mapping[str, Any]) -> Markup:
    """Effective training time over the values of one setting, on a logarithmic scale."""
    points = swept["points"]
    places = {point["value"]: _place(point["value"], points) for point in points}

    def curve(label: str, key: str, style: str) -> Curve:
        return Curve(label=label, points=[(places[p["value"]], 100 * p[key]) for p in points], style=style)

    return lines(
        [
            curve("mean", "mean", "smooth"),
            curve("nine of ten runs", "low", "raw"),
            curve("", "high", "raw"),
            curve("closed form", "closed_form", "diagonal"),
            curve("simulated", "mean", "points"),
        ],
        x_label=f"{swept['title'].lower()} ({swept['unit']})",
        y_label="effective training time, %",
        at=[(places[p["value"]], f"{p['value']:,g}") for p in points],
    )


def _place(value: float, points: Sequence[Mapping[str, Any]]) -> float:
    """A logarithm, in which 0 lies as far below the smallest other value as that is from the next."""
    above = sorted(p["value"] for p in points if p["value"] > 0)
    if value > 0:
        return math.log10(value)
    first = math.log10(above[0]) if above else 0.0
    return first - (math.log10(above[1]) - first if len(above) > 1 else 1.0)


def timeline(run: Mapping[str, Any], *, days: float, step_s: float) -> Markup:
    """One simulated run: steps made over the days, and what stopped it for how long. Also for other pages."""
    made = [(second / 86_400, step * step_s / 86_400) for second, step in run["progress"]]
    stops = [(e["at_s"] / 86_400, e["down_s"] / 60) for e in run["events"]]
    longest = sorted(run["events"], key=lambda e: -e["down_s"])[:_SHOWN_EVENTS]
    rows = [
        (f"{e['at_s'] / 86_400:.2f}", e["cause"], f"{e['lost_steps']:,}", duration(e["down_s"]))
        for e in sorted(longest, key=lambda e: e["at_s"])
    ]
    left = len(run["events"]) - len(rows)
    more = el("p", f"{left:,} shorter ones are in the JSON.", cls="note") if left > 0 else None
    return section(
        "timeline",
        "One run",
        f"The run with seed {run['seed']}, {len(run['events']):,} stops. The dashed line is a run that nothing disturbs.",
        panels(
            [
                panel(
                    "Progress",
                    lines(
                        [
                            Curve(label="steps made", points=made),
                            Curve(label="undisturbed", points=[(0.0, 0.0), (days, days)], style="diagonal"),
                        ],
                        x_label="day",
                        y_label="days' worth of steps",
                        zero=True,
                    ),
                ),
                panel(
                    "Stops",
                    lines(
                        [Curve(label="a stop", points=stops, style="points")],
                        x_label="day",
                        y_label="minutes",
                        zero=True,
                    ),
                ),
            ]
        ),
        el(
            "details",
            el("summary", "The stops"),
            table(("day", "cause", "steps lost", "down"), rows, numeric=(0, 2, 3)),
            more,
        ),
    )
