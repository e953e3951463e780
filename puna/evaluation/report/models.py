"""The report's sections on what came out: training curves, bits per byte, verified tasks, refusals, and quantisation."""

from itertools import accumulate
from typing import Any

from puna.evaluation.report.charts import Curve, Mark, bars, histogram, lines, number, percent, whiskers
from puna.evaluation.report.markup import Child, Markup, el
from puna.evaluation.report.parts import (
    MISSING,
    amount,
    interval,
    mark,
    more,
    p_value,
    panel,
    panels,
    section,
    signed,
    size,
    table,
)

_OBJECTIVES = {
    "lm": "language model",
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "dpo": "preferences (DPO)",
}
_SMOOTHING = 0.03  # half of the smoothing window, as a share of the run
_SIDE_CURVES = (("grad_norm", "gradient norm"), ("lr", "learning rate"), ("tokens_per_s", "tokens per second"))


def training(found: dict[str, Any]) -> Markup:
    lead = "Loss in nats per target token, as it fell: every step in grey, smoothed in blue, on held-out text as dots."
    shown = [_run(run) for run in found["training"]]
    return section("training", "Training", lead, panels(shown) if shown else MISSING)


def _run(run: dict[str, Any]) -> Markup:
    curve, facts = run["curve"], []
    for key, form in (
        ("parameters", "{} parameters"),
        ("steps", "{} steps"),
        ("tokens", "{} tokens"),
        ("tokens_per_s", "{} tokens/s"),
    ):
        if key in run:
            facts.append(form.format(amount(run[key])))
    if "mfu" in run:
        facts.append(f"{run['mfu']:.0%} of the measured peak")
    title = [run["name"], el("small", f" {_OBJECTIVES.get(run['objective'], '')}")]
    if "loss" not in curve:
        return panel(title, el("p", ", ".join(facts), cls="note"), MISSING)
    curves = [
        Curve(label="each step", points=list(zip(curve["step"], curve["loss"])), style="raw"),
        Curve(label="smoothed", points=list(zip(curve["step"], _smooth(curve["loss"])))),
    ]
    if curve["val_loss"]:
        curves.append(Curve(label="held out", points=curve["val_loss"], style="points"))
    others = [
        lines([Curve(label="", points=list(zip(curve["step"], curve[key])))], x_label="step", y_label=label, zero=True)
        for key, label in _SIDE_CURVES
        if key in curve
    ]
    return panel(
        title,
        lines(curves, x_label="step", y_label="loss, nats"),
        el("p", ", ".join(facts), cls="note"),
        more("gradient norm, learning rate, speed", others) if others else None,
    )


def _smooth(values: list[float]) -> list[float]:
    """The mean of a window around each point, which does not lag as a running average does; narrower at the start."""
    half, sums = max(1, round(_SMOOTHING * len(values))), [0.0, *accumulate(values)]
    smoothed = []
    for i in range(len(values)):
        low, high = i - min(half, i), min(len(values), i + min(half, i) + 1)
        smoothed.append((sums[high] - sums[low]) / (high - low))
    return smoothed


def bits(found: dict[str, Any]) -> Markup:
    lead = (
        "How many bits each byte of held-out text costs; fewer is better. All are charged for the same bytes. Whiskers are "
        "95% intervals over documents: how much a value depends on which documents happened to be held out."
    )
    measured = [r for r in found["results"] if r.get("bits_per_byte") and r["kind"] != "quantised"]
    rivals = list((found["baselines"] or {}).get("baselines", {}).values())
    if not measured and not rivals:
        return section("bits", "Held-out bits per byte", lead, MISSING)
    marks = [mark(r["checkpoint"], r["bits_per_byte"]["overall"], tone="model") for r in measured]
    ordered = sorted(rivals, key=lambda b: b["bits_per_byte"]["overall"]["value"])
    marks += [mark(b["label"], b["bits_per_byte"]["overall"], note=_prior(b)) for b in ordered]
    base = next((m.value for m in marks if m.tone == "model"), None)
    chart = el("div", bars(marks, unit="bits per byte", reference=base), cls="wide-labels panel")
    training = (found["baselines"] or {}).get("training")
    note = (
        f"The n-gram models and the last xz read {size(training['bytes'])} of training text first. " if training else ""
    )
    missing = None if measured else el("p", "The model itself: not measured.", cls="missing")
    same = (
        el("p", f"{note}The dashed line is the first model's value.", cls="note")
        if measured
        else el("p", note, cls="note")
    )
    return section("bits", "Held-out bits per byte", lead, missing, chart, same, _by_source(measured, rivals))


def _prior(baseline: dict[str, Any]) -> str:
    return {"training text": "read the training text", "other excerpts": "read the excerpts before"}.get(
        baseline["prior"], ""
    )


