"""A fit as a page to read: curves at each budget, the best size against compute, predicted runs, over-training, warnings."""

import math
from typing import Any

import numpy as np

from puna.evaluation.report.charts import Curve, lines
from puna.evaluation.report.markup import Markup, el
from puna.evaluation.report.page import document
from puna.evaluation.report.parts import panel, panels, section, table
from puna.scaling.law import Law
from puna.scaling.overtraining import Overtraining, along_ratios

_METHODS = {"parametric": "parametric law", "isoflop": "isoFLOP parabolas", "envelope": "envelope"}
_COUNTS = {
    "all": "all weights, embeddings included",
    "matrices": "weights in matrices, the output head included and the input embedding not",
    "body": "weights without embedding and head",
}


def fit_page(found: dict[str, Any], law: Law) -> str:
    """The page of what `stage.analysed` found."""
    sections = (
        _head(found),
        _curves(found),
        _best(found, law),
        _predicted(found),
        _ratios(found, law),
        _warnings(found),
        _points(found),
        el("footer", "The same numbers for machines are in fit.json; law.json answers `puna scale ask`."),
    )
    links = [("curves", "Curves"), ("best", "Best size"), ("predicted", "Predicted"), ("ratios", "Tokens"),
             ("warnings", "Warnings"), ("runs", "Runs")]  # fmt: skip
    return document(f"Scaling law: {found['name']}", sections, links)


def _head(found: dict[str, Any]) -> Markup:
    law = found["law"]
    runs = found["runs"]
    said = (
        f"{runs['fitted']} runs fitted, {runs['predicted']} predicted. N counts {_COUNTS[found['counts']]}. "
        "All intervals are 90%."
    )
    formula = f"L(N, D) = {law['e']:.4g} + {law['a']:.4g} / N^{law['alpha']:.4f} + {law['b']:.4g} / D^{law['beta']:.4f}"
    return el(
        "header", el("h1", f"Scaling law: {found['name']}"), el("p", said, cls="lead"), el("p", el("code", formula))
    )


def _curves(found: dict[str, Any]) -> Markup:
    lead = "Held-out loss at each budget against tokens (more tokens: a smaller model), and the parabola through it."
    shown = []
    for curve in found.get("isoflop", {}).get("curves", ()):
        near = [p for p in found["points"] if p["fitted"] and math.isclose(p["budgets"], curve["flops"], rel_tol=1e-6)]
        dots = sorted((math.log10(p["tokens"]), p["loss"]) for p in near)
        x = np.linspace(dots[0][0], dots[-1][0], 60)
        shift = x * math.log(10) - curve["middle"]
        p, q, r = curve["coefficients"]
        line = list(zip(x.tolist(), (p + q * shift + r * shift**2).tolist()))
        best = curve["tokens"]
        shown.append(
            panel(
                f"{curve['flops']:.2g} FLOPs",
                lines(
                    [Curve(label="parabola", points=line), Curve(label="runs", points=dots, style="points")],
                    x_label="log10 of tokens",
                    y_label="loss, nats per token",
                ),
                el("p", f"lowest at {_est(best)} tokens, {short(curve['parameters'])} parameters", cls="note"),
            )
        )
    return section(
        "curves", "Losses at each budget", lead, panels(shown) if shown else el("p", "no budget has a curve")
    )


def _best(found: dict[str, Any], law: Law) -> Markup:
    lead = "How the best size grows with compute, N* ~ C^a, by each method; and what to train for more compute."
    exponents = [
        (_METHODS[m], f"{e['value']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}") for m, e in found["exponents"].items()
    ]
    rows = []
    for flops, answers in found["optima"].items():
        for method, o in answers.items():
            loss = o["loss"]
            told = f"{loss['value']:.4f} ({loss['low']:.4f} to {loss['high']:.4f})" if loss else ""
            rows.append((flops, _METHODS[method], _est(o["parameters"]), _est(o["tokens"]), told))
    heads = ("FLOPs", "by", "parameters", "tokens", "loss")
    chart = _frontier_chart(found, law)
    return section(
        "best", "The best size", lead, table(("method", "a", "90% interval"), exponents, numeric=(1, 2)),
        table(heads, rows, numeric=(0, 2, 3, 4)), panels([chart]) if chart else None,
    )  # fmt: skip


