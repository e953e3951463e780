"""One budget's runs and the parabola in log tokens through their losses."""

import numpy as np

from puna.scaling.points import Points
from puna.scaling.resample import smooth_resample


class Parabola:
    """Ready to be fitted many times: x = log tokens - middle, and the matrix that turns losses into coefficients."""

    def __init__(self, group: Points):
        x = np.log(group.tokens)
        self.group, self.middle = group, float(x.mean())
        self.x, self.loss = x - self.middle, group.loss
        self.powers = np.stack([self.x**k for k in range(3)], axis=1)
        self.solve = np.linalg.pinv(self.powers)  # (3, n)
        self.coefficients = self.solve @ self.loss
        self.residual = self.loss - self.powers @ self.coefficients

    def leverage(self) -> np.ndarray:
        """How much each run pulls the curve to itself, 0 to 1."""
        return np.einsum("nk,kn->n", self.powers, self.solve)

    def resampled(self, residuals: np.ndarray, draws: int, seed: int) -> np.ndarray:
        """Losses of the parabola with noise: (draws, n)."""
        return self.powers @ self.coefficients + smooth_resample(residuals, (draws, len(self.x)), seed)

    def minima(self, losses: np.ndarray) -> np.ndarray:
        """Log tokens at the minimum for a stack of losses; NaN where there is none."""
        _, q, r = self.solve @ losses.T
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(r > 0, self.middle - q / (2 * r), np.nan)


def line(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of each row of `rows` on x: slopes, and values at x = 0."""
    centred = x - x.mean()
    slopes = (rows - rows.mean(axis=1, keepdims=True)) @ centred / (centred @ centred)
    return slopes, rows.mean(axis=1) - slopes * x.mean()
