"""What a simulation found, as one JSON value and as a page of text.

    Study, Turned, Sweep --collect--> one JSON value --text--> a terminal
                                                     --reliability_page.page--> HTML

Shares are of all time, 0 to 1. Nothing is computed in the pages that is not in the JSON.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from puna import config
from puna.log import duration
from puna.planner import account as to
from puna.planner.expected import daly_interval_s, expected, young_interval_s
from puna.planner.knobs import Turned
from puna.planner.run import HELP, PLANNED, STARTING, STAYED
from puna.planner.scenario import Scenario
from puna.planner.study import AXES, Study, Sweep

SHOWN_CAUSES = 12
SHOWN_KNOBS = 6
LEAST_SHOWN = 0.0005  # effects below 0.05 points are not worth a line


def collect(found: Study, *, turned: Sequence[Turned] = (), sweeps: Sequence[Sweep] = ()) -> dict[str, Any]:
    """All that the pages show."""
    scenario, first = found.scenario, found.runs[0]
    stall = scenario.times.save_stall_s
    between = _finite(scenario.between_faults_s)
    best = {}
    if between and stall:
        seconds = {"young": young_interval_s(stall, between), "daly": daly_interval_s(stall, between)}
        best = {name: {"seconds": s, "steps": s / scenario.step_s} for name, s in seconds.items()}
    return {
        "scenario": config.to_json(scenario),
        "seeds": [run.seed for run in found.runs],
        "effective_training_time": _spread(found.effective),
        "steps_of_undisturbed": _spread(found.of_undisturbed),
        "steps": sum(run.steps for run in found.runs) / len(found.runs),
        "closed_form": expected(scenario),
        "unexpected": _spread(found.interruptions),
        "between_unexpected_s": between,
        "counts": {name: found.count(name) for name in (PLANNED, STARTING, HELP, STAYED)},
        "time": {kind: found.share(kind=kind) for kind in to.KINDS},
        "causes": [
            {"cause": "saves" if cause == to.RUN else cause, "times": times, "share": share}
            for cause, times, share in found.costs()
        ],
        "save_interval": best,
        "notes": notes(scenario),
        "knobs": [_turned(t) for t in sorted(turned, key=lambda t: -t.size)],
        "sweeps": [_sweep(s) for s in sweeps],
        "first_run": {
            "seed": first.seed,
            "progress": [list(point) for point in first.progress],
            "events": [asdict(event) for event in first.events],
        },
    }


def notes(scenario: Scenario) -> list[str]:
    """Settings that do not go together, found without simulating."""
    found, times, save = [], scenario.times, scenario.save
    domain = min(scenario.maintenance.domain_nodes, scenario.nodes)
    if scenario.spares < domain and scenario.maintenance.hours:
        found.append(
            f"{domain} nodes leave for maintenance together and there are {scenario.spares} spares: the run waits "
            f"{scenario.maintenance.hours:g} h every {duration(scenario.between_planned_s)}. "
            f"{domain - scenario.spares} more spares or smaller domains end that."
        )
    interval = save.every_steps * scenario.step_s
    if times.save_write_s > interval:
        found.append(
            f"a durable save takes {times.save_write_s:g} s to write and the next one begins after {interval:.0f} s: "
            f"training waits for the disk. Save every {math.ceil(times.save_write_s / scenario.step_s)} steps or more."
        )
    check = scenario.corruption
    if check.hash_every_steps > (save.kept - 1) * save.every_steps and not check.before_saves:
        found.append(
            f"wrong numbers are found up to {check.hash_every_steps} steps later, but {save.kept} saves reach only "
            f"{(save.kept - 1) * save.every_steps} steps back: keep more, or compare before each save."
        )
    if scenario.detect.step_budget_s < scenario.step_s:
        found.append(
            f"a hang is suspected after {scenario.detect.step_budget_s:g} s without progress and a step takes "
            f"{scenario.step_s:g} s: unless progress is reported within a step, healthy steps are stopped."
        )
    return found


def _spread(value: Any) -> dict[str, float | None]:
    return {name: _finite(number) for name, number in asdict(value).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _turned(turned: Turned) -> dict[str, Any]:
    def side(value: str, effect: Any) -> dict[str, Any] | None:
        return None if effect is None else {"value": value, **_spread(effect)}

    return {
        "knob": turned.knob.name,
        "yours": turned.knob.yours,
        "now": turned.now,
        "better": side(turned.better_value, turned.gain),
        "worse": side(turned.worse_value, turned.loss),
    }


def _sweep(swept: Sweep) -> dict[str, Any]:
    axis = AXES[swept.name]
    return {
        "name": swept.name,
        "title": axis.title,
        "unit": swept.unit,
        "points": [
            {"value": value, **_spread(found.effective), "closed_form": expected(found.scenario)}
            for value, found in swept.points
        ],
        "best": swept.best[0] if swept.points else None,
    }


# --- as text


def text(found: Mapping[str, Any]) -> str:
    """One page for a terminal."""
    parts = [*_head(found), "", *_time(found), "", *_causes(found)]
    for title, rows in (("change first", first_changes(found)), ("the answer hangs on", hanging(found))):
        if rows:
            parts += ["", f"{title} (one at a time, points of effective time)", *_knob_lines(rows)]
    for swept in found["sweeps"]:
        parts += ["", *_sweep_lines(swept)]
    parts += [f"note: {note}" for note in found["notes"]]
    return "\n".join(parts)


def _head(found: Mapping[str, Any]) -> list[str]:
    scenario = found["scenario"]
    nodes = -(-scenario["gpus"] // scenario["gpus_per_node"])
    effective, made = found["effective_training_time"], found["steps_of_undisturbed"]
    unexpected, counts = found["unexpected"]["mean"], found["counts"]
    every = f", one in {duration(found['between_unexpected_s'])}" if found["between_unexpected_s"] else ""
    lines = [
        f"{scenario['gpus']:,} GPUs on {nodes:,} nodes, {scenario['spares']:,} spare nodes; {scenario['days']:g} days; "
        f"a step takes {scenario['step_s']:g} s; {len(found['seeds'])} simulated runs",
        "",
        f"effective training time  {effective['mean']:.1%}   {_nine(effective)}   closed form {found['closed_form']:.1%}",
        f"steps                    {found['steps']:,.0f}   {made['mean']:.1%} of an undisturbed run's",
        f"interruptions            {unexpected:,.0f} unexpected{every}, {counts[PLANNED]:,.0f} planned; "
        f"{counts[STARTING]:,.1f} restarts failed, a person was needed {counts[HELP]:,.1f} times",
    ]
    if counts[STAYED]:
        lines.append(f"silent corruptions       {counts[STAYED]:.2f} a run stayed in the weights, noticed by nobody")
    best = found["save_interval"]
    if best:
        lines.append(
            f"durable saves            every {scenario['save']['every_steps']:,} steps; without copies in memory, best would be "
            f"every {best['young']['steps']:,.0f} (Young), {best['daly']['steps']:,.0f} (Daly)"
        )
    return lines


def _nine(spread: Mapping[str, Any]) -> str:
    if spread["n"] < 2:
        return "one run: no interval"
    return f"nine of ten runs {spread['low']:.1%} to {spread['high']:.1%}"


def _time(found: Mapping[str, Any]) -> list[str]:
    rows = sorted(found["time"].items(), key=lambda row: -row[1])
    return ["where the time went", *(f"  {kind:<14}{share:>8.2%}" for kind, share in rows if share > 0.00005)]


def _causes(found: Mapping[str, Any]) -> list[str]:
    hours = found["scenario"]["days"] * 24
    lines = [f"{'what it cost':<36}{'times':>8}{'of all time':>13}{'hours':>9}"]
    for row in found["causes"][:SHOWN_CAUSES]:
        times = f"{row['times']:,.1f}" if row["times"] else ""
        lines.append(f"  {row['cause']:<34}{times:>8}{row['share']:>13.2%}{row['share'] * hours:>9.1f}")
    rest = found["causes"][SHOWN_CAUSES:]
    if rest:
        share = sum(row["share"] for row in rest)
        lines.append(f"  {f'{len(rest)} others':<34}{'':>8}{share:>13.2%}{share * hours:>9.1f}")
    return lines


def first_changes(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The knobs that are yours and the value that gains, most first; what gains nothing is left out."""
    rows = []
    for knob in found["knobs"]:
        sides = [side for side in (knob["better"], knob["worse"]) if side and side["mean"] > LEAST_SHOWN]
        if knob["yours"] and sides:
            rows.append({**knob, "better": max(sides, key=lambda side: side["mean"]), "worse": None})
    return sorted(rows, key=lambda knob: -knob["better"]["mean"])[:SHOWN_KNOBS]