def _by_source(measured: list[dict], rivals: list[dict]) -> Markup | None:
    columns = [(r["checkpoint"], r["bits_per_byte"]) for r in measured]
    columns += [(b["label"], b["bits_per_byte"]) for b in rivals if "by_source" in b["bits_per_byte"]]
    sources = sorted({s for _, report in columns for s in report.get("by_source", {})})
    if not sources:
        return None
    rows = []
    for source in sources:
        cells = [report.get("by_source", {}).get(source) for _, report in columns]
        count = next((c["n"] for c in cells if c), 0)
        rows.append([source, f"{count:,}", *(f"{c['value']:.3f}" if c else "" for c in cells)])
    heads = ["source", "excerpts", *(name for name, _ in columns)]
    return more("bits per byte by source", table(heads, rows, numeric=range(1, len(heads))))


def tasks(found: dict[str, Any]) -> Markup:
    lead = (
        "Tasks whose answers a program verifies, on names, facts, operands and functions that training never saw. A dot "
        "is the share of items passed, the whisker its 95% interval (Wilson), the dashed line what guessing would get."
    )
    tested = [r for r in found["results"] if r.get("tasks")]
    if not tested:
        return section("tasks", "Verified tasks, stage by stage", lead, MISSING, _promotions(found))
    names = list(dict.fromkeys(name for r in tested for name in r["tasks"] if name != "all"))
    shown = [_task(name, tested) for name in (["all"] if any("all" in r["tasks"] for r in tested) else []) + names]
    return section(
        "tasks",
        "Verified tasks, stage by stage",
        lead,
        panels(shown, three=True),
        _task_table(names, tested),
        _comparisons(found),
        _promotions(found),
    )


def _task(name: str, tested: list[dict[str, Any]]) -> Markup:
    present = [r for r in tested if name in r["tasks"]]
    scores = [r["tasks"][name] for r in present]
    totals = sorted({s["total"] for s in scores})
    items = f" {totals[0]:,} items" if len(totals) == 1 else f" {totals[0]:,} to {totals[-1]:,} items"
    title = "all tasks together" if name == "all" else name
    marks = [
        mark(r["checkpoint"], s, tone="plain" if r["kind"] == "quantised" else "model") for r, s in zip(present, scores)
    ]
    return panel([title, el("small", items)], whiskers(marks, chance=max(s.get("chance") or 0 for s in scores)))


def _task_table(names: list[str], tested: list[dict[str, Any]]) -> Markup:
    rows = []
    for name in ["all", *names]:
        cells = [r["tasks"].get(name) for r in tested]
        rows.append([name, *(f"{s['passed']}/{s['total']} ({interval(s)})" if s else "" for s in cells)])
    heads = ["task", *(r["checkpoint"] for r in tested)]
    return more("the numbers as a table", table(heads, rows, numeric=range(1, len(heads))))


def _comparisons(found: dict[str, Any]) -> list[Markup] | None:
    if not found["comparisons"]:
        return None
    rows = [
        (
            c["before"],
            c["after"],
            f"{c['wins']:,}",
            f"{c['losses']:,}",
            f"{c['ties']:,}",
            _difference(c["difference"]),
            p_value(c["p_value"]),
        )
        for c in found["comparisons"]
    ]
    heads = ("from", "to", "items won", "lost", "same", "difference (95% interval)", "McNemar, exact")
    return [el("h3", "Each model against the one before, item by item"), table(heads, rows, numeric=(2, 3, 4, 5, 6))]


def _difference(estimate: dict[str, Any]) -> str:
    return f"{_points(estimate['value'])} points ({interval(estimate, _points)})"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _promotions(found: dict[str, Any]) -> list[Markup]:
    heading = el("h3", "Promotion decisions")
    if not found["promotions"]:
        return [heading, el("p", "No promotion was decided in this run.", cls="missing")]
    rows = []
    for d in found["promotions"]:
        verdict = el(
            "span", "promoted" if d["promoted"] else "kept the old", cls=f"verdict {'yes' if d['promoted'] else 'no'}"
        )
        compared = d.get("comparison") or {}
        change = _difference(compared["difference"]) if "difference" in compared else ""
        rows.append((d.get("round", ""), d["candidate"], d["incumbent"], verdict, change, d.get("reason", "")))
    return [heading, table(("round", "candidate", "against", "decision", "difference", "why"), rows)]


def refusals(found: dict[str, Any]) -> Markup:
    lead = (
        'Questions about people who are in the training text, and about people who are nowhere. Saying "I don\'t know" is right '
        "only for the second. Refusing everything would score 100% there, so both rates count. Hollow marks are "
        "a control: what is expected if the same number of refusals were dealt out at random."
    )
    probed = [r for r in found["results"] if r.get("refusal")]
    shown = [_refusal(r["checkpoint"], r["refusal"]) for r in probed]
    return section("refusals", "Known and unknown", lead, panels(shown) if shown else MISSING)


