"""A plan as a page of its own: the sheet's figures, each with its formula and source folded away, and four plots.

Loss over size for several budgets of computing; device-hours over size; what fills a device's memory and a step's time;
and one simulated run with its interruptions. Drawn with the report's charts, so both themes, paper and screen readers are served.
"""

import math
from collections.abc import Callable, Sequence

from puna.errors import ConfigError, MissingExtra
from puna.evaluation.report.charts import Curve, Mark, bars, lines
from puna.evaluation.report.markup import Markup, el
from puna.evaluation.report.page import document
from puna.evaluation.report.parts import panel, panels, section
from puna.planner import amounts
from puna.planner.amounts import bytes_, count, parameters
from puna.planner.choice import ways_to_serve
from puna.planner.figures import Figure, Section
from puna.planner.layouts import WORDS
from puna.planner.plan import Plan
from puna.planner.wish import DAY_S, Foresight

BUDGETS = ((0.25, "raw"), (1.0, "smooth"), (4.0, "raw"))  # times the plan's computing
POINTS = 25  # of a curve


def page(plan: Plan, found: Sequence[Section], foresight: Foresight) -> str:
    """The whole document."""
    wish, choice = plan.wish, plan.choice
    title = f"{parameters(choice.config)} on {count(choice.tokens)} tokens"
    lead = (
        f"A plan for {wish.devices:,} x {wish.device.name}, {amounts.seconds(choice.train_seconds)}. Formulas and sources "
        "are under each figure; nothing here was measured on the machine it is about."
    )
    named = {s.title: s for s in found}
    body = [el("header", el("h1", title), el("p", lead, cls="lead"), _tiles(plan, foresight.benchmark))]
    if plan.refused:
        body.append(_told(named["Not possible as asked"], "refused"))
    body += [
        _told(named["Why"], "why", _sizes(plan, foresight)),
        _told(named["Expected"], "expected"),
        _told(named["Layout"], "layout", _filled(plan)),
        _told(named["Time"], "time", _timeline(plan)),
        *(
            _told(named[t], t.split()[0].lower())
            for t in ("Cost", "Serving", "Tokens beyond the optimum", "Risk")
            if t in named
        ),
        _told(named["What would change the answer"], "changes"),
        el("footer", "Made by puna plan; the same figures for machines: --json."),
    ]
    links = [
        ("why", "Why"),
        ("layout", "Layout"),
        ("time", "Time"),
        ("cost", "Cost"),
        ("risk", "Risk"),
        ("changes", "Changes"),
    ]
    return document(f"Plan: {title}", body, [link for link in links if link[0] != "risk" or "Risk" in named])


def _tiles(plan: Plan, benchmark: str) -> Markup:
    choice = plan.choice
    tiles = [
        ("loss expected", f"{choice.total_loss:.3f}", f"90% interval {choice.loss[1]:.3f} to {choice.loss[2]:.3f}"),
        ("time", amounts.seconds(choice.train_seconds), f"{choice.steps:,} steps"),
        ("training, device-hours", f"{choice.train_hours:,.0f}", _price(plan, choice.train_hours)),
    ]
    if plan.wish.serve_tokens and choice.serving:
        note = f"{count(plan.wish.serve_tokens)} tokens{_price(plan, choice.serve_hours, ', ')}"
        tiles.append(("serving, device-hours", f"{choice.serve_hours:,.0f}", note))
    if plan.accuracy:
        value, low, high = plan.accuracy
        tiles.append((f"{benchmark} expected", f"{value:.0%}", f"90% interval {low:.0%} to {high:.0%}"))
    made = [
        el("li", el("div", what, cls="what"), el("div", figure, cls="figure"), el("div", note, cls="interval"))
        for what, figure, note in tiles
    ]
    return el("ul", made, cls="tiles")


def _price(plan: Plan, hours: float, before: str = "") -> str:
    price = plan.money(hours)
    return f"{before}{amounts.money(price)}" if price is not None else ""


def _told(part: Section, id: str, *plots: Markup) -> Markup:
    rows = [_row(figure) for figure in part.figures]
    table = el("div", el("table", el("tbody", rows)), cls="scroll full", tabindex=0)
    return section(id, part.title, "", *plots, table)


def _row(figure: Figure) -> Markup:
    why = [
        el("p", f"{name}: {getattr(figure, name)}", cls="note")
        for name in ("formula", "source")
        if getattr(figure, name)
    ]
    told = el("details", el("summary", "where from"), why) if why else None
    if not figure.label:
        return el("tr", el("td", figure.text, told, colspan=2, cls="wide"))
    return el("tr", el("th", figure.label, scope="row"), el("td", figure.text, told, cls="wide"))


def _sizes(plan: Plan, foresight: Foresight) -> Markup:
    return panels(
        [
            panel("Loss over size, for the same computing", _isoflop(plan, foresight)),
            panel("Device-hours over size", _hours(plan)),
        ]
    )


