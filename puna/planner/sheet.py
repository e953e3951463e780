"""A plan as sections of figures, each with its formula and its source: what all three faces of `puna plan` show.

text      one page for a terminal; with `--explain` formula and source under each figure
html      the same with plots (`drawn.py`)
json      the same for machines
"""

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from puna.planner import amounts
from puna.planner.amounts import bytes_, count, hours, money, parameters
from puna.planner.changes import changes
from puna.planner.layouts import WORDS
from puna.planner.overtraining import overtraining
from puna.planner.plan import Plan
from puna.planner.risk import SOURCE as RISK_SOURCE
from puna.planner.serving import QUANTISATION_LOSS, REACHED
from puna.planner.wish import DAY_S, Foresight, Range


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


# Of a step's parts and a rank's memory; M micro-batches, P stages, v of them on a rank, n ranks of a group.
TIMES = {
    "products": "6 x weights of a rank's matrices x its tokens / matmul",
    "attention": "2 H E T a token and layer forward / its speed, 2.5 times that backward",
    "elementwise": "bytes moved / read (puna/planner/compute.py)",
    "recomputed": "forward once more",
    "head": "6 V d a token / matmul + 36 V bytes / read",
    "tensor": "4 exchanges a layer and pass: latency + bytes (n - 1)/n / link",
    "context": "keys and values of the sequence: latency + bytes (n - 1)/n / network",
    "slowed": "hidden exchanges x comm_share",
    "bubble": "(P - 1) / (v M) of the computing",
    "pipeline": "v M / N x P sends, less what N - P micro-batches hide",
    "data": "gathers and sums: what does not fit beside a pass, and one layer's",
    "copies": "4 bytes a gathered weight, 8 a gradient, / read",
    "optimizer": "32 bytes a weight of the rank / read",
    "slowest": "mean slowest of the devices, spread x sqrt(2 ln n) or so",
}
FLAT = 0.003  # of the loss: sizes that no law can tell apart
INTERVAL = "how far published runs lie from the planner (docs/planning.md)"
SPEEDS = ("matmul", "attention", "read", "link", "network", "comm_share", "spread")  # of hardware.toml
SIZES = {
    "parameters": "4 bytes x weights / (tensor x pipeline x shard)",
    "gradients": "4 bytes, likewise",
    "optimizer": "8 bytes, likewise",
    "activations": "layers x tokens of a micro-batch x micro-batches in flight x bytes a token (docs/planning.md)",
    "head": "gradients of the output matrix and of a chunk of logits",
    "communication": "gathered weights of two layers (or all, in a pipeline), and a layer's gradients",
}


def sections(plan: Plan, foresight: Foresight) -> list[Section]:
    """The whole plan, in the order in which one asks."""
    found = [
        Section("Answer", tuple(_answer(plan))),
        Section("Why", tuple(_why(plan))),
        Section("Expected", tuple(_expected(plan, foresight))),
        Section("Layout", tuple(_layout(plan))),
        Section("Time", tuple(_time(plan))),
        Section("Cost", tuple(_cost(plan))),
        Section("Serving", tuple(_serving(plan))),
        Section("Tokens beyond the optimum", tuple(_beyond(plan, foresight))),
        Section("Risk", tuple(_risk(plan))),
        Section("What would change the answer", tuple(Figure("", line, line) for line in changes(plan, foresight))),
    ]
    if plan.refused:
        found.insert(0, Section("Not possible as asked", tuple(Figure("", line, line) for line in plan.refused)))
    return [section for section in found if section.figures]


