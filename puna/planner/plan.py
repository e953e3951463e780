"""From a wish to a plan: this machine, this long, so many tokens to serve -> size, tokens, layout, time, cost, risk.

For each size of a ladder: the fastest layout of the devices, the tokens it sees in the days, the loss that a scaling
law expects of them, what it costs to serve. The lowest loss is the measure; where tokens are to be served, the cheapest
size within `tolerance` of it wins (Sardana & Frankle, arXiv 2401.00448: who serves much, trains smaller for longer).
A wish that cannot be granted is answered with the nearest that can, and with the reason.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from puna.errors import ConfigError
from puna.model.sizes import LlamaConfig
from puna.planner.amounts import bytes_, count
from puna.planner.choice import Choice, choose, served, ways_to_serve
from puna.planner.serving import fitting_bits, least_bytes
from puna.planner.wish import DAY_S, MOST_TOKENS, Foresight, Range, Wish

LADDER = [2 ** (i / 1.5) for i in range(-7, 4)]  # sizes that are tried, times the compute-optimal one
# True speed over planned: all published runs of docs/planning.md that are counted lie in between, from the table alone, and
# of those that are not, which nobody looked into, all but three.
SPEED_RANGE = (0.83, 1.07)
WANTED = 0.7  # of the law's optimum: a largest size below that was not chosen, but forced
MOST_DEVICES = 1 << 20
SMALLEST = 1e6  # parameters
MOST_DAYS = 36_525.0  # a century
SIZE_OFF = 1.15  # times the parameters that were asked for: more is said
LEAST_TOKENS = 256  # of a row, to which it is shortened where nothing fits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer. `refused` says why what was `asked` is impossible; `wish` is then the nearest that is not.

    What depends on speed has an interval: how far published runs lie from the planner.
    """

    asked: Wish
    wish: Wish
    choice: Choice
    best: Choice  # the lowest loss, whatever serving costs
    ladder: tuple[Choice, ...]
    accuracy: Range | None
    optimal_tokens: float  # of the size
    optimal_parameters: float  # of the computing
    refused: tuple[str, ...] = ()

    @property
    def tokens(self) -> Range:
        """Seen in the time; exact if they were given."""
        low, high = (1.0, 1.0) if self.wish.tokens else SPEED_RANGE
        return (self.choice.tokens, low * self.choice.tokens, high * self.choice.tokens)

    @property
    def seconds(self) -> Range:
        """Of wall clock; exact if the days are what was given."""
        low, high = SPEED_RANGE if self.wish.tokens else (1.0, 1.0)
        return (self.choice.train_seconds, self.choice.train_seconds / high, self.choice.train_seconds / low)

    @property
    def granted(self) -> bool:
        return not self.refused

    def money(self, hours: float) -> float | None:
        return hours * self.wish.price if self.wish.price else None


def plan(asked: Wish, foresight: Foresight) -> Plan:
    """The plan for a wish, or for the nearest possible one. Raises `ConfigError` where there is none at all."""
    wish, refused = _with_precision(asked)
    wish, refused = _with_text(wish, refused)
    wish, refused = _with_days(wish, refused)
    refused += _other_size(wish)
    if wish.size is None:
        wish, shortened = _with_length(wish, foresight)
        wish, more = _with_room(wish, foresight)
        ladder = climb(wish, foresight)
        best = min(ladder, key=lambda c: c.total_loss)
        choice = _thorough(cheapest(ladder, best, wish), wish, foresight)
        more = shortened + more + _too_slow(choice, wish)
    else:
        wish, more = _with_devices(wish, foresight)
        choice = choose(wish.size, wish, foresight)
        near = [c for c in ways_to_serve(choice, wish) if c.total_loss <= choice.total_loss * (1 + wish.tolerance)]
        choice = min(near, key=lambda c: c.serve_hours) if wish.serve_tokens else choice
        more += _too_slow(choice, wish) + _too_big(choice, wish)
        days = min(1e5, choice.train_seconds / DAY_S)
        ladder = climb(replace(wish, size=None, tokens=None, days=days), foresight)
        best = min([*ladder, choice], key=lambda c: c.total_loss)
    return Plan(
        asked=asked,
        wish=wish,
        choice=choice,
        best=best,
        ladder=tuple(ladder),
        accuracy=foresight.accuracy(choice.served_loss) if foresight.benchmark else None,
        optimal_tokens=foresight.optimal_tokens(choice.config),
        optimal_parameters=foresight.optimal_parameters(choice.flops),
        refused=tuple(refused + more),
    )


