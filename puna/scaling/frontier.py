"""The optimum as a power of compute, without a law of the loss: what isoFLOP curves and envelopes give."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from puna.scaling.law import FLOPS_PER_PARAMETER, Counts, Estimate, Optimum, far_warnings, interval, positive


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Optimal tokens as a power of compute, D*(C) = factor * C^exponent: what isoFLOP curves and envelopes give.

    Llama 3's method (arXiv 2407.21783, 3.2.1). It knows no losses away from the optimum. N* is C / (k * D*).
    """

    name: str
    source: str
    counts: Counts
    factor: float
    exponent: float
    draws: np.ndarray = field(repr=False)  # (R, 2): log of the factor, exponent
    largest_flops: float  # of the budgets that were fitted

    def tokens(self, flops: float) -> Estimate:
        positive(flops=flops)
        with np.errstate(over="ignore"):
            drawn = np.exp(self.draws[:, 0] + self.draws[:, 1] * math.log(flops))
        return interval(self.factor * flops**self.exponent, drawn)

    def optimum(self, flops: float, *, per_parameter: float = FLOPS_PER_PARAMETER) -> Optimum:
        """The best size and token count for `flops`."""
        tokens = self.tokens(flops)
        product = flops / per_parameter
        parameters = Estimate(product / tokens.value, product / tokens.high, product / tokens.low)
        warnings = far_warnings(flops, self.largest_flops, self.name)
        return Optimum(flops=flops, parameters=parameters, tokens=tokens, loss=None, warnings=warnings)

    def optimal_tokens(self, parameters: float) -> Estimate:
        """Tokens for which a model of this size is the compute-optimal one: D*(C) at the C where N*(C) is this size."""
        positive(parameters=parameters)
        rows = (np.array([[math.log(self.factor), self.exponent]]), self.draws)
        found = []
        for factor, exponent in (r.T for r in rows):
            flops = (np.log(FLOPS_PER_PARAMETER * parameters) + factor) / (1 - exponent)  # of the logarithm
            found.append(np.exp(factor + exponent * flops))
        return interval(float(found[0][0]), found[1])

    def exponents(self) -> tuple[Estimate, Estimate]:
        """Of parameters and of tokens; they sum to one."""
        of_tokens = interval(self.exponent, self.draws[:, 1])
        return Estimate(1 - of_tokens.value, 1 - of_tokens.high, 1 - of_tokens.low), of_tokens

    def to_json(self) -> dict[str, Any]:
        plain = {n: getattr(self, n) for n in ("name", "source", "counts", "factor", "exponent", "largest_flops")}
        return {"kind": "frontier", **plain, "draws": self.draws.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Frontier":
        names = {n: data[n] for n in ("name", "source", "counts", "factor", "exponent", "largest_flops")}
        return cls(**names, draws=np.array(data["draws"], dtype=float).reshape(-1, 2))