def _refusal(name: str, report: dict[str, Any]) -> Markup:
    labels = (
        ("known_answered", "known: right"),
        ("known_refused", "known: refused"),
        ("unknown_refused", "unknown: refused"),
    )
    control = report.get("control") or {}
    marks = [mark(label, report.get(key), tone="model", control=control.get(key)) for key, label in labels]
    children: list[Child] = [whiskers(marks)]
    area = report.get("auc")
    if area:
        form = "{:.3f}".format
        children.append(
            el(
                "p",
                f"Area under the curve {form(area['value'])} ({interval(area, form)}); 0.5 is guessing.",
                cls="note",
            )
        )
    if report.get("curve"):
        curves = [
            Curve(label="this model", points=[tuple(p) for p in report["curve"]]),
            Curve(label="guessing", points=[(0, 0), (1, 1)], style="diagonal"),
        ]
        chart = lines(curves, x_label="share of known refused", y_label="share of unknown refused", square=True)
        children.append(more("the whole curve", chart))
    return panel(name, children)


def choices(found: dict[str, Any]) -> Markup:
    lead = (
        "Which of the given answers the model finds likeliest: by the likelihood of the whole answer, and per byte, so that long "
        "answers are not punished. A tie counts as wrong."
    )
    sets = list(dict.fromkeys(name for r in found["results"] for name in r.get("choice", {})))
    shown = []
    for name in sets:
        given = [(r, r["choice"][name]) for r in found["results"] if name in r.get("choice", {})]
        marks: list[Mark] = []
        for result, report in given:
            marks += [
                mark(result["checkpoint"], report[rule], tone="model", note=rule.replace("_", " "))
                for rule in ("raw", "per_byte")
            ]
        items = el("small", f" {given[0][1]['items']:,} items")
        shown.append(panel([name, items], whiskers(marks, chance=given[0][1]["raw"]["chance"])))
    return section("choice", "Multiple choice by likelihood", lead, panels(shown) if shown else MISSING)


def contamination(found: dict[str, Any]) -> Markup:
    lead = (
        "How much of each evaluation set lies in the training text: per example, the share of its tokens that are part of an "
        "8-gram which the training text has too (Llama 3 paper, section 5.1.4)."
    )
    sets = {name: report for r in found["results"] for name, report in r.get("contamination", {}).items()}
    shown = []
    for name, report in sets.items():
        rows = [
            (f"at least {float(t):.0%}", f"{s['passed']:,} of {s['total']:,}", percent(s["value"]), interval(s))
            for t, s in report["above"].items()
        ]
        notes = [
            f"Mean {percent(report['mean']['value'])}. {report['exact']:,} examples are a training text, word for word."
        ]
        if report["too_short"]:
            notes.append(f" {report['too_short']:,} are too short to have an 8-gram.")
        notes.append(_gain(report))
        shown.append(
            panel(
                [name, el("small", f" {report['examples']:,} examples")],
                histogram(report["histogram"], x_label="share of an example's tokens (counts on a square-root scale)"),
                table(("share of tokens", "examples", "", "95% interval"), rows, numeric=(1, 2, 3)),
                el("p", notes, cls="note"),
            )
        )
    return section("contamination", "Contamination", lead, panels(shown) if shown else MISSING)


def _gain(report: dict[str, Any]) -> str:
    chosen = report.get("gain")
    if not chosen:
        return ""
    if chosen["threshold"] is None:
        return " No threshold shows a significant gain: contamination, if any, is not seen to help."
    return f" Largest significant gain: {100 * chosen['gain']:+.1f} points at a threshold of {chosen['threshold']:.0%}."


def quantisation(found: dict[str, Any]) -> Markup:
    lead = "What smaller weights cost: change of held-out bits per byte against the full-precision model, the same documents in both."
    rows = []
    for q in found["quantisation"]:
        change = q.get("change")
        smaller = f"{q['parent_bytes'] / q['bytes']:.1f}× smaller" if q.get("parent_bytes") else ""
        rows.append(
            (
                q["name"],
                size(q["bytes"]),
                smaller,
                number(q["bits_per_byte"]["value"]) if q.get("bits_per_byte") else "not measured",
                f"{signed(change['value'])} ({interval(change, signed)})" if change else "not measured",
                q.get("parent", ""),
            )
        )
    heads = ("model", "folder", "", "bits per byte", "change (95% interval)", "against")
    return section("quantisation", "Quantisation", lead, table(heads, rows, numeric=(1, 2, 3, 4)) if rows else MISSING)
