"""IsoFLOP curves: at each budget a parabola through the losses, its minimum, and a power law through the minima.

    loss = p + q x + r x^2,  x = log tokens      D*(C) = exp(-q / 2r)      log D* = log factor + exponent * log C

Llama 3's method (arXiv 2407.21783, 3.2.1) and Hoffmann's approach 2. It assumes no form of the law, but a parabola is
not a law's section: where the grid lies off the minimum or reaches far, its minimum is displaced, by the same share at
each budget if the grids are alike, so that the exponent looks well while the size is wrong (Czech et al. 2026, arXiv
2603.22339, find 37 to 43% of the size of Llama 3's own curves). Such grids are named in `warnings`: what gives them away
is a curve of higher degree through the same losses, whose minimum is elsewhere.
"""

from dataclasses import dataclass, field

import numpy as np

from puna.errors import DataError
from puna.scaling.frontier import Frontier
from puna.scaling.law import Estimate
from puna.scaling.points import Points, need
from puna.scaling.resample import smooth_resample, widened

_LEAST = 4  # runs at a budget
_DISPLACED = 0.01  # of the optimal tokens, by a bent curve's account, from which parabolas are not to be trusted
_TRIALS = 200
_SIDE = 0.15  # the minimum shall have at least this share of the grid's width on each side


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One budget: its parabola in log tokens and where it is lowest."""

    flops: float
    tokens: Estimate  # at the minimum
    parameters: float
    loss: float
    coefficients: tuple[float, float, float]  # of 1, x, x^2; x = log tokens - middle
    middle: float
    runs: int

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """The parabola's loss."""
        x = np.log(tokens) - self.middle
        return self.coefficients[0] + self.coefficients[1] * x + self.coefficients[2] * x**2


@dataclass(frozen=True, kw_only=True)
class IsoFlops:
    """The fit: curves, the power law through their minima, and what is wrong with the grid."""

    curves: tuple[Curve, ...]
    frontier: Frontier
    warnings: tuple[str, ...] = field(default=())


def fit(points: Points, *, name: str = "runs", draws: int = 400, seed: int = 0) -> IsoFlops:
    """Fit every budget and the power law. Raises `DataError` if fewer than two budgets have a minimum."""
    need(points, 2 * _LEAST, "isoFLOP curves")
    groups, warnings = [], []
    for budget, group in points.by_budget():
        reason = _unfit(group)
        if reason:
            warnings.append(f"budget {budget:.2g}: left out, {reason}")
        else:
            groups.append((budget, group))
            warnings += [f"budget {budget:.2g}: {w}" for w in _off_centre(group)]
    if len(groups) < 2:
        detail = "; ".join(warnings)
        hint = f"run sizes on both sides of the best one, at {_LEAST} sizes and two budgets at least"
        raise DataError(f"only {len(groups)} budgets have a minimum: {detail}", hint=hint)
    flops = np.array([budget for budget, _ in groups])
    designs = [_Design(group) for _, group in groups]
    warnings += _displaced(designs, seed)
    residuals = _noise(designs)
    minima = np.stack([d.minima(d.resampled(residuals, draws, seed + i)) for i, d in enumerate(designs)], axis=1)
    minima = minima[np.isfinite(minima).all(axis=1)]
    if len(minima) < 0.9 * draws:
        warnings.append("the curves are so flat or noisy that a tenth of the resampled ones have no minimum")
    best = np.array([d.minima(d.loss[None])[0] for d in designs])
    slope, offset = _line(np.log(flops), best[None])
    slopes, offsets = _line(np.log(flops), minima)
    frontier = Frontier(
        name=name,
        source=f"isoFLOP parabolas at {len(groups)} budgets, {sum(len(g) for _, g in groups)} runs",
        counts=points.counts, factor=float(np.exp(offset[0])), exponent=float(slope[0]),
        draws=np.stack([offsets, slopes], axis=1), largest_flops=float(flops.max()),
    )  # fmt: skip
    curves = [d.curve(budget, minima[:, i], group) for i, ((budget, group), d) in enumerate(zip(groups, designs))]
    return IsoFlops(curves=tuple(curves), frontier=frontier, warnings=tuple(warnings))


class _Design:
    """A budget's runs, ready to be fitted many times: x, and the matrix that turns losses into coefficients."""

    def __init__(self, group: Points):
        x = np.log(group.tokens)
        self.middle = float(x.mean())
        self.x, self.loss = x - self.middle, group.loss
        self.powers = np.stack([self.x**k for k in range(3)], axis=1)
        self.solve = np.linalg.pinv(self.powers)  # (3, n)
        self.coefficients = self.solve @ self.loss
        self.residual = self.loss - self.powers @ self.coefficients

    def leverage(self) -> np.ndarray:
        return np.einsum("nk,kn->n", self.powers, self.solve)

    def resampled(self, residuals: np.ndarray, draws: int, seed: int) -> np.ndarray:
        """Losses of the parabola with noise: (draws, n)."""
        return self.powers @ self.coefficients + smooth_resample(residuals, (draws, len(self.x)), seed)

    def minima(self, losses: np.ndarray) -> np.ndarray:
        """Log tokens at the minimum for a stack of losses; NaN where there is none."""
        _, q, r = self.solve @ losses.T
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(r > 0, self.middle - q / (2 * r), np.nan)

    def curve(self, flops: float, minima: np.ndarray, group: Points) -> Curve:
        best = float(self.minima(self.loss[None])[0])
        low, high = np.quantile(minima, [0.05, 0.95])
        p, q, r = (float(c) for c in self.coefficients)
        tokens = Estimate(*(float(np.exp(v)) for v in (best, min(low, best), max(high, best))))
        per_run = group.flops / (group.parameters * group.tokens)
        return Curve(
            flops=flops, tokens=tokens, parameters=flops / (tokens.value * float(np.exp(np.mean(np.log(per_run))))),
            loss=p - q**2 / (4 * r), coefficients=(p, q, r), middle=self.middle, runs=len(self.x),
        )  # fmt: skip


