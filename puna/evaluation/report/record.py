"""The report's sections on the run itself: samples, speed, where the time went, lineage, settings, environment."""

import json
from typing import Any

from puna.evaluation.report.charts import Mark, arcs, bars, number
from puna.evaluation.report.markup import Markup, el
from puna.evaluation.report.parts import MISSING, more, panel, panels, section, size, table
from puna.log import duration

_SPEAKERS = {"ipython": "tool result"}


def samples(found: dict[str, Any], limit: int) -> Markup:
    lead = "What the models say, as they said it, tool calls and tool results included; the first samples of each, not the best."
    shown = []
    for result in found["results"]:
        given = result.get("samples") or []
        cards = [_sample(s) for s in given[:limit]]
        if cards:
            shown.append(
                el(
                    "details",
                    el("summary", f"{result['checkpoint']}: {len(cards)} of {len(given)} samples"),
                    panels(cards),
                )
            )
    if shown:  # the last model's are the ones to read first
        shown[-1] = Markup(shown[-1].replace("<details>", "<details open>", 1))
    return section("samples", "Samples", lead, shown[::-1] or el("p", "No samples were kept.", cls="missing"))


def _sample(sample: dict[str, Any]) -> Markup:
    passed = sample.get("passed")
    verdict = None
    if passed is not None:
        verdict = el("span", "passed" if passed else "failed", cls=f"verdict {'yes' if passed else 'no'}")
    note = el("p", sample["note"], cls="note") if sample.get("note") else None
    turns = [_turn(m) for m in sample.get("dialog", ())]
    return panel([sample.get("title", "sample"), " ", verdict], el("div", turns, cls="talk"), note)


def _turn(message: dict[str, Any]) -> Markup:
    role = message.get("role", "")
    calls = [el("div", _call(c), cls="call") for c in message.get("tool_calls", ())]
    said = el("div", message["content"], cls="text") if message.get("content") else None
    if not said and not calls:
        said = el("div", "(nothing)", cls="missing")
    return el(
        "div", el("span", _SPEAKERS.get(role, role), cls="who"), said, calls, cls=role if role.isidentifier() else None
    )


def _call(call: dict[str, Any]) -> str:
    arguments = call.get("arguments", {})
    if call.get("dialect") == "python" and isinstance(arguments.get("code"), str):
        return arguments["code"]
    given = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in arguments.items())
    return f"{call.get('name', '')}({given})"


def speed(found: dict[str, Any]) -> Markup:
    lead = "Measured in this run, on the machine below, beside whatever else it was doing."
    measured: dict[str, dict[str, float]] = {}
    for run in found["training"]:
        if run.get("tokens_per_s"):
            measured[run["name"]] = {"training, tokens/s (median step)": run["tokens_per_s"]}
    for result in found["results"]:
        for key, value in (result.get("speed") or {}).items():
            measured.setdefault(result["checkpoint"], {})[_unit(key)] = value
    measures = list(dict.fromkeys(key for each in measured.values() for key in each))
    rows = [(name, *(number(each[m]) if m in each else "" for m in measures)) for name, each in measured.items()]
    shown = table(("", *measures), rows, numeric=range(1, len(measures) + 1)) if rows else MISSING
    return section("speed", "Speed", lead, shown)


def _unit(name: str) -> str:
    """`decode_tokens_per_s` as `decode tokens/s`."""
    return name.replace("_per_", "/").replace("_", " ")


def time(found: dict[str, Any]) -> Markup:
    total = found["run"]["seconds"]
    lead = f"{duration(total)} in all stages together. A stage that was interrupted counts from its last start."
    longest = max((a["seconds"] for a in found["lineage"]), default=0)
    marks = [
        Mark(label=a["name"], value=a["seconds"], tone="best" if a["seconds"] == longest else "plain", note=a["stage"])
        for a in found["lineage"]
    ]
    chart = el("div", bars(marks, unit="wall-clock time", form=duration), cls="wide-labels panel")
    return section("time", "Where the time went", lead, chart if marks else MISSING)


def lineage(found: dict[str, Any]) -> Markup:
    lead = "Every artifact, in the order of making; an arc leads from each input to what was made of it. The digest is of the content."
    made = found["lineage"]
    if not made:
        return section("lineage", "Lineage", lead, MISSING)
    row_of = {a["digest"]: i for i, a in enumerate(made)}
    edges = [
        (row_of[g["digest"]], i) for i, a in enumerate(made) for g in a["inputs"] if row_of.get(g["digest"], i) < i
    ]
    rows = [_artifact(a) for a in made]
    settings = [
        more(
            f"{a['name']}: {a['stage']}, settings {a['config_digest'][:12]}",
            el("pre", _pretty(a["config"])),
            _inputs(a),
        )
        for a in made
    ]
    return section(
        "lineage",
        "Lineage",
        lead,
        el("div", arcs(sorted(set(edges)), len(made)), el("ol", rows), cls="tree", tabindex=0),
        el("div", el("h3", "Settings and inputs of each stage"), settings, cls="settings"),
    )


def _artifact(a: dict[str, Any]) -> Markup:
    origin = ", ".join(f"{g['role']}: {g['name']}" for g in a["inputs"])
    return el(
        "li",
        el("b", a["name"], title=a["name"]),
        el("code", a["digest"][:12], title=a["digest"]),
        el("span", duration(a["seconds"]), cls="num"),
        el("span", size(a["bytes"]), cls="num"),
        el(
            "span",
            f"{a['stage']} ({a['kind']})" + (f" from {origin}" if origin else ""),
            cls="from",
            title=origin or None,
        ),
    )


def _inputs(a: dict[str, Any]) -> Markup | None:
    rows = [(g["role"], g["name"], el("code", g["digest"])) for g in a["inputs"]]
    return table(("input", "artifact or path", "digest"), rows) if rows else None


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def environment(found: dict[str, Any]) -> Markup:
    run = found["run"]
    rows = [("code revision", ", ".join(run["code"]))]
    rows.append(("seeds", ", ".join(map(str, run["seeds"])) or "none in the settings"))
    for machine in run["environments"]:
        rows += [(key, str(value)) for key, value in machine.items()]
    lead = "The same code, settings and inputs give the same files on the same machine."
    if len(run["environments"]) > 1:
        lead += " The stages of this run were made in more than one environment."
    return section("environment", "Environment", lead, table(("", ""), rows))