def _isoflop(plan: Plan, foresight: Foresight) -> Markup:
    """Each curve is one budget: on its left few parameters see many tokens, on its right many see few."""
    choice = plan.choice
    spread = [math.log10(c.config.parameters) for c in (*plan.ladder, choice)]
    low, high = min(spread) - 0.1, max(spread) + 0.3
    length = plan.wish.sequence_length
    curves = []
    for times, style in BUDGETS:
        points = []
        for i in range(POINTS):
            config = foresight.shape(10 ** (low + (high - low) * i / (POINTS - 1)), length)
            tokens = times * choice.flops / config.train_flops_per_token(length)
            points.append((math.log10(config.parameters), foresight.loss(config, tokens)[0]))
        name = amounts.flops(times * choice.flops)
        curves.append(Curve(label=f"{name}, this plan's" if times == 1 else name, points=points, style=style))
    here = (math.log10(choice.config.parameters), choice.loss[0])
    curves.append(Curve(label="chosen", points=[here], style="points"))
    return lines(curves, x_label="parameters", y_label="loss, nats per token", at=_powers(low, high))


def _hours(plan: Plan) -> Markup:
    train, both = [], []
    for c in plan.ladder:
        x = math.log10(c.config.parameters)
        train.append((x, c.train_hours / 1000))
        ways = {way.serving.bits: way for way in ways_to_serve(c, plan.wish) if way.serving}
        same = ways.get(plan.choice.serving.bits if plan.choice.serving else 16, c)
        both.append((x, same.hours / 1000))
    curves = [Curve(label="training", points=train, style="diagonal")]
    if plan.wish.serve_tokens:
        curves.append(Curve(label=f"and serving {count(plan.wish.serve_tokens)} tokens", points=both, style="smooth"))
    x = math.log10(plan.choice.config.parameters)
    curves.append(Curve(label="chosen", points=[(x, plan.choice.hours / 1000)], style="points"))
    xs = [p[0] for c in curves for p in c.points]
    return lines(curves, x_label="parameters", y_label="thousand device-hours", zero=True, at=_powers(min(xs), max(xs)))


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Labels of a logarithmic axis at 1, 2 and 5 times powers of ten, as many as have room."""
    ticks = [(p + math.log10(m), m * 10**p) for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [(x, count(value)) for x, value in ticks if low <= x <= high]
    return inside if len(inside) <= 6 else [tick for tick in inside if tick[1][0] == "1"] or inside[::3]


def _filled(plan: Plan) -> Markup:
    best = plan.choice.found.best
    room = plan.wish.device.memory_bytes
    held = [Mark(label=kind, value=size / 1e9, tone="model") for kind, size in best.memory.by_kind().items()]
    held.append(Mark(label="free", value=max(0.0, room - best.memory.total) / 1e9))
    spent = [
        Mark(label=WORDS[name], value=seconds / best.step.seconds, tone="model" if i == 0 else "plain")
        for i, (name, seconds) in enumerate(best.step.parts.items())
        if seconds > 0.002 * best.step.seconds
    ]
    return panels(
        [
            panel(f"A device's memory, {bytes_(room)}", bars(held, unit="GB", form="{:.1f}".format)),
            panel(
                f"A step, {amounts.seconds(best.step.seconds)}", bars(spent, unit="share of the step", form=_percent)
            ),
        ]
    )


_percent: Callable[[float], str] = "{:.1%}".format


def _timeline(plan: Plan) -> Markup:
    """One simulated run: tokens over days, each interruption a dot."""
    from dataclasses import replace

    from puna.planner.simulator import simulate

    choice = plan.choice
    scenario = choice.risk.scenario
    if scenario is None:
        return panel("One simulated run", el("p", "nobody has counted what interrupts such a machine", cls="missing"))
    days = min(3650.0, choice.train_seconds / DAY_S)
    try:
        run = simulate(replace(scenario, days=max(days, 0.01)), seed=0)
    except (MissingExtra, ConfigError) as error:
        return panel("One simulated run", el("p", error.message, cls="missing"))
    each = choice.found.best.work.tokens / 1e9
    progress = [(second / DAY_S, steps * each) for second, steps in run.progress]
    told = {e.at_s: e.cause for e in run.events}
    stops = [Curve(label="", points=[(at / DAY_S, _height(progress, at / DAY_S))], style="points") for at in told]
    causes: dict[str, int] = {}
    for cause in told.values():
        causes[cause] = causes.get(cause, 0) + 1
    listed = ", ".join(f"{cause} {n}" for cause, n in sorted(causes.items(), key=lambda item: -item[1])) or "none"
    curves = [Curve(label="tokens that count", points=progress, style="smooth"), *stops]
    return panel(
        "One simulated run",
        lines(curves, x_label="days", y_label="billion tokens", zero=True),
        el(
            "p",
            f"{len(told)} interruptions (dots): {listed}. {run.effective:.1%} of the time trained; another seed, another run.",
            cls="note",
        ),
    )


def _height(progress: Sequence[tuple[float, float]], at: float) -> float:
    """Of the curve at a day."""
    before = [p for p in progress if p[0] <= at] or [progress[0]]
    after = [p for p in progress if p[0] > at] or [before[-1]]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