def _noise(designs: list[_Design]) -> np.ndarray:
    """The residuals of all budgets together, as large as the noise is."""
    larger = [d.residual / np.sqrt(np.maximum(1 - d.leverage(), 0.05)) for d in designs]
    exact = sum(float(np.sum(d.residual**2)) for d in designs)
    freedom = sum(len(d.x) - 3 for d in designs)
    return widened(np.concatenate([x - x.mean() for x in larger]), exact=exact, freedom=freedom)


def _line(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of each row of `rows` on x: slopes, and values at x = 0."""
    centred = x - x.mean()
    slopes = (rows - rows.mean(axis=1, keepdims=True)) @ centred / (centred @ centred)
    return slopes, rows.mean(axis=1) - slopes * x.mean()


def _unfit(group: Points) -> str:
    if len(group) < _LEAST:
        return f"{len(group)} runs are too few for a parabola ({_LEAST} at least)"
    design = _Design(group)
    if design.coefficients[2] <= 0:
        return "its losses have no minimum"
    at = design.minima(design.loss[None])[0]
    low, high = np.log(group.tokens[[0, -1]])
    if not low < at < high:
        side = "more tokens (smaller models)" if at > high else "fewer tokens (larger models)"
        return f"its minimum lies outside the grid: add runs with {side}"
    return ""


def _off_centre(group: Points) -> list[str]:
    """Whether the minimum lies well inside the grid."""
    design = _Design(group)
    at = float(design.minima(design.loss[None])[0])
    low, high = np.log(group.tokens[[0, -1]])
    share = (at - low) / (high - low)
    if _SIDE <= share <= 1 - _SIDE:
        return []
    side = "more" if share > 0.5 else "fewer"
    return [f"the grid is off-centre, its minimum {share:.0%} along it: add runs with {side} tokens"]


def _displaced(designs: list[_Design], seed: int) -> list[str]:
    """Whether curves that may be lopsided have their minima elsewhere, beyond what noise would do.

    A polynomial of up to the fourth degree follows what a parabola cannot. The distance between both minima, averaged over
    the budgets, is put against its distribution where the parabolas are the truth and only noise is added.
    """
    free = [d for d in designs if len(d.x) >= 5]
    if sum(len(d.x) - _bent(d).shape[1] for d in free) < 4:
        return [
            "so few runs at each budget cannot show whether its curve is lopsided, and a parabola's minimum then lies up to "
            "10% off: run 6 sizes at each budget, or 5 at four"
        ]
    random = np.random.default_rng(seed)
    left = [d.loss - _bent(d) @ np.linalg.lstsq(_bent(d), d.loss, rcond=None)[0] for d in free]
    freedom = sum(len(d.x) - _bent(d).shape[1] for d in free)
    noise = np.sqrt(sum(float(r @ r) for r in left) / max(1, freedom))
    shifts, chance = [], np.zeros(_TRIALS)
    for d in free:
        shifts.append(float(_shift(d, d.loss[None])[0]))
        made = d.powers @ d.coefficients + noise * random.standard_normal((_TRIALS, len(d.x)))
        chance += _shift(d, made) / len(free)
    shift = float(np.mean(shifts))
    if abs(shift) <= max(_DISPLACED, float(np.nanquantile(np.abs(chance), 0.99))):
        return []
    return [
        f"curves that may be lopsided have their minima {np.expm1(shift):+.1%} in tokens from the parabolas': the grid "
        "reaches too far or lies off-centre for a parabola. Add runs near the minima, or trust the parametric fit"
    ]


def _bent(design: _Design) -> np.ndarray:
    degree = min(4, len(design.x) - 2)
    return np.stack([design.x**k for k in range(degree + 1)], axis=1)


def _shift(design: _Design, losses: np.ndarray) -> np.ndarray:
    """From the parabola's minimum to the bent curve's, in log tokens, for a stack of losses; within the grid."""
    coefficients = np.linalg.pinv(_bent(design)) @ losses.T
    fine = np.linspace(design.x.min(), design.x.max(), 801)
    values = np.stack([fine**k for k in range(len(coefficients))], axis=1) @ coefficients
    at = np.clip(design.minima(losses) - design.middle, fine[0], fine[-1])
    return np.where(np.isfinite(at), fine[np.argmin(values, axis=0)] - at, 0.0)