def hanging(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All knobs by the larger of both effects: where a wrong number would change the answer most."""
    return [k for k in found["knobs"] if knob_size(k) > LEAST_SHOWN][: 2 * SHOWN_KNOBS]


def knob_size(knob: Mapping[str, Any]) -> float:
    """The larger effect of a knob's two sides."""
    return max((abs(side["mean"]) for side in (knob["better"], knob["worse"]) if side), default=0.0)


def _knob_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for knob in rows:
        sides = [f"{knob['knob']} {knob['now']}"]
        for side in (knob["better"], knob["worse"]):
            if side:
                error = f" ± {100 * side['error']:.1f}" if side["error"] is not None else ""
                sides.append(f"{side['value']}: {100 * side['mean']:+.1f}{error}")
        lines.append("  " + f"{sides[0]:<52}" + "; ".join(sides[1:]))
    return lines


def _sweep_lines(swept: Mapping[str, Any]) -> list[str]:
    lines = [f"{swept['title'].lower()} ({swept['unit']}): effective training time"]
    for point in swept["points"]:
        mark = "  best" if point["value"] == swept["best"] else ""
        interval = f"{point['low']:>8.1%} to {point['high']:.1%}" if point["n"] > 1 else ""
        lines.append(f"  {point['value']:>8,g}{point['mean']:>8.1%}{interval}{mark}")
    return lines