def _answer(plan: Plan) -> Iterator[Figure]:
    choice = plan.choice
    c = choice.config
    shape = f"{c.n_layers} layers, width {c.dim:,}, {c.n_heads} heads ({c.n_kv_heads} key/value), feed-forward {c.ffn_dim:,}"
    yield Figure(
        "size", f"{parameters(c)} parameters: {shape}", c.parameters, "sum of all matrices", "puna/model/sizes.py"
    )
    each = choice.tokens / c.parameters
    asked = "as asked" if plan.wish.tokens else "tokens/s x time x effective share"
    each = f"{each:,.0f}" if each >= 100 else f"{each:.1f}"
    text = f"{_ranged(plan.tokens, count)}, {each} for each parameter"
    yield Figure("tokens", text, list(plan.tokens), asked, f"Time, Risk; interval: {INTERVAL}")
    text = f"{_ranged(plan.seconds, amounts.seconds)} on {plan.wish.devices:,} x {plan.wish.device.name}"
    days = [seconds / DAY_S for seconds in plan.seconds]
    if plan.wish.start:
        ends = [plan.wish.start + datetime.timedelta(days=min(d, 1e6)) for d in days]
        text += f"; from {plan.wish.start} to {ends[0]}" + (f" [{ends[1]}, {ends[2]}]" if days[1] < days[2] else "")
    yield Figure("time", text, days, "tokens / (tokens/s x effective share)", f"Time, Risk; interval: {INTERVAL}")


def _ranged(values: Range, form: Callable[[float], str]) -> str:
    """A value and, where it has one, its interval."""
    value, low, high = map(form, values)
    return value if low == high else f"{value} [{low}, {high}]"


def _why(plan: Plan) -> Iterator[Figure]:
    choice, best, wish = plan.choice, plan.best, plan.wish
    if plan.asked.size is not None:
        yield Figure("", "the size was given", "given")
        other = best.config
        if best is not choice and other.parameters != choice.config.parameters:
            text = f"{parameters(other)} on {count(best.tokens)} tokens: loss {best.total_loss:.3f}, here {choice.total_loss:.3f}"
            yield Figure("best in the same time", text, other.parameters, "lowest of the ladder", "the scaling law")
        return
    tried = f"{len(plan.ladder)} sizes from {parameters(plan.ladder[0].config)} to {parameters(plan.ladder[-1].config)}"
    yield Figure("tried", tried, [c.config.parameters for c in plan.ladder], "powers of 2^(1/1.5) around the optimum")
    flat = [c.config for c in plan.ladder if c.total_loss <= best.total_loss * (1 + FLAT)]
    text = f"{parameters(flat[0])} to {parameters(flat[-1])} are within {FLAT:.1%} of the lowest loss"
    yield Figure("how sure", text, [c.parameters for c in flat], "sizes tried", "the law's minimum is flat")
    if best.config.parameters == choice.config.parameters:
        yield Figure("", "the lowest loss that these devices reach in this time", "lowest loss")
    else:
        given = choice.total_loss / best.total_loss - 1
        saved = best.hours - choice.hours
        text = (
            f"{parameters(best.config)} would reach {best.total_loss:.3f}, {given:.2%} less, and take {hours(saved)} more to "
            f"train and serve {count(wish.serve_tokens)} tokens (at {best.serving.bits if best.serving else 16} bits)"
        )
        yield Figure(
            "lowest loss",
            text,
            best.config.parameters,
            f"cheapest within {wish.tolerance:.1%} of it",
            "arXiv 2401.00448",
        )
    largest = plan.ladder[-1]
    if wish.fits_bytes is not None and best is largest:
        text = (
            f"{bytes_(wish.fits_bytes)} is what limits the size: {parameters(largest.config)} is the largest that fits"
        )
        yield Figure("limit", text, wish.fits_bytes)


def _expected(plan: Plan, foresight: Foresight) -> Iterator[Figure]:
    value, low, high = plan.choice.loss
    text = f"{value:.3f} nats per token [{low:.3f}, {high:.3f}]"
    yield Figure("loss", text, [value, low, high], foresight.formula, foresight.source)
    served = plan.choice.serving
    if served and served.loss:
        text = f"{plan.choice.total_loss:.3f} at {served.bits} bits"
        yield Figure(
            "loss when served", text, plan.choice.total_loss, f"loss + {served.loss}", "docs/log.md, 2026-11-22"
        )
    if plan.accuracy:
        value, low, high = plan.accuracy
        text = f"{value:.0%} [{low:.0%}, {high:.0%}]"
        label = f"{foresight.benchmark} accuracy"
        yield Figure(label, text, [value, low, high], "sigmoid of the loss (two stages)", foresight.accuracy_source)


