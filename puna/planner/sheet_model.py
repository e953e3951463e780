"""Of a plan's sheet, what is about the model: which, why, what to expect of it, what serving it takes."""

import datetime
from collections.abc import Iterator

from puna.planner import amounts
from puna.planner.amounts import bytes_, count, hours, parameters
from puna.planner.figures import INTERVAL, Figure, ranged
from puna.planner.overtraining import overtraining
from puna.planner.plan import Plan, forced
from puna.planner.serving import QUANTISATION_LOSS, REACHED
from puna.planner.wish import DAY_S, TEXT, Foresight

FLAT = 0.003  # of the loss: sizes that no law can tell apart


def answer(plan: Plan) -> Iterator[Figure]:
    choice = plan.choice
    c = choice.config
    shape = f"{c.n_layers} layers, width {c.dim:,}, {c.n_heads} heads ({c.n_kv_heads} key/value), feed-forward {c.ffn_dim:,}"
    yield Figure(
        "size", f"{parameters(c)} parameters: {shape}", c.parameters, "sum of all matrices", "puna/model/sizes.py"
    )
    each = choice.tokens / c.parameters
    asked = "as asked" if plan.wish.tokens else "tokens/s x time x effective share"
    each = f"{each:,.0f}" if each >= 100 else f"{each:.1f}"
    text = f"{ranged(plan.tokens, count)}, {each} for each parameter"
    yield Figure("tokens", text, list(plan.tokens), asked, f"Time, Risk; interval: {INTERVAL}")
    if choice.tokens > TEXT:
        text = (
            f"that is more than all public text, about {count(TEXT)} tokens: much of it would be read again and again"
        )
        yield Figure("note", text, TEXT, "an estimate, 100T to 1,000T", "arXiv 2211.04325")
    text = f"{ranged(plan.seconds, amounts.seconds)} on {plan.wish.devices:,} x {plan.wish.device.name}"
    days = [seconds / DAY_S for seconds in plan.seconds]
    if plan.wish.start:
        ends = [_after(plan.wish.start, d) for d in days]
        text += f"; from {plan.wish.start} to {ends[0]}" + (f" [{ends[1]}, {ends[2]}]" if days[1] < days[2] else "")
    yield Figure("time", text, days, "tokens / (tokens/s x effective share)", f"Time, Risk; interval: {INTERVAL}")


def _after(start: datetime.date, days: float) -> str:
    """The date so many days later; a calendar ends with 9999."""
    left = (datetime.date.max - start).days
    return str(start + datetime.timedelta(days=days)) if days <= left else "after the year 9999"


def why(plan: Plan) -> Iterator[Figure]:
    choice, best, wish = plan.choice, plan.best, plan.wish
    if plan.asked.size is not None:
        yield Figure("", "the size was given", "given")
        other = best.config
        if best is not choice and other.parameters != choice.config.parameters:
            text = f"{parameters(other)} on {count(best.tokens)} tokens: loss {best.total_loss:.3f}, here {choice.total_loss:.3f}"
            yield Figure("best in the same time", text, other.parameters, "lowest of the ladder", "the scaling law")
        return
    first, last = parameters(plan.ladder[0].config), parameters(plan.ladder[-1].config)
    tried = f"{len(plan.ladder)} sizes from {first} to {last}" if len(plan.ladder) > 1 else f"one size, {last}"
    yield Figure("tried", tried, [c.config.parameters for c in plan.ladder], "powers of 2^(1/1.5) around the optimum")
    flat = [c.config for c in plan.ladder if c.total_loss <= best.total_loss * (1 + FLAT)]
    text = f"{parameters(flat[0])} to {parameters(flat[-1])} are within {FLAT:.1%} of the lowest loss"
    if len(flat) == 1:
        text = f"{parameters(flat[0])} alone is within {FLAT:.1%} of the lowest loss"
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
    elif forced(plan):
        text = f"memory: the optimum would be {count(plan.optimal_parameters)}, and nothing larger fits these devices"
        text += "; --software tuned recomputes activations" if wish.software == "puna" else ""
        yield Figure("limit", text, plan.optimal_parameters, "the law's optimum for this computing", "the scaling law")


def expected(plan: Plan, foresight: Foresight) -> Iterator[Figure]:
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


def serving(plan: Plan) -> Iterator[Figure]:
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


def beyond(plan: Plan, foresight: Foresight) -> Iterator[Figure]:
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
