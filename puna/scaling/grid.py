"""Which runs to make: budgets, sizes at each, and one run beyond them to be predicted.

A cap on compute is shared out over budgets that rise by a fixed factor, each with the same number of sizes around the
size that should be best there; so most of the compute goes to the largest budget, which says the most about what lies
beyond. Where the best size is, is a guess for the first budget (`tokens_per_parameter`) and a measurement afterwards:
`centre` takes the minimum of the budgets that are complete. A budget whose minimum still lies at the edge of its grid gets
another run on that side (`missing_side`), since a parabola needs both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puna.config import require
from puna.model.sizes import LlamaConfig
from puna.scaling.family import counted, of_size
from puna.scaling.points import Points


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The shape of the grid."""

    flops: float = 1e15  # of all runs together, the predicted one included
    budgets: int = 4
    sizes: int = 5  # at each budget
    factor: float = 3.0  # from one budget to the next
    span: float = 8.0  # from the smallest to the largest size at a budget
    tokens_per_parameter: float = 40.0  # at the optimum, a first guess (20 for large models); parameters in matrices
    beyond: float = 3.0  # the predicted run's compute, in largest budgets; 0: no such run
    vocab_size: int = 512  # bytes: small models have no room for a head, and there are more tokens of a text
    sequence_length: int = 128  # tokens
    least_parameters: float = 15_000.0  # in matrices, below which a Llama is hardly one

    def __post_init__(self) -> None:
        require(self.flops > 0, f"flops={self.flops} must be positive")
        require(2 <= self.budgets <= 20, f"budgets={self.budgets}: a power law needs at least 2, and 20 are enough")
        require(
            4 <= self.sizes <= 50,
            f"sizes={self.sizes}: a parabola with an interval needs at least 4, and 50 are enough",
        )
        require(1.2 < self.factor <= 1e3, f"factor={self.factor} must be more than 1.2 and at most 1,000")
        require(self.span > 1.5, f"span={self.span} must be more than 1.5")
        require(self.beyond == 0 or self.beyond > 1, f"beyond={self.beyond} must be more than 1, or 0 for none")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of the grid: a size and as many tokens as its budget allows."""

    name: str
    budget: float  # FLOPs
    model: LlamaConfig
    tokens: float
    predicted: bool = False  # kept out of the fit

    @property
    def flops(self) -> float:
        return self.tokens * self.model.train_flops_per_token(self.model.context)


def budgets(config: GridConfig) -> list[float]:
    """FLOPs of each budget, cheapest first, so that all runs together cost `config.flops`."""
    steps = [config.factor**i for i in range(config.budgets)]
    cost = config.sizes * sum(steps) + config.beyond * steps[-1]
    return [config.flops / cost * s for s in steps]


def runs_at(config: GridConfig, budget: float, best: float) -> list[PlannedRun]:
    """The sizes of a budget, around the one that is expected to be best (weights in matrices)."""
    best = max(best, config.least_parameters * math.sqrt(config.span))
    shares = np.geomspace(config.span**-0.5, config.span**0.5, config.sizes)
    runs = [run_at(config, budget, best * share) for share in shares]
    names = [r.name for r in runs]
    return [r for i, r in enumerate(runs) if r.name not in names[:i]]


def run_at(config: GridConfig, budget: float, matrices: float, *, predicted: bool = False) -> PlannedRun:
    """A run of about this size at a budget. Tokens follow from the size's own FLOPs, head and attention included."""
    model = of_size(matrices, vocab_size=config.vocab_size, context=config.sequence_length)
    tokens = budget / model.train_flops_per_token(config.sequence_length)
    name = f"{budget:.2e}-{model.dim}x{model.n_layers}".replace("+", "")
    return PlannedRun(name=name, budget=budget, model=model, tokens=tokens, predicted=predicted)


def centre(config: GridConfig, budget: float, done: Points | None) -> float:
    """The size that is expected to be best at a budget: by the minima of the budgets that are done, else by the guess."""
    guess = math.sqrt(budget / (6 * config.tokens_per_parameter))
    if done is None:
        return guess
    found = []
    for flops, group in done.by_budget():
        size = lowest_size(group)
        if size is not None:
            found.append((flops, size))
    if not found:
        return guess
    # The exponent is near a half (Hoffmann et al. 2022); two budgets' minima are too noisy to measure it by.
    return float(np.exp(np.mean([math.log(size) + 0.5 * math.log(budget / flops) for flops, size in found[-2:]])))


def lowest_size(group: Points) -> float | None:
    """Where a parabola in log size is lowest; None if it opens downwards. Kept within twice the grid."""
    if len(group) < 3:
        return None
    x = np.log(group.parameters)
    r, q, _ = np.polyfit(x - x.mean(), group.loss, 2)
    if r <= 0:
        return float(group.parameters[int(np.argmin(group.loss))])
    low, high = x.min() - math.log(2), x.max() + math.log(2)
    return float(np.exp(np.clip(x.mean() - q / (2 * r), low, high)))


def missing_side(config: GridConfig, group: Points) -> float | None:
    """A size to add to a budget whose lowest loss is at the edge of its grid; None if it is inside."""
    order = np.argsort(group.parameters)
    lowest = int(np.argmin(group.loss[order]))
    step = config.span ** (1 / (config.sizes - 1))
    if lowest == 0 and group.parameters[order[0]] / step >= config.least_parameters:
        return float(group.parameters[order[0]] / step)
    if lowest == len(order) - 1:
        return float(group.parameters[order[-1]] * step)
    return None


def cost(runs: Sequence[PlannedRun]) -> float:
    """FLOPs of runs together."""
    return sum(r.flops for r in runs)


def sizes_of(run: PlannedRun) -> dict[str, int]:
    """A run's parameters in all three ways of counting."""
    c = counted(run.model)
    return {"all": c.all, "matrices": c.matrices, "body": c.body}