def _frontier_chart(found: dict[str, Any], law: Law) -> Markup | None:
    curves = found.get("isoflop", {}).get("curves")
    if not curves:
        return None
    dots = [(math.log10(c["flops"]), math.log10(c["parameters"])) for c in curves]
    x = np.linspace(dots[0][0], dots[-1][0] + 2, 40)
    by_law = [(float(v), math.log10(law.optimum(10**v, per_parameter=_each(found)).parameters.value)) for v in x]
    return panel(
        "Best size against compute",
        lines(
            [
                Curve(label="parametric law", points=by_law),
                Curve(label="minima of the parabolas", points=dots, style="points"),
            ],
            x_label="log10 of FLOPs",
            y_label="log10 of parameters",
        ),
    )


def _predicted(found: dict[str, Any]) -> Markup:
    lead = "Runs that the law was fitted without: the measured loss beside the prediction."
    rows = []
    for kind, what in (("predicted", "beyond the largest budget"), ("by_size", "its size left out")):
        for e in found["errors"][kind]:
            p = e["predicted"]
            inside = "yes" if p["low"] <= e["loss"] <= p["high"] else "no"
            rows.append((what, short(e["parameters"]), short(e["tokens"]), f"{e['loss']:.4f}", f"{p['value']:.4f}",
                         f"{100 * e['error']:+.2f}%", inside))  # fmt: skip
    heads = ("kept out", "parameters", "tokens", "measured", "predicted", "error", "inside the interval")
    return section("predicted", "Predicted runs", lead, table(heads, rows, numeric=(1, 2, 3, 4, 5)))


def _ratios(found: dict[str, Any], law: Law) -> Markup:
    flops = max(p["budgets"] for p in found["points"] if p["fitted"])
    ratios = np.geomspace(1, 10_000, 33)
    told = along_ratios(law, flops, ratios.tolist())
    curves = [
        Curve(label="loss", points=[(math.log10(r), e.value) for r, e in told]),
        Curve(label="90% interval", points=[(math.log10(r), e.low) for r, e in told], style="raw"),
        Curve(label="", points=[(math.log10(r), e.high) for r, e in told], style="raw"),
    ]
    lead = (
        "The largest budget spent at other ratios of tokens to parameters. Runs were made at "
        f"{law.seen.ratio[0]:.3g} to {law.seen.ratio[1]:.3g} tokens per parameter; beyond them the interval grows by "
        f"{100 * law.drift:.2g}% of loss for each factor of ten, as measured by hiding the outermost runs."
    )
    chart = lines(curves, x_label="log10 of tokens per parameter", y_label="loss, nats per token")
    return section("ratios", "More or fewer tokens", lead, panels([panel(f"{flops:.2g} FLOPs", chart)]))


def _warnings(found: dict[str, Any]) -> Markup:
    listed = el("ul", [el("li", w) for w in found["warnings"]]) if found["warnings"] else el("p", "none")
    return section("warnings", "Warnings", "What stands against these numbers.", listed)


def _points(found: dict[str, Any]) -> Markup:
    rows = [
        (f"{p['budgets']:.3g}", short(p["parameters"]), short(p["tokens"]), f"{p['tokens'] / p['parameters']:.3g}",
         f"{p['loss']:.4f}", "" if p["fitted"] else "predicted")
        for p in found["points"]
    ]  # fmt: skip
    heads = ("FLOPs", "parameters", "tokens", "tokens per parameter", "loss", "")
    return section("runs", "Runs", "Every run.", table(heads, rows, numeric=range(5)))


