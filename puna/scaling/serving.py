"""Which size to train if it will also be served: the least of both costs together, at a wanted quality.

    train    6 N D FLOPs, D such that the law's loss, and what quantisation adds to it, is the wanted one
    serve    reading: 2 N FLOPs a token; writing: the larger of that and of the weights' bytes, read once for a batch
    limits   weights at their bits, and the cache of the sequences in flight, must fit the device

Sardana et al. 2024 (arXiv 2401.00448) minimise 6ND + 2N T over N at a fixed loss. Here serving is priced in time on a
device, since a served token at 4 bits costs less than one at 16, and since writing one waits for memory, not for arithmetic.
What quantisation loses is given as a share of loss, with its error: the defaults were measured on this project's own 3M
model (README), `measured` takes those of a quantised checkpoint. Beware of heavily trained models: they lose more by
quantisation than ordinary ones (Kumar et al. 2024, arXiv 2411.04330), so measure one that is like yours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from puna.config import require
from puna.errors import ArtifactError, ConfigError
from puna.model.sizes import LlamaConfig
from puna.scaling.family import of_size
from puna.scaling.law import FLOPS_PER_PARAMETER, Estimate, Law
from puna.scaling.overtraining import SERVE_FLOPS

_USABLE = 0.9  # of a device's memory; the rest is the program and what it computes with
_SIZES = 240  # candidates between the smallest and the largest size
_FAR_RATIO = 100.0  # tokens per parameter from which a quantisation's loss should be measured anew


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How weights are stored for serving."""

    name: str
    bits: float  # per weight, scales included
    loss: float  # what it adds to the loss, as a share of it
    loss_error: float = 0.0  # one standard deviation of that
    arithmetic: float = 1.0  # FLOP/s at this precision over those at 16 bits
    source: str = ""

    def __post_init__(self) -> None:
        require(self.bits > 0, f"bits={self.bits} must be positive")
        require(self.arithmetic > 0, f"arithmetic={self.arithmetic} must be positive")


_TINY = "README: the recipe `tiny`, bits per byte against bfloat16, groups of 32"
PRECISIONS = (
    Precision(name="bf16", bits=16.0, loss=0.0, source="what the law was measured in"),
    Precision(name="int8", bits=8.5, loss=0.0, loss_error=0.0002, source=_TINY),
    Precision(name="int4", bits=4.5, loss=0.024, loss_error=0.002, source=_TINY),
)