def _layout(plan: Plan) -> Iterator[Figure]:
    found = plan.choice.found
    best, step = found.best, found.best.step
    tried = f"fastest of {found.tried:,} ways that were tried, {found.too_large:,} too large"
    yield Figure("layout", str(best), str(best), tried, "puna/planner/layouts.py")
    if plan.wish.software == "puna" and best.work.recompute != "none":
        text = "`puna pretrain` does not recompute yet: this layout is for a trainer that does, or take more devices"
        yield Figure("note", text, text)
    kinds = ", ".join(f"{name} {bytes_(size)}" for name, size in best.memory.by_kind().items())
    room = plan.wish.device.memory_bytes
    text = f"{bytes_(best.memory.total)} of {bytes_(room)}: {kinds}"
    yield Figure(
        "memory", text, best.memory.by_kind(), "docs/planning.md, Memory", "arXiv 2205.05198; puna/planner/memory.py"
    )
    rows = best.work.rows
    text = f"{count(step.tokens)} tokens ({rows:,} rows of {best.work.sequence_length:,})"
    formula = "2048 * 160 * (N / 108M)^(2/3) tokens, at most 16M"
    yield Figure("step", text, step.tokens, formula, "OLMo-core's ladder; arXiv 2407.21783, 3.4.1")
    parts = [
        f"{WORDS[name]} {took / step.seconds:.0%}" for name, took in step.parts.items() if took > 0.015 * step.seconds
    ]
    text = f"{amounts.seconds(step.seconds)}: {', '.join(parts)}"
    yield Figure(
        "of it", text, dict(step.parts), "docs/planning.md, Time", _sources(plan, "matmul", "attention", "read", "link")
    )
    text = f"{step.flops() / 1e12:,.3g} TFLOP/s a device; MFU {step.mfu():.1%} (causal), {step.mfu(causal=False):.1%} (full attention)"
    value = {"flops": step.flops(), "mfu_causal": step.mfu(), "mfu_full": step.mfu(causal=False)}
    yield Figure("speed", text, value, "model FLOPs / time / devices / data sheet's peak", _sources(plan, "peak"))
    for other, reason in zip(found.others, found.reasons(), strict=True):
        yield Figure("runner-up", f"{other}: {reason}", str(other))


def _time(plan: Plan) -> Iterator[Figure]:
    choice = plan.choice
    step = choice.found.best.step
    yield Figure(
        "steps", f"{choice.steps:,} of {amounts.seconds(step.seconds)}", choice.steps, "tokens / tokens of a step"
    )
    text = f"{step.tokens_per_s:,.0f} tokens/s, {step.tokens_per_s_per_device:,.0f} a device"
    yield Figure("speed", text, step.tokens_per_s, "tokens of a step / seconds of a step", "Layout")
    text = f"{choice.risk.effective:.1%} of the time trains"
    yield Figure("effective", text, choice.risk.effective, "Daly's formula and planned interruptions", RISK_SOURCE)


def _cost(plan: Plan) -> Iterator[Figure]:
    choice, wish = plan.choice, plan.wish
    low, high = (wish.devices * seconds / 3600 for seconds in plan.seconds[1:])
    between = f" [{low:,.0f}, {high:,.0f}]" if low < high else ""
    yield Figure("training", _priced(plan, choice.train_hours) + between, choice.train_hours, "devices x hours")
    if wish.serve_tokens and choice.serving:
        label = f"serving {count(wish.serve_tokens)} tokens"
        formula = "tokens / (tokens/s a device) / 3600"
        yield Figure(label, _priced(plan, choice.serve_hours), choice.serve_hours, formula, "Serving")
        yield Figure("together", _priced(plan, choice.hours), choice.hours, "sum")
    energy = choice.train_hours * wish.device.power_w / 1000
    text = f"at most {energy:,.0f} kWh for the devices while training, hosts and cooling not counted"
    yield Figure("energy", text, energy, "device-hours x power limit", wish.device.sources.get("power_w", ""))


def _priced(plan: Plan, amount: float) -> str:
    price = plan.money(amount)
    return hours(amount) + (f", {money(price)} at {plan.wish.price:g} an hour" if price is not None else "")


