"""What a law does not know where no run has been, measured by hiding the outermost runs from it.

A fit's interval says how well the constants are known *if the formula holds*. Far from the runs it need not: fits made
on ordinary ratios of tokens to parameters are wrong at extreme ones (Sardana et al. 2024, arXiv 2401.00448). So the runs
with the most tokens per parameter, the fewest, and the most compute are hidden in turn, the rest is fitted, and the
errors on the hidden ones are put against their distance from the rest:

    drift^2 = mean over hidden runs of (error^2 - noise^2) / mean of distance^2        log loss per decade
"""

from dataclasses import dataclass

import numpy as np

from puna.errors import DataError
from puna.scaling import parametric
from puna.scaling.law import Estimate, Law
from puna.scaling.points import Points

_HIDDEN = 0.2  # share of the runs
_MOST_GROUPS = 12  # fits that `by_size` makes


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A run that was predicted without it."""

    parameters: float
    tokens: float
    loss: float
    predicted: Estimate

    @property
    def error(self) -> float:
        """Prediction over measurement, less one."""
        return self.predicted.value / self.loss - 1


def measured_drift(points: Points) -> float:
    """The drift of these runs' law; 0 where there are too few runs to hide any, or none shows."""
    errors, distances, noises = [], [], []
    for key in (points.tokens / points.parameters, points.parameters / points.tokens, points.flops):
        hidden = key >= np.quantile(key, 1 - _HIDDEN)
        try:
            law = parametric.fit(points.where(~hidden), draws=0)
        except DataError:
            continue
        for n, d, loss in zip(points.parameters[hidden], points.tokens[hidden], points.loss[hidden]):
            distance = law.seen.distance(n, d)
            if distance > 0:
                errors.append(np.log(law.loss(n, d).value / loss))
                distances.append(distance)
                noises.append(law.noise)
    if not errors:
        return 0.0
    excess = np.mean(np.square(errors)) - np.mean(np.square(noises))
    return float(np.sqrt(max(0.0, excess) / np.mean(np.square(distances))))


def fit(points: Points, *, name: str = "runs", draws: int = 200, seed: int = 0) -> Law:
    """The parametric law with its measured drift: what to use for predictions."""
    return parametric.fit(points, name=name, draws=draws, seed=seed, drift=measured_drift(points))


def by_size(points: Points, drift: float) -> list[Hidden]:
    """Every size in turn hidden and predicted from the others; of very many sizes, neighbours together.

    Empty where too few are left.
    """
    sizes = np.unique(points.parameters)
    found = []
    for group in np.array_split(sizes, min(len(sizes), _MOST_GROUPS)):
        hidden = np.isin(points.parameters, group)
        try:
            law = parametric.fit(points.where(~hidden), draws=60, drift=drift)
        except DataError:
            return []
        for n, d, loss in zip(points.parameters[hidden], points.tokens[hidden], points.loss[hidden]):
            predicted = law.loss(float(n), float(d))
            found.append(Hidden(parameters=float(n), tokens=float(d), loss=float(loss), predicted=predicted))
    return found
