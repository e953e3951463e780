"""What would change the answer: the same plan under other assumptions, each in one line.

No new search is made where none is needed: tokens follow time, and a law is asked again.
"""

from dataclasses import replace

from puna.errors import ConfigError
from puna.planner.amounts import bytes_, count, hours, parameters
from puna.planner.choice import Choice, fastest
from puna.planner.plan import Plan, cheapest, climb, forced
from puna.planner.wish import DAY_S, Foresight

SLOWER = 0.12  # how far published runs lie from the planner (docs/planning.md)


def changes(plan: Plan, foresight: Foresight) -> list[str]:
    """One line for each assumption that matters here."""
    found = [*_precision(plan), *_software(plan, foresight), *_slower(plan, foresight)]
    if plan.asked.size is None:
        found += [*_time(plan, foresight), *_serving(plan), *_room(plan, foresight)]
    return found


def with_time(plan: Plan, times: float, foresight: Foresight) -> list[Choice]:
    """The ladder after so many times the tokens."""
    return [replace(c, tokens=c.tokens * times, loss=foresight.loss(c.config, c.tokens * times)) for c in plan.ladder]


def _time(plan: Plan, foresight: Foresight) -> list[str]:
    if plan.wish.tokens:
        return []
    found = []
    for times, said in ((0.5, "half the time"), (2.0, "twice the time")):
        ladder = with_time(plan, times, foresight)
        best = cheapest(ladder, min(ladder, key=lambda c: c.total_loss), plan.wish)
        found.append(f"{said}: {parameters(best.config)} on {count(best.tokens)} tokens, loss {best.total_loss:.3f}")
    return found


def _serving(plan: Plan) -> list[str]:
    wish, found = plan.wish, []
    options = ((0.0, "nothing to serve"), (10 * wish.serve_tokens, "ten times as much to serve"))
    for served, said in options if wish.serve_tokens else ((1e12, "1T tokens to serve"),):
        other = cheapest(plan.ladder, plan.best, replace(wish, serve_tokens=served))
        same = other.config.parameters == plan.choice.config.parameters
        bits = f" at {other.serving.bits} bits" if other.serving and served else ""
        what = ("the same size" if same else parameters(other.config)) + f"{bits}, loss {other.total_loss:.3f}"
        found.append(f"{said}: {what}" + (f", {hours(other.serve_hours)} of serving" if served else ""))
    return found


def _room(plan: Plan, foresight: Foresight) -> list[str]:
    wish = plan.wish
    if wish.fits_bytes is None:
        return []
    free = foresight.optimal_parameters(plan.choice.flops)
    if plan.best is not plan.ladder[-1] or plan.best.config.parameters >= 0.9 * free:
        return [f"more room than {bytes_(wish.fits_bytes)}: nothing, it is not what limits the size here"]
    config = foresight.shape(free, wish.sequence_length)
    tokens = plan.choice.flops / config.train_flops_per_token(wish.sequence_length)
    loss = foresight.loss(config, tokens)[0]
    return [
        f"without the limit of {bytes_(wish.fits_bytes)}: {parameters(config)} on {count(tokens)} tokens, loss {loss:.3f}"
    ]


def _software(plan: Plan, foresight: Foresight) -> list[str]:
    if plan.wish.software == "tuned" or plan.wish.device.node == 1:
        return []
    if forced(plan):  # by activations that our trainer keeps: another would train another size
        ladder = climb(replace(plan.wish, software="tuned"), foresight)
        best = cheapest(ladder, min(ladder, key=lambda c: c.total_loss), plan.wish)
        said = f"{parameters(best.config)} on {count(best.tokens)} tokens, loss {best.total_loss:.3f}"
        return [f"a trainer with everything fused that recomputes activations (--software tuned): {said}"]
    times = _faster(plan, software="tuned")
    return (
        [f"a trainer with everything fused and Hopper's attention (--software tuned): {times:.2f} times as fast"]
        if times
        else []
    )


def _faster(plan: Plan, **changed: str) -> float:
    """Times the speed with another way to compute; 0 if it does not fit."""
    try:
        found = fastest(plan.choice.config, replace(plan.wish, **changed), quick=True)
    except ConfigError:
        return 0.0
    return found.best.step.tokens_per_s / plan.choice.found.best.step.tokens_per_s


def _precision(plan: Plan) -> list[str]:
    wish = plan.wish
    times = _faster(plan, precision="fp8") if wish.precision != "fp8" and "fp8" in wish.device.matmul else 0.0
    if not times:
        return []
    return [f"products in fp8 (--precision fp8): {times:.2f} times as fast; what it does to the loss is not in the law"]


def _slower(plan: Plan, foresight: Foresight) -> list[str]:
    choice = plan.choice
    if plan.wish.tokens:
        days = choice.train_seconds / DAY_S
        return [f"a machine {SLOWER:.0%} slower than the table: {days / (1 - SLOWER):,.1f} days instead of {days:,.1f}"]
    loss = foresight.loss(choice.config, choice.tokens * (1 - SLOWER))[0]
    return [
        f"a machine {SLOWER:.0%} slower than the table: {count(choice.tokens * (1 - SLOWER))} tokens, loss "
        f"{loss + choice.total_loss - choice.loss[0]:.3f}; measure it with --calibrate"
    ]
