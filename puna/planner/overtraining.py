"""Training past the compute-optimal point: what it costs, what it buys, from how many served tokens on it pays.

The same loss can be had from a larger model with fewer tokens, compute-optimally: cheaper to train, dearer for each
token served (2 N operations). The extra training of the smaller one is paid back after

    served = (C_small - C_large) / (2 (N_large - N_small))      tokens
"""

from dataclasses import dataclass

from puna.model.sizes import LlamaConfig
from puna.planner.wish import Foresight, Range


@dataclass(frozen=True, kw_only=True)
class Overtraining:
    """A model and its tokens, beside the compute-optimal tokens of its size and the compute-optimal model of its loss."""

    tokens: float
    optimal_tokens: float  # of this size
    flops: float
    optimal_flops: float  # of this size with those tokens
    loss: Range
    optimal_loss: Range  # of this size with those tokens
    equal: LlamaConfig | None  # the compute-optimal model of the same loss; None if the law knows none
    equal_tokens: float
    equal_flops: float
    pays_from: float  # tokens served

    @property
    def ratio(self) -> float:
        return self.tokens / self.optimal_tokens


def overtraining(config: LlamaConfig, tokens: float, foresight: Foresight, sequence_length: int) -> Overtraining:
    """What `tokens` cost and bring beyond the optimum of this size."""

    def flops(model: LlamaConfig, count: float) -> float:
        return count * model.train_flops_per_token(sequence_length)

    best = foresight.optimal_tokens(config)
    loss = foresight.loss(config, tokens)
    equal = _of_loss(loss[0], config, foresight, sequence_length) if tokens > best else None
    equal_tokens = foresight.optimal_tokens(equal) if equal else 0.0
    equal_flops = flops(equal, equal_tokens) if equal else 0.0
    served = 0.0
    if equal and equal.parameters > config.parameters:
        served = (flops(config, tokens) - equal_flops) / (2 * (equal.parameters - config.parameters))
    return Overtraining(
        tokens=tokens,
        optimal_tokens=best,
        flops=flops(config, tokens),
        optimal_flops=flops(config, best),
        loss=loss,
        optimal_loss=foresight.loss(config, best),
        equal=equal,
        equal_tokens=equal_tokens,
        equal_flops=equal_flops,
        pays_from=max(0.0, served),
    )


def _of_loss(loss: float, least: LlamaConfig, foresight: Foresight, sequence_length: int) -> LlamaConfig | None:
    """The smallest model that reaches `loss` with its compute-optimal tokens."""
    low, high = float(least.parameters), 1e14
    for _ in range(30):
        middle = (low * high) ** 0.5
        config = foresight.shape(middle, sequence_length)
        if foresight.loss(config, foresight.optimal_tokens(config))[0] > loss:
            low = middle
        else:
            high = middle
    found = foresight.shape(high, sequence_length)
    return found if foresight.loss(found, foresight.optimal_tokens(found))[0] <= loss * 1.001 else None
