"""How far from the true minimum do parabolas' minima lie, on the very grid that was run? Noise apart, two witnesses:

    a law       is fitted to the same runs; parabolas through the law's own losses are compared with the law's own optimum,
                which is known in closed form, both as lines over the budgets, up to two orders of magnitude beyond them
    bent curves polynomials of up to the fourth degree through each budget, which follow what a parabola cannot

The law sees all budgets at once, so that few runs at each suffice, and it does not take for noise what repeats at every
budget: five sizes a factor of twenty apart miss their parabolas by as much, in the same way, at each, and the bent curves' test,
which knows only what they leave, then thinks that chance does it. Refits to resampled runs say how well the law knows. Bent curves
assume no law, and speak where the runs lie on none (`misfit`).
"""

from collections.abc import Sequence

import numpy as np

from puna.errors import DataError
from puna.scaling import misfit, parametric
from puna.scaling.parabola import Parabola, line
from puna.scaling.points import Points

BEYOND = 100.0  # times the largest budget: as far as the optimum is held to
_ALLOWED = 0.015  # of the optimal tokens, by the law's account, from which parabolas are not to be trusted
_BENT = 0.01  # the same by the bent curves'
_DRAWS = 40  # of the law
_TRIALS = 200


def warnings(points: Points, budgets: Sequence[Parabola], seed: int) -> list[str]:
    """What to say of a grid on which parabolas are displaced, or on which nobody can tell."""
    least, most = by_law(points, budgets, seed)
    certain = max(least, -most)
    shift = np.nan if certain > _ALLOWED else bent_shift(budgets, seed)
    if certain > _ALLOWED:
        shift = least if least > 0 else most
        how = "a law fitted to these runs is lowest at least"
    elif abs(shift) > 0:
        how = "curves that may be lopsided are lowest"
    elif np.isfinite(shift) or max(most, -least) <= _ALLOWED:
        return []
    else:
        return [
            "so few runs at each budget cannot show whether its curve is lopsided, and a parabola's minimum then lies up to "
            "10% off: run 6 sizes at each budget, or 5 at four"
        ]
    return [
        f"{how} {np.expm1(shift):+.1%} in tokens from the parabolas: the grid reaches too far or lies off-centre for a "
        "parabola. Add runs near the minima, or trust the parametric fit"
    ]


def by_law(points: Points, budgets: Sequence[Parabola], seed: int) -> tuple[float, float]:
    """From the parabolas' optimum to the law's, in log tokens: the ends of 90% of the law's draws, widest in [1, BEYOND].

    (-inf, inf) where the runs give no law, or do not lie on one.
    """
    unknown = -np.inf, np.inf
    try:
        law = parametric.fit(points, draws=_DRAWS, seed=seed)
    except DataError:
        return unknown
    if misfit.missed(points, law) is not None:
        return unknown
    log_flops = np.log([float(b.group.budgets[0]) for b in budgets])
    far = log_flops.max() + np.log([1.0, BEYOND])
    rows = np.concatenate([law.best, law.draws])
    slopes, offsets = line(log_flops, np.stack([_from_parabola(rows, b) for b in budgets], axis=1))
    shifts = offsets[:, None] + slopes[:, None] * far  # (1 + draws, 2)
    shifts = shifts[np.isfinite(shifts).all(axis=1)]
    if len(shifts) < 0.9 * len(rows):
        return unknown
    low, high = np.quantile(shifts, [0.05, 0.95], axis=0)
    least, most = float(low.max()), float(high.min())  # where it is surest to be displaced to one side
    return (least, most) if least > 0 or most < 0 else (float(low.min()), float(high.max()))


def _from_parabola(rows: np.ndarray, budget: Parabola) -> np.ndarray:
    """For laws as rows of constants: the minimum along this budget's runs, less that of the parabola through them."""
    group = budget.group
    e, a, alpha, b, beta = rows.T[:, :, None]
    found = budget.minima(e + a * group.parameters**-alpha + b * group.tokens**-beta)
    # Along the budget's runs log N = start - fall * log D; the fall is not quite 1 where attention costs more in small models.
    slope, start = np.polyfit(np.log(group.tokens), np.log(group.parameters), 1)
    _, a, alpha, b, beta = rows.T
    own = (np.log(beta * b) - np.log(alpha * a * -slope) + alpha * start) / (beta - alpha * slope)
    return own - found


def bent_shift(budgets: Sequence[Parabola], seed: int) -> float:
    """From the parabolas' minima to bent curves', in log tokens; 0 where noise may do it, NaN where too few runs can tell.

    The distance between both minima, averaged over the budgets, is put against its distribution where the parabolas are the
    truth and only noise is added.
    """
    free = [b for b in budgets if len(b.x) >= 5]
    freedom = sum(len(b.x) - _bent(b).shape[1] for b in free)
    if freedom < 4:
        return float("nan")
    random = np.random.default_rng(seed)
    left = [b.loss - _bent(b) @ np.linalg.lstsq(_bent(b), b.loss, rcond=None)[0] for b in free]
    noise = np.sqrt(sum(float(r @ r) for r in left) / freedom)
    shifts, chance = [], np.zeros(_TRIALS)
    for b in free:
        shifts.append(float(_shift(b, b.loss[None])[0]))
        made = b.powers @ b.coefficients + noise * random.standard_normal((_TRIALS, len(b.x)))
        chance += _shift(b, made) / len(free)
    shift = float(np.mean(shifts))
    return shift if abs(shift) > max(_BENT, float(np.nanquantile(np.abs(chance), 0.99))) else 0.0


def _bent(budget: Parabola) -> np.ndarray:
    degree = min(4, len(budget.x) - 2)
    return np.stack([budget.x**k for k in range(degree + 1)], axis=1)


def _shift(budget: Parabola, losses: np.ndarray) -> np.ndarray:
    """From the parabola's minimum to the bent curve's, in log tokens, for a stack of losses; within the grid."""
    coefficients = np.linalg.pinv(_bent(budget)) @ losses.T
    fine = np.linspace(budget.x.min(), budget.x.max(), 801)
    values = np.stack([fine**k for k in range(len(coefficients))], axis=1) @ coefficients
    at = np.clip(budget.minima(losses) - budget.middle, fine[0], fine[-1])
    return np.where(np.isfinite(at), fine[np.argmin(values, axis=0)] - at, 0.0)
