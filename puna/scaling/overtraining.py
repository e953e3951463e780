"""Training a small model for longer than is optimal for its compute: what it costs and what it buys.

Meta trained 8B parameters on 15T tokens, some ninety times what is compute-optimal for that size. By a law L(N, D):

    cost     the same FLOPs spent optimally would have given a lower loss, by a larger model;
             the same loss could have been had with fewer FLOPs
    bought   that larger model costs more for every token served, and more memory

`compared` puts the numbers side by side; each comes from the law, with the law's intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puna.scaling.law import FLOPS_PER_PARAMETER, Estimate, Law, Optimum

SERVE_FLOPS = 2.0  # per parameter and token served: a forward pass


@dataclass(frozen=True, kw_only=True)
class Overtraining:
    """One choice of size and tokens beside the compute-optimal ones."""

    parameters: float
    tokens: float
    flops: float
    loss: Estimate
    optimal_tokens: Estimate  # for this size
    loss_there: Estimate  # this size on its optimal tokens
    same_flops: Optimum  # the best use of the same training compute
    same_loss: Optimum | None  # the cheapest training to the same loss

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.parameters

    @property
    def times_optimal(self) -> float:
        return self.tokens / self.optimal_tokens.value

    @property
    def extra_flops(self) -> float:
        """Training compute beyond what the same loss needs, as a share of that."""
        return self.flops / self.same_loss.flops - 1 if self.same_loss else float("inf")

    @property
    def served_cheaper(self) -> float:
        """FLOPs per served token of the compute-optimal model of the same loss, over this one's."""
        return self.same_loss.parameters.value / self.parameters if self.same_loss else float("nan")

    @property
    def break_even_tokens(self) -> float:
        """Served tokens after which the smaller model's extra training has paid for itself."""
        if not self.same_loss or self.served_cheaper <= 1:
            return 0.0 if self.same_loss else float("inf")
        extra = self.flops - self.same_loss.flops
        return extra / (SERVE_FLOPS * (self.same_loss.parameters.value - self.parameters))


def compared(law: Law, parameters: float, tokens: float) -> Overtraining:
    """What training `parameters` on `tokens` costs and buys, by `law`."""
    flops = FLOPS_PER_PARAMETER * parameters * tokens
    loss = law.loss(parameters, tokens)
    optimal = law.optimal_tokens(parameters)
    return Overtraining(
        parameters=parameters,
        tokens=tokens,
        flops=flops,
        loss=loss,
        optimal_tokens=optimal,
        loss_there=law.loss(parameters, optimal.value),
        same_flops=law.optimum(flops),
        same_loss=cheapest(law, loss.value),
    )


def cheapest(law: Law, loss: float) -> Optimum | None:
    """The compute-optimal training that reaches `loss`; None if none does, whatever is spent."""
    low, high = 0.0, 80.0  # of log FLOPs
    if law.optimum(float(np.exp(high))).parameters.value <= 0 or _at(law, high) > loss:
        return None
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _at(law, middle) > loss else (low, middle)
    return law.optimum(float(np.exp(high)))


def _at(law: Law, log_flops: float) -> float:
    best = law.optimum(float(np.exp(log_flops)))
    return law.loss(best.parameters.value, best.tokens.value).value


def along_ratios(law: Law, flops: float, ratios: Sequence[float]) -> list[tuple[float, Estimate]]:
    """Loss at each ratio of tokens to parameters for the same training compute, with its interval."""
    found = []
    for ratio in ratios:
        parameters = float(np.sqrt(flops / (FLOPS_PER_PARAMETER * ratio)))
        found.append((float(ratio), law.loss(parameters, ratio * parameters)))
    return found
