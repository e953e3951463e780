"""A scaling law as a value that can be asked, each answer with an interval. Numpy alone: a planner may import it.

    L(N, D) = E + A / N^alpha + B / D^beta        Hoffmann et al. 2022 (arXiv 2203.15556), approach 3
    N*(C), D*(C) minimise L under C = k * N * D   k = 6 floating-point operations per parameter and token

L is in nats per token of the tokenizer that was measured with, N in parameters, D in tokens. A law knows which
parameters its N counts: `all` of them, the `matrices` that are multiplied for each token (the output head among them,
the input embedding not: what FLOPs are counted from), or the `body` (neither embedding nor head). To mix them moves the
optimum by a factor of two at small sizes (Porian et al. 2024, arXiv 2406.19146), so a caller says what it has.

An interval has three parts, added in quadrature in log loss: the spread of the fit (`draws`: fits to resampled runs),
the scatter of a single run (`noise`), and what grows outside the region of the runs (`drift`, per decade of distance).
The last is what a formula's own intervals leave out; `extrapolation` measures it by hiding the outermost runs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from puna.config import require
from puna.errors import ArtifactError

Counts = Literal["all", "matrices", "body"]
FLOPS_PER_PARAMETER = 6.0  # forward 2, backward 4, per token
LEVEL = 0.90  # of all intervals
Z = 1.6449  # half of a normal interval of that level, in standard deviations
FARTHEST_DECADES = 4.0  # of compute beyond the largest run: further, no published law has been checked
_ORDER = ("e", "a", "alpha", "b", "beta")


class Estimate(NamedTuple):
    """A value and the ends of its 90% interval. Unpacks as (value, low, high)."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The region where runs have been: lowest and highest parameters and tokens."""

    parameters: tuple[float, float]
    tokens: tuple[float, float]
    ratio: tuple[float, float]  # tokens per parameter

    @property
    def flops(self) -> float:
        """About the largest run's, never more than its two ranges allow."""
        return FLOPS_PER_PARAMETER * self.parameters[1] * min(self.tokens[1], self.parameters[1] * self.ratio[1])

    def distance(self, parameters: float, tokens: float) -> float:
        """Decades from the region, in size, in tokens and in their ratio, as one length."""
        pairs = ((self.parameters, parameters), (self.tokens, tokens), (self.ratio, tokens / parameters))
        outside = [max(0.0, math.log10(low / x), math.log10(x / high)) for (low, high), x in pairs]
        return math.hypot(*outside)


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The compute-optimal model for an amount of FLOPs. `loss` is None for a law that knows no losses."""

    flops: float
    parameters: Estimate
    tokens: Estimate
    loss: Estimate | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Law:
    """L(N, D) with the uncertainty of its constants."""

    name: str
    source: str  # where the constants come from, for whoever traces a number back
    counts: Counts
    e: float
    a: float
    alpha: float
    b: float
    beta: float
    draws: np.ndarray = field(repr=False)  # (R, 5): e, a, alpha, b, beta of as many resampled fits
    noise: float = 0.0  # standard deviation of a run's log loss around the law
    drift: float = 0.0  # standard deviation of log loss per decade outside the region of the runs
    seen: Seen

    def __post_init__(self) -> None:
        best = np.array([getattr(self, n) for n in _ORDER])
        good = bool(np.all(np.isfinite(best)) and np.all(best[1:] > 0) and best[0] >= 0)
        values = ", ".join(f"{n}={v:g}" for n, v in zip(_ORDER, best))
        require(good, f"a law needs positive constants, not {values}")
        require(self.draws.ndim == 2 and self.draws.shape[1] == 5, f"draws of shape {self.draws.shape} are not (R, 5)")

    @property
    def best(self) -> np.ndarray:
        """The constants as one row, in the order of `draws`."""
        return np.array([[getattr(self, n) for n in _ORDER]])

    def loss(self, parameters: float, tokens: float) -> Estimate:
        """Loss of one run, nats per token, with the interval in which its measurement should lie."""
        positive(parameters=parameters, tokens=tokens)
        value = float(_loss(self.best, parameters, tokens)[0])
        spread = math.hypot(self.noise, self.drift * self.seen.distance(parameters, tokens))
        return self._around(value, _loss(self.draws, parameters, tokens), spread)

    def optimum(self, flops: float, *, per_parameter: float = FLOPS_PER_PARAMETER) -> Optimum:
        """The best size and token count for `flops`; their intervals are those of the fit."""
        positive(flops=flops)
        product = flops / per_parameter
        best, drawn = (_optimal_parameters(rows, product) for rows in (self.best, self.draws))
        parameters = interval(float(best[0]), drawn)
        tokens = Estimate(product / parameters.value, product / parameters.high, product / parameters.low)
        return Optimum(
            flops=flops,
            parameters=parameters,
            tokens=tokens,
            loss=self.loss(parameters.value, tokens.value),
            warnings=far_warnings(flops, self.seen.flops, self.name),
        )

    def tokens_for(self, parameters: float, loss: float) -> Estimate:
        """Tokens that bring a model of this size to `loss`; infinite where no number does. Interval: the fit's."""
        positive(parameters=parameters, loss=loss)
        return interval(float(_tokens_for(self.best, parameters, loss)[0]), _tokens_for(self.draws, parameters, loss))

    def optimal_tokens(self, parameters: float) -> Estimate:
        """Tokens for which a model of this size is the compute-optimal one ("Chinchilla-optimal")."""
        positive(parameters=parameters)
        best, drawn = (_balanced_tokens(rows, parameters) for rows in (self.best, self.draws))
        return interval(float(best[0]), drawn)

    def exponent(self) -> Estimate:
        """a of N* ~ C^a: beta / (alpha + beta)."""
        rows = (self.best, self.draws)
        best, drawn = (r[:, 4] / (r[:, 2] + r[:, 4]) for r in rows)
        return interval(float(best[0]), drawn)

    def _around(self, value: float, drawn: np.ndarray, spread: float) -> Estimate:
        low, high = value, value
        if len(drawn):
            fit = interval(value, drawn)
            low, high = fit.low, fit.high
        down = math.hypot(math.log(value / low), Z * spread)
        up = math.hypot(math.log(high / value), Z * spread)
        return Estimate(value, value * math.exp(-down), value * math.exp(up))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `from_json` reads."""
        seen = {"parameters": self.seen.parameters, "tokens": self.seen.tokens, "ratio": self.seen.ratio}
        plain = {n: getattr(self, n) for n in ("name", "source", "counts", *_ORDER, "noise", "drift")}
        return {"kind": "law", **plain, "seen": seen, "draws": self.draws.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Law":
        """The law that `to_json` wrote. Raises `ArtifactError` if it is not one."""
        try:
            seen = Seen(**{k: (float(v[0]), float(v[1])) for k, v in data["seen"].items()})
            draws = np.array(data["draws"], dtype=float).reshape(-1, 5)
            plain = {n: float(data[n]) for n in (*_ORDER, "noise", "drift")}
            names = {n: str(data[n]) for n in ("name", "source", "counts")}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(f"this is not a scaling law: {error!r}", hint="give what `puna scale` wrote") from None
        return cls(**names, **plain, seen=seen, draws=draws)

    @classmethod
    def load(cls, path: Path | str) -> "Law":
        """The law in a `fit` artifact's folder, or in its `law.json`."""
        path = Path(path)
        path = path / "law.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            hint = "give the folder that `puna scale` wrote, or its law.json"
            raise ArtifactError(f"{path} cannot be read as a scaling law: {error}", hint=hint) from None
        require(isinstance(data, dict), f"{path} is not a scaling law", hint="give what `puna scale` wrote")
        return cls.from_json(data)


