"""Of a plan's sheet, what is about the run: its layout, its time, what it costs, what may interrupt it."""

from collections.abc import Iterable, Iterator

from puna.planner import amounts
from puna.planner.amounts import bytes_, count, hours, money
from puna.planner.choice import MOST_BATCH_TOKENS, OURS, ways_to_recompute
from puna.planner.figures import Figure, device_sources
from puna.planner.layouts import WORDS
from puna.planner.plan import Plan
from puna.planner.risk import SOURCE as RISK_SOURCE

# Of a step's parts and a rank's memory; M micro-batches, P stages, v of them on a rank, n ranks of a group.
TIMES = {
    "products": "6 x weights of a rank's matrices x its tokens / matmul",
    "attention": "2 H E T a token and layer forward / its speed, 2.5 times that backward",
    "elementwise": "bytes moved / read (puna/planner/compute.py)",
    "recomputed": "forward once more",
    "head": "6 V d a token / matmul + 48 V bytes / read",
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
SPEEDS = ("matmul", "attention", "read", "link", "network", "comm_share", "spread")  # of hardware.toml
SIZES = {
    "parameters": "4 bytes x weights / (tensor x pipeline x shard)",
    "gradients": "4 bytes, likewise",
    "optimizer": "8 bytes, likewise",
    "activations": "layers x tokens of a micro-batch x micro-batches in flight x bytes a token (docs/planning.md)",
    "head": "gradients of the output matrix and of a chunk of logits",
    "communication": "gathered weights of two layers (or all, in a pipeline), and a layer's gradients",
}


def layout(plan: Plan) -> Iterator[Figure]:
    found = plan.choice.found
    best, step = found.best, found.best.step
    tried = f"fastest of {found.tried:,} ways that were tried, {found.too_large:,} too large"
    yield Figure("layout", str(best), str(best), tried, "puna/planner/layouts.py")
    idle = plan.wish.devices - best.layout.world
    if idle:
        text = f"{idle:,} of the {plan.wish.devices:,} devices wait as spares: all of them cannot share a batch evenly"
        yield Figure("note", text, idle, "the next number with a small odd factor", "puna/planner/choice.py")
    if plan.wish.software == "puna":
        if best.work.recompute not in ways_to_recompute(plan.wish):
            text = "`puna pretrain` recomputes in one process only, so far: this layout is for a trainer that does in several, or take more devices"
            yield Figure("note", text, text)
        elif best.work.recompute != "none":
            text = f"`puna pretrain` does that with speed.recompute={OURS[best.work.recompute]}"
            yield Figure("note", text, text, "the fastest that fits", "puna/train/accelerate.py")
    kinds = ", ".join(f"{name} {bytes_(size)}" for name, size in best.memory.by_kind().items())
    room = plan.wish.device.memory_bytes
    text = f"{bytes_(best.memory.total)} of {bytes_(room)}: {kinds}"
    formula = _each(SIZES, best.memory.by_kind())
    yield Figure("memory", text, best.memory.by_kind(), formula, "arXiv 2205.05198; puna/planner/memory.py")
    rows = best.work.rows
    text = f"{count(step.tokens)} tokens ({rows:,} rows of {best.work.sequence_length:,})"
    formula = "2048 * 160 * (N / 108M)^(2/3) tokens, at most 16M"
    if step.tokens > 1.5 * MOST_BATCH_TOKENS:
        times = step.tokens / MOST_BATCH_TOKENS
        text += f", {times:.0f} times Llama 3's largest: so many devices share no smaller one, and it may cost loss"
    yield Figure("step", text, step.tokens, formula, "OLMo-core's ladder; arXiv 2407.21783, 3.4.1")
    parts = [
        f"{WORDS[name]} {took / step.seconds:.0%}" for name, took in step.parts.items() if took > 0.015 * step.seconds
    ]
    text = f"{amounts.seconds(step.seconds)}: {', '.join(parts)}"
    shown = [name for name, took in step.parts.items() if took > 0]
    yield Figure("of it", text, dict(step.parts), _each(TIMES, shown), device_sources(plan, *SPEEDS))
    text = f"{step.flops() / 1e12:,.3g} TFLOP/s a device; MFU {step.mfu():.1%} (causal), {step.mfu(causal=False):.1%} (full attention)"
    value = {"flops": step.flops(), "mfu_causal": step.mfu(), "mfu_full": step.mfu(causal=False)}
    yield Figure("speed", text, value, "model FLOPs / time / devices / data sheet's peak", device_sources(plan, "peak"))
    for other, reason in zip(found.others, found.reasons(), strict=True):
        yield Figure("runner-up", f"{other}: {reason}", str(other))


def _each(formulas: dict[str, str], names: Iterable[str]) -> str:
    """The formula of each of these parts."""
    return "; ".join(f"{name}: {formulas[name]}" for name in names)


def time(plan: Plan) -> Iterator[Figure]:
    choice = plan.choice
    step = choice.found.best.step
    yield Figure(
        "steps", f"{choice.steps:,} of {amounts.seconds(step.seconds)}", choice.steps, "tokens / tokens of a step"
    )
    text = f"{step.tokens_per_s:,.0f} tokens/s, {step.tokens_per_s_per_device:,.0f} a device"
    yield Figure("speed", text, step.tokens_per_s, "tokens of a step / seconds of a step", "Layout")
    text = f"{choice.risk.effective:.1%} of the time trains"
    yield Figure("effective", text, choice.risk.effective, "Daly's formula and planned interruptions", RISK_SOURCE)


def cost(plan: Plan) -> Iterator[Figure]:
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


def risk(plan: Plan) -> Iterator[Figure]:
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