def overtraining_page(law: Law, compared: Overtraining, title: str) -> str:
    """One page about a size and its tokens: what training beyond the compute-optimal point cost and bought."""
    sections = (
        el("header", el("h1", title), el("p", f"By the law {law.name!r}: {law.source}. Intervals are 90%.", cls="lead")),
        section("numbers", "Cost and gain", "The same model beside the compute-optimal ones.",
                table(("", ""), overtraining_rows(compared))),
        _tokens_chart(law, compared),
        el("footer", "Losses are those of the law's own text and tokenizer: their differences carry over, they do not."),
    )  # fmt: skip
    return document(title, sections, [("numbers", "Cost and gain"), ("tokens", "Tokens")])


def overtraining_rows(c: Overtraining) -> list[tuple[str, str]]:
    """The comparison as lines of text, for the page and the terminal."""
    rows = [
        ("parameters, tokens", f"{short(c.parameters)}, {short(c.tokens)} ({c.ratio:,.0f} per parameter)"),
        ("training FLOPs", f"{c.flops:.3g}"),
        ("loss", _loss(c.loss)),
        ("compute-optimal tokens for this size", f"{_est(c.optimal_tokens._asdict())}; this is {c.times_optimal:.0f} times that"),
        ("loss there", _loss(c.loss_there)),
        ("bought: loss below the compute-optimal run of this size", f"{c.loss_there.value - c.loss.value:.4f} nats"),
        ("the same FLOPs spent optimally", f"{short(c.same_flops.parameters.value)} parameters, loss {_loss(c.same_flops.loss)}"),
        ("cost: loss above that", f"{c.loss.value - c.same_flops.loss.value:.4f} nats"),
    ]  # fmt: skip
    if c.same_loss is None:
        return [*rows, ("the same loss, trained optimally", "no amount of compute reaches it by this law")]
    return [
        *rows,
        ("the same loss, trained optimally", f"{short(c.same_loss.parameters.value)} parameters, {c.same_loss.flops:.3g} FLOPs"),
        ("cost: training compute beyond that", f"{c.flops / c.same_loss.flops:.1f} times as much"),
        ("bought: each served token is cheaper", f"by a factor of {c.served_cheaper:.1f}, in memory as well"),
        ("paid back after serving", f"{short(c.break_even_tokens)} tokens"),
    ]  # fmt: skip


def _tokens_chart(law: Law, c: Overtraining) -> Markup:
    tokens = np.geomspace(c.optimal_tokens.value / 10, c.tokens * 3, 40)
    told = [(math.log10(d), law.loss(c.parameters, float(d))) for d in tokens]
    curves = [
        Curve(label="loss", points=[(x, e.value) for x, e in told]),
        Curve(label="90% interval", points=[(x, e.low) for x, e in told], style="raw"),
        Curve(label="", points=[(x, e.high) for x, e in told], style="raw"),
        Curve(
            label="compute-optimal, and trained",
            points=[(math.log10(c.optimal_tokens.value), c.loss_there.value), (math.log10(c.tokens), c.loss.value)],
            style="points",
        ),
    ]
    chart = lines(curves, x_label="log10 of tokens", y_label="loss, nats per token")
    return section(
        "tokens", "Loss against tokens", "This size, trained on more and more.", panels([panel("this size", chart)])
    )


def _loss(e: Any) -> str:
    return f"{e.value:.4f} ({e.low:.4f} to {e.high:.4f})"


def _est(e: dict[str, float]) -> str:
    return f"{short(e['value'])} ({short(e['low'])} to {short(e['high'])})"


def short(value: float) -> str:
    """405,853,388,800 as 406B, 15e12 as 15T; what is neither parameters nor tokens of this world in full."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if limit <= value < 1e15:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:,.0f}{unit}"
    return f"{value:.3g}"


def _each(found: dict[str, Any]) -> float:
    fitted = [p for p in found["points"] if p["fitted"]]
    logs = [math.log(p["flops"] / (p["parameters"] * p["tokens"])) for p in fitted]
    return math.exp(sum(logs) / len(logs))