def far_warnings(flops: float, largest: float, name: str) -> tuple[str, ...]:
    """What to say of an extrapolation beyond four orders of magnitude of compute."""
    decades = math.log10(flops / largest)
    if decades <= FARTHEST_DECADES:
        return ()
    return (
        f"{flops:.1e} FLOPs are {decades:.1f} orders of magnitude beyond the largest run of {name!r} ({largest:.1e}); "
        f"no published law has been checked beyond {FARTHEST_DECADES:.0f}, and the interval does not know it",
    )


def positive(**values: float) -> None:
    """Raises `ConfigError` unless each is a number above 0."""
    for name, value in values.items():
        require(math.isfinite(value) and value > 0, f"{name}={value!r} must be a number above 0")


def _loss(rows: np.ndarray, parameters: float, tokens: float) -> np.ndarray:
    e, a, alpha, b, beta = rows.T
    return e + a * np.exp(-alpha * math.log(parameters)) + b * np.exp(-beta * math.log(tokens))


def _optimal_parameters(rows: np.ndarray, product: float) -> np.ndarray:
    """N that minimises L at N * D = product: (alpha A / (beta B))^(1/(alpha+beta)) * product^(beta/(alpha+beta))."""
    _, a, alpha, b, beta = rows.T
    with np.errstate(over="ignore"):  # a draw of runs that tell nothing; the interval is then infinite, and rightly
        return np.exp((np.log(alpha * a) - np.log(beta * b) + beta * math.log(product)) / (alpha + beta))


def _balanced_tokens(rows: np.ndarray, parameters: float) -> np.ndarray:
    """D where both terms fall equally fast along N * D = constant: alpha A / N^alpha = beta B / D^beta."""
    _, a, alpha, b, beta = rows.T
    return np.exp((np.log(beta * b) - np.log(alpha * a) + alpha * math.log(parameters)) / beta)


def _tokens_for(rows: np.ndarray, parameters: float, loss: float) -> np.ndarray:
    e, a, alpha, b, beta = rows.T
    left = loss - e - a * np.exp(-alpha * math.log(parameters))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(left > 0, np.exp((np.log(b) - np.log(np.maximum(left, 1e-300))) / beta), np.inf)


def interval(value: float, drawn: Sequence[float] | np.ndarray) -> Estimate:
    """The middle 90% of the draws, kept around the value."""
    drawn = np.asarray(drawn, dtype=float)
    if not len(drawn):
        return Estimate(value, value, value)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return Estimate(value, min(value, float(low)), max(value, float(high)))