def forced(plan: Plan) -> bool:
    """Was the size not chosen, but the largest that the devices could be laid out for?"""
    largest = plan.ladder[-1]
    short = largest.config.parameters < WANTED * plan.optimal_parameters
    return plan.asked.size is None and plan.wish.fits_bytes is None and plan.best is largest and short


def climb(wish: Wish, foresight: Foresight) -> list[Choice]:
    """Sizes around the best for so much computing, smallest first; those that fit nowhere are left out."""
    speed = 0.4 * wish.device.matmul[wish.precision]
    middle = foresight.optimal_parameters(wish.devices * wish.days * DAY_S * speed)
    sizes = [foresight.shape(max(SMALLEST, middle * times), wish.sequence_length) for times in LADDER]
    if wish.fits_bytes is not None:
        sizes.append(_largest_that_fits(wish, foresight, sizes[0]))
    found: dict[LlamaConfig, Choice] = {}
    for config in sorted(sizes, key=lambda c: c.parameters):
        if config in found or not fitting_bits(config, wish.serve_context, wish.fits_bytes, wish.bits):
            continue
        try:
            found[config] = choose(config, wish, foresight, quick=True)
        except ConfigError:
            if config.parameters > middle:
                break  # larger ones do not fit either
    size = float(sizes[0].parameters)
    while not found:  # even the smallest of the ladder is too large for the devices: down to one that fits
        size /= 2
        config = foresight.shape(max(SMALLEST, size), wish.sequence_length)
        if size <= SMALLEST:
            found[config] = choose(config, wish, foresight)  # or says what it lacks
        with contextlib.suppress(ConfigError):
            found[config] = choose(config, wish, foresight, quick=True)
    return list(found.values())


def cheapest(ladder: Sequence[Choice], best: Choice, wish: Wish) -> Choice:
    """The cheapest to train and serve of those whose loss is within the wish's tolerance of the best, bits included."""
    if not wish.serve_tokens:
        return best
    near = [
        c
        for size in ladder
        for c in ways_to_serve(size, wish)
        if c.total_loss <= best.total_loss * (1 + wish.tolerance)
    ]
    return min(near, key=lambda c: c.hours)


def _thorough(choice: Choice, wish: Wish, foresight: Foresight) -> Choice:
    """The same size after a whole search for its layout, served the same way."""
    found = choose(choice.config, wish, foresight)
    return served(found, wish, choice.serving.bits) if choice.serving else found


def _largest_that_fits(wish: Wish, foresight: Foresight, smallest: LlamaConfig) -> LlamaConfig:
    low, high = SMALLEST, 1e13
    fits = smallest
    for _ in range(24):
        middle = (low * high) ** 0.5
        config = foresight.shape(middle, wish.sequence_length)
        if not fitting_bits(config, wish.serve_context, wish.fits_bytes, wish.bits):
            high = middle
        else:
            low, fits = middle, config
    return fits


def _with_precision(wish: Wish) -> tuple[Wish, list[str]]:
    if wish.precision in wish.device.matmul:
        return wish, []
    have = next(iter(wish.device.matmul))
    return replace(wish, precision=have), [f"{wish.device.name} has no {wish.precision} products; planned with {have}"]


def _with_text(wish: Wish, refused: list[str]) -> tuple[Wish, list[str]]:
    if wish.tokens is None or wish.tokens <= MOST_TOKENS:
        return wish, refused
    said = f"{wish.tokens:g} tokens there will never be; planned with {count(MOST_TOKENS)}, 1,000 times all public text"
    return replace(wish, tokens=MOST_TOKENS), [*refused, said]