def measured(metrics: Mapping[str, Any], name: str) -> Precision:
    """A precision from the metrics of a quantised checkpoint (`puna quantize`). Raises `ArtifactError` if none were measured."""
    quality, bits = metrics.get("quality"), metrics.get("bits_per_weight")
    if not quality or not bits:
        raise ArtifactError(
            "this checkpoint's quantisation has no measured quality", hint="make it with --quality-tokens above 0"
        )
    ratio, before = quality["perplexity_ratio"], math.log(quality["perplexity"]["original"])
    error = 0.0
    if ratio["low"] is not None:  # a 95% interval
        error = math.log(ratio["high"] / ratio["low"]) / (2 * 1.96) / before
    return Precision(name=name, bits=float(bits), loss=math.log(ratio["value"]) / before, loss_error=error,
                     source=f"measured on {quality['tokens']:,} tokens when it was quantised")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the model is served on, and what is paid for an hour of it; speeds are those that are reached, not peaks."""

    name: str = "H100"
    memory_bytes: float = 80e9
    flops: float = 400e12  # per second, at 16 bits, as reached
    bytes_per_s: float = 2.5e12  # of memory, as reached
    price_per_hour: float = 1.0  # in any unit; with 1.0, costs are hours

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "flops", "bytes_per_s", "price_per_hour"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be positive")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted."""

    loss: float  # nats per token, by the law, of the model as it is served
    read_tokens: float = 0.0  # prompts, over the model's life
    written_tokens: float = 0.0  # answers
    batch: int = 32  # sequences that are written together
    context: int = 2048  # tokens of each, in the cache
    train_flops_per_s: float = 400e12  # of one training device, as reached
    train_price_per_hour: float = 1.0  # of one
    vocab_size: int = 128_256
    fits_bytes: float = 0.0  # the device's memory, if it shall be another than the device's own

    def __post_init__(self) -> None:
        require(self.loss > 0, f"loss={self.loss} must be positive")
        require(min(self.read_tokens, self.written_tokens) >= 0, "served tokens must not be negative")
        require(self.batch >= 1 and self.context >= 1, "batch and context must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One size at one precision: what it costs and whether it fits."""

    precision: Precision
    parameters: float
    tokens: float
    train_cost: float
    serve_cost: float
    memory_bytes: float

    @property
    def cost(self) -> float:
        return self.train_cost + self.serve_cost


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The cheapest choice, its interval, and the best of each precision beside it."""

    best: Choice
    parameters: Estimate
    tokens: Estimate
    saved: float  # of the cost, against training the compute-optimal size to this loss and serving it at 16 bits
    by_precision: tuple[Choice, ...]
    curve: Mapping[str, Sequence[Choice]] = field(repr=False)  # precision -> all candidates, by rising size
    warnings: tuple[str, ...] = ()


def cheapest(
    law: Law, wish: Wish, device: Device | None = None, precisions: Sequence[Precision] = PRECISIONS
) -> Answer:
    """The size, tokens and precision that cost least. Raises `ConfigError`, with what is possible, where none will do."""
    device = device or Device()
    limit = _USABLE * (wish.fits_bytes or device.memory_bytes)
    sizes = _sizes(law, wish.loss)
    cache = _cache_bytes(sizes, wish)
    curve: dict[str, list[Choice]] = {}
    for p in precisions:
        memory = sizes * p.bits / 8 + cache
        tokens = _tokens(law.best, sizes, wish.loss, p.loss)[0]
        good = np.isfinite(tokens) & (memory <= limit)
        curve[p.name] = [_choice(wish, device, p, n, d, m) for n, d, m in zip(sizes[good], tokens[good], memory[good])]
    best_of = [min(c, key=lambda x: x.cost) for c in curve.values() if c]
    if not best_of:
        raise _impossible(law, wish, limit, sizes, cache, precisions)
    best = min(best_of, key=lambda x: x.cost)
    parameters, tokens = _spread(law, wish, device, precisions, sizes, cache, limit, best)
    return Answer(
        best=best, parameters=parameters, tokens=tokens, saved=1 - best.cost / _plain(law, wish, device).cost,
        by_precision=tuple(best_of), curve=curve, warnings=_warnings(law, best),
    )  # fmt: skip


def _sizes(law: Law, loss: float) -> np.ndarray:
    """Candidates: from the smallest that any number of tokens brings to the loss, four decades up."""
    left = loss - law.e
    if left <= 0:
        raise ConfigError(
            f"a loss of {loss:.4g} cannot be reached: by the law {law.name!r} it stays above {law.e:.4g}",
            hint="ask for a higher loss",
        )
    smallest = (law.a / left) ** (1 / law.alpha)
    return np.geomspace(1.02 * smallest, 1e4 * smallest, _SIZES)


def _tokens(rows: np.ndarray, sizes: np.ndarray, loss: float, share: np.ndarray | float) -> np.ndarray:
    """Training tokens for each draw and size so that the quantised model has the wanted loss: (R, n)."""
    e, a, alpha, b, beta = (c[:, None] for c in rows.T)
    wanted = loss / (1 + np.reshape(share, (-1, 1)))
    left = wanted - e - a * sizes[None] ** -alpha
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(left > 0, (b / np.maximum(left, 1e-300)) ** (1 / beta), np.inf)


def _cache_bytes(sizes: np.ndarray, wish: Wish) -> np.ndarray:
    """Keys and values of all sequences in flight, by the family's members at some sizes, between them by interpolation."""
    some = np.geomspace(sizes[0], sizes[-1], 20)
    each = [_member(float(n), wish.vocab_size).kv_bytes_per_token() for n in some]
    return np.exp(np.interp(np.log(sizes), np.log(some), np.log(each))) * wish.context * wish.batch


def _member(parameters: float, vocab_size: int) -> LlamaConfig:
    """The family's member of about this size; of small ones, the smallest that the vocabulary allows."""
    return of_size(parameters, vocab_size=vocab_size, context=8192, tied=parameters < 4e9)


def _serve_seconds(wish: Wish, device: Device, precision: Precision, sizes: np.ndarray) -> np.ndarray:
    """Seconds for all tokens of the model's life."""
    arithmetic = SERVE_FLOPS * sizes / (device.flops * precision.arithmetic)
    memory = sizes * precision.bits / 8 / wish.batch / device.bytes_per_s
    return wish.read_tokens * arithmetic + wish.written_tokens * np.maximum(arithmetic, memory)


def _choice(wish: Wish, device: Device, precision: Precision, n: float, d: float, memory: float) -> Choice:
    trained = FLOPS_PER_PARAMETER * n * d / wish.train_flops_per_s / 3600 * wish.train_price_per_hour
    served = float(_serve_seconds(wish, device, precision, np.array(n))) / 3600 * device.price_per_hour
    return Choice(precision=precision, parameters=float(n), tokens=float(d), train_cost=float(trained),
                  serve_cost=served, memory_bytes=float(memory))  # fmt: skip


def _plain(law: Law, wish: Wish, device: Device) -> Choice:
    """The compute-optimal size for this loss, served at 16 bits as if it fitted."""
    sizes = _sizes(law, wish.loss)
    tokens = _tokens(law.best, sizes, wish.loss, 0.0)[0]
    i = int(np.argmin(sizes * tokens))
    return _choice(wish, device, PRECISIONS[0], sizes[i], tokens[i], 0.0)


def _spread(
    law: Law, wish: Wish, device: Device, precisions: Sequence[Precision], sizes: np.ndarray, cache: np.ndarray,
    limit: float, best: Choice,
) -> tuple[Estimate, Estimate]:  # fmt: skip
    """Intervals: the choice made again for each draw of the law and of the quantisation's loss, at the best's precision."""
    p = best.precision
    rows = law.draws
    if not len(rows):
        return Estimate(*[best.parameters] * 3), Estimate(*[best.tokens] * 3)
    share = np.maximum(0.0, p.loss + p.loss_error * np.random.default_rng(0).standard_normal(len(rows)))
    tokens = _tokens(rows, sizes, wish.loss, share)
    cost = FLOPS_PER_PARAMETER * sizes * tokens / wish.train_flops_per_s * wish.train_price_per_hour
    cost = cost + _serve_seconds(wish, device, p, sizes) * device.price_per_hour
    cost = np.where(np.isfinite(tokens) & (sizes * p.bits / 8 + cache <= limit), cost, np.inf)
    at = np.argmin(cost, axis=1)
    possible = np.isfinite(cost.min(axis=1))
    if possible.mean() < 0.5:
        return Estimate(best.parameters, best.parameters, math.inf), Estimate(best.tokens, best.tokens, math.inf)
    chosen_n, chosen_d = sizes[at[possible]], tokens[np.flatnonzero(possible), at[possible]]
    pairs = [(best.parameters, chosen_n), (best.tokens, chosen_d)]
    ends = [(v, *np.quantile(x, [0.05, 0.95])) for v, x in pairs]
    first, second = (Estimate(v, min(v, float(low)), max(v, float(high))) for v, low, high in ends)
    return first, second


def _impossible(
    law: Law, wish: Wish, limit: float, sizes: np.ndarray, cache: np.ndarray, precisions: Sequence[Precision]
) -> ConfigError:
    """Why no choice is possible, and the nearest wish that is."""
    small = np.geomspace(1e5, sizes[-1], 2000)
    small_cache = np.interp(np.log(small), np.log(sizes), cache)
    nearest = math.inf
    for p in precisions:
        fits = small[small * p.bits / 8 + small_cache <= limit]
        if len(fits):
            lowest = (law.e + law.a * fits[-1] ** -law.alpha) * (1 + p.loss)
            nearest = min(nearest, float(lowest))
    gigabytes = limit / _USABLE / 1e9
    said = f"no size that fits {gigabytes:.3g} GB reaches a loss of {wish.loss:.4g}, at any precision"
    if math.isinf(nearest):
        return ConfigError(said, hint="the cache alone does not fit: lower batch or context")
    return ConfigError(said, hint=f"there, losses from {nearest * 1.01:.4g} on can be reached; or give more memory")


def _warnings(law: Law, best: Choice) -> tuple[str, ...]:
    found = []
    ratio = best.tokens / best.parameters
    if ratio > law.seen.ratio[1]:
        found.append(
            f"{ratio:,.0f} tokens per parameter: the runs of {law.name!r} end at {law.seen.ratio[1]:,.0f}; fits to "
            "ordinary ratios promise too much at extreme ones (Sardana et al. 2024)"
        )
    if best.precision.loss and ratio > _FAR_RATIO:
        found.append(
            f"the loss by {best.precision.name} was measured on a model with few tokens per parameter; models trained this "
            "long lose more by it: measure one"
        )
    return tuple(found)
