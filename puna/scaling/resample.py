"""Residuals drawn anew, as large as the noise was: what the intervals of every fit are made of.

Three corrections make an interval cover at its stated rate (`tests/scaling/test_coverage.py`, 200 draws of each fit):
residuals are smaller than the noise, since the fit followed it; few residuals do not know the noise well, which Student's
t accounts for; and few residuals are few values, so half of the variance is drawn from a normal distribution.
"""

import numpy as np

from puna.errors import MissingExtra


def widened(residual: np.ndarray, *, exact: float, freedom: int) -> np.ndarray:
    """Residuals scaled to what is known of the noise: `exact` is their sum of squares before any correction."""
    try:
        from scipy.stats import norm, t
    except ImportError:
        raise MissingExtra("scipy", "scaling") from None

    freedom = max(1, freedom)
    size = float(np.sqrt(np.mean(residual**2)))
    if size == 0:
        return residual
    wanted = max(size, float(np.sqrt(exact / freedom)))
    return residual * (wanted / size) * (t.ppf(0.95, freedom) / norm.ppf(0.95))


def smooth_resample(residual: np.ndarray, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Noise of the residuals' size: half of its variance from their values, half normal."""
    random = np.random.default_rng(seed)
    normal = float(np.sqrt(np.mean(residual**2))) * random.standard_normal(shape)
    return np.sqrt(0.5) * (random.choice(residual, shape) + normal)