def _with_days(wish: Wish, refused: list[str]) -> tuple[Wish, list[str]]:
    if wish.days is None or wish.days <= MOST_DAYS:
        return wish, refused
    said = f"{wish.days:g} days are longer than any machine lasts; planned with a century"
    return replace(wish, days=MOST_DAYS), [*refused, said]


def _other_size(wish: Wish) -> list[str]:
    if wish.parameters is None or 1 / SIZE_OFF < wish.size.parameters / wish.parameters < SIZE_OFF:
        return []
    return [
        f"there is no Llama of {count(wish.parameters)} parameters with this vocabulary and the family's proportions; planned "
        f"with the nearest, {count(wish.size.parameters)}"
    ]


def _with_length(wish: Wish, foresight: Foresight) -> tuple[Wish, list[str]]:
    """Rows short enough for some model at least: as asked, or halved until the smallest fits the devices."""
    length = wish.sequence_length
    while True:
        shorter = replace(wish, sequence_length=length)
        try:
            choose(foresight.shape(SMALLEST, length), replace(shorter, tokens=1e6), foresight, quick=True)
            break
        except ConfigError as error:
            if length < 2 * LEAST_TOKENS:
                raise
            said = error.message
            length //= 2
    if length == wish.sequence_length:
        return wish, []
    return shorter, [f"rows of {wish.sequence_length:,} tokens are too long: {said}; planned with {length:,}"]


def _with_room(wish: Wish, foresight: Foresight) -> tuple[Wish, list[str]]:
    """Room for some model at least, on the device that is to hold it."""
    if wish.fits_bytes is None:
        return wish, []
    smallest = foresight.shape(SMALLEST, wish.sequence_length)
    needs = least_bytes(smallest, min(wish.bits), wish.serve_context)
    if needs <= wish.fits_bytes:
        return wish, []
    said = (
        f"nothing fits {bytes_(wish.fits_bytes)}: the smallest model here ({smallest.parameters / 1e6:.1f}M parameters, "
        f"{min(wish.bits)} bits, a sequence of {wish.serve_context:,} tokens) needs {bytes_(needs)}; planned for that"
    )
    return replace(wish, fits_bytes=needs), [said]


def _with_devices(wish: Wish, foresight: Foresight) -> tuple[Wish, list[str]]:
    """As many devices as the size needs at least: as asked, or doubled until it fits."""
    refused: list[str] = []
    devices = wish.devices
    while True:
        try:
            choose(wish.size, replace(wish, devices=devices), foresight, quick=True)
            break
        except ConfigError as error:
            refused = refused or [error.message]
            devices *= 2
            if devices > MOST_DEVICES:
                raise
    if devices == wish.devices:
        return wish, []
    return replace(wish, devices=devices), [f"{refused[0]}; planned with {devices:,}"]


def _too_slow(choice: Choice, wish: Wish) -> list[str]:
    if not (wish.days and wish.tokens) or choice.train_seconds <= 1.01 * wish.days * DAY_S:
        return []
    days = choice.train_seconds / DAY_S
    possible = choice.tokens * wish.days / days
    return [
        f"{count(choice.tokens)} tokens take {days:,.1f} days, not {wish.days:g}; planned for that long. In {wish.days:g} "
        f"days: {count(possible)} tokens, or all of them on about {choice.devices * days / wish.days * 1.05:,.0f} devices"
    ]


def _too_big(choice: Choice, wish: Wish) -> list[str]:
    if choice.serving is not None:
        return []
    needs = least_bytes(choice.config, min(wish.bits), wish.serve_context)
    return [
        f"{count(choice.config.parameters)} parameters do not fit {bytes_(wish.fits_bytes)} at {min(wish.bits)} bits with a "
        f"sequence of {wish.serve_context:,} tokens: they need {bytes_(needs)}; leave the size out to plan for one that fits"
    ]