def _serving(plan: Plan) -> Iterator[Figure]:
    served, wish = plan.choice.serving, plan.wish
    if served is None:
        return
    fits = f" (of {bytes_(wish.fits_bytes)})" if wish.fits_bytes else ""
    text = f"{bytes_(served.weight_bytes)} of weights at {served.bits} bits + {bytes_(served.cache_bytes)} for {served.context:,} tokens{fits}"
    yield Figure(
        "memory",
        text,
        served.bytes,
        "N x (bits + 16/64) / 8, embedding at 6 bits or more; 2 L K E x 2 bytes a token",
        "puna quantize",
    )
    together = f"{served.devices} device" + ("s" if served.devices > 1 else "")
    text = f"{served.tokens_per_s_per_device:,.0f} tokens/s a device ({together}, {served.batch:,} sequences)"
    formula = f"{REACHED} x batch / max(2 N batch / FLOP/s, bytes read / bandwidth)"
    yield Figure("speed", text, served.tokens_per_s_per_device, formula, "assumed share reached: 0.6")
    losses = ", ".join(f"{bits} bits {loss:g}" for bits, loss in QUANTISATION_LOSS.items() if loss)
    yield Figure(
        "quantisation",
        f"{served.loss:g} nats lost ({losses})",
        served.loss,
        "measured",
        "docs/log.md, 2026-11-22; a 3M model",
    )


def _beyond(plan: Plan, foresight: Foresight) -> Iterator[Figure]:
    over = overtraining(plan.choice.config, plan.choice.tokens, foresight, plan.wish.sequence_length)
    text = f"{count(over.optimal_tokens)} tokens; here {over.ratio:,.3g} times that"
    formula = "where N and D lower the loss equally for the same computing"
    yield Figure("compute-optimal", text, over.optimal_tokens, formula, foresight.source)
    if over.ratio < 1.2:
        return
    bought = over.optimal_loss[0] - over.loss[0]
    text = (
        f"{amounts.flops(over.flops)} instead of {amounts.flops(over.optimal_flops)}; the loss falls from "
        f"{over.optimal_loss[0]:.3f} to {over.loss[0]:.3f}, by {bought:.3f}"
    )
    yield Figure(
        "cost and gain",
        text,
        {"flops": over.flops, "optimal_flops": over.optimal_flops, "loss": bought},
        "D x FLOPs per token",
        "docs/planning.md",
    )
    if over.equal is not None and over.equal_flops > 0.9 * over.flops:
        return
    if over.equal is None:
        yield Figure("same loss otherwise", "no compute-optimal model of any size reaches it, by this law", None)
        return
    text = (
        f"{parameters(over.equal)} on {count(over.equal_tokens)} tokens, {amounts.flops(over.equal_flops)} "
        f"({over.flops / over.equal_flops:.2f} times less) but {over.equal.parameters / plan.choice.config.parameters:.1f} times as dear to serve"
    )
    yield Figure(
        "same loss otherwise", text, over.equal.parameters, "law solved for N at its optimal D", foresight.source
    )
    text = f"{count(over.pays_from)} served tokens on"
    yield Figure(
        "pays from", text, over.pays_from, "(C_here - C_otherwise) / (2 (N_otherwise - N_here))", "arXiv 2401.00448"
    )


def _risk(plan: Plan) -> Iterator[Figure]:
    choice = plan.choice
    risk = choice.risk
    if risk.scenario is None and risk.between_s == float("inf"):
        yield Figure("", "nobody has counted what interrupts such a machine; none is assumed", None)
        return
    expected = risk.interruptions(choice.train_seconds)
    text = f"{expected:,.1f} expected, one each {amounts.seconds(risk.between_s)}"
    yield Figure("interruptions", text, expected, "time / (16,384 x 1,296 h / 419 / devices)", RISK_SOURCE)
    none = 2.718281828 ** -min(expected, 700)
    yield Figure("without any", f"{none:.0%} of such runs" if none > 0.005 else "no such run", none, "exp(-expected)")
    lost = choice.train_seconds * (1 - risk.effective)
    text = f"{amounts.seconds(lost)} with a save each {risk.save_every_steps:,} steps"
    yield Figure(
        "time lost",
        text,
        lost,
        "Daly's best interval; puna/planner/expected.py",
        "Daly 2006; times of puna/planner/scenario.py",
    )


def _sources(plan: Plan, *names: str) -> str:
    sources = plan.wish.device.sources
    return "; ".join(f"{name}: {sources[name]}" for name in names if name in sources)


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
