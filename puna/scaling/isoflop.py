"""IsoFLOP curves: at each budget a parabola through the losses, its minimum, and a power law through the minima.

    loss = p + q x + r x^2,  x = log tokens      D*(C) = exp(-q / 2r)      log D* = log factor + exponent * log C

Llama 3's method (arXiv 2407.21783, 3.2.1) and Hoffmann's approach 2. It assumes no form of the law, but a parabola is
not a law's section: where the grid lies off the minimum or reaches far, its minimum is displaced, by the same share at
each budget if the grids are alike, so that the exponent looks well while the size is wrong (Czech et al. 2026, arXiv
2603.22339, find 37 to 43% of the size of Llama 3's own curves). Such grids are named in `warnings`
(`displacement`).
"""

from dataclasses import dataclass, field

import numpy as np

from puna.errors import DataError
from puna.scaling import displacement
from puna.scaling.frontier import Frontier
from puna.scaling.law import Estimate
from puna.scaling.parabola import Parabola, line
from puna.scaling.points import Points, need
from puna.scaling.resample import widened

_LEAST = 4  # runs at a budget
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
    designs = [Parabola(group) for _, group in groups]
    warnings += displacement.warnings(points, designs, seed)
    residuals = _noise(designs)
    minima = np.stack([d.minima(d.resampled(residuals, draws, seed + i)) for i, d in enumerate(designs)], axis=1)
    minima = minima[np.isfinite(minima).all(axis=1)]
    if len(minima) < 0.9 * draws:
        warnings.append("the curves are so flat or noisy that a tenth of the resampled ones have no minimum")
    best = np.array([d.minima(d.loss[None])[0] for d in designs])
    slope, offset = line(np.log(flops), best[None])
    slopes, offsets = line(np.log(flops), minima)
    frontier = Frontier(
        name=name,
        source=f"isoFLOP parabolas at {len(groups)} budgets, {sum(len(g) for _, g in groups)} runs",
        counts=points.counts, factor=float(np.exp(offset[0])), exponent=float(slope[0]),
        draws=np.stack([offsets, slopes], axis=1), largest_flops=float(flops.max()),
    )  # fmt: skip
    curves = [_curve(d, budget, minima[:, i]) for i, ((budget, _), d) in enumerate(zip(groups, designs))]
    return IsoFlops(curves=tuple(curves), frontier=frontier, warnings=tuple(warnings))


def _curve(design: Parabola, flops: float, minima: np.ndarray) -> Curve:
    group, best = design.group, float(design.minima(design.loss[None])[0])
    low, high = np.quantile(minima, [0.05, 0.95])
    p, q, r = (float(c) for c in design.coefficients)
    tokens = Estimate(*(float(np.exp(v)) for v in (best, min(low, best), max(high, best))))
    per_run = group.flops / (group.parameters * group.tokens)
    return Curve(
        flops=flops, tokens=tokens, parameters=flops / (tokens.value * float(np.exp(np.mean(np.log(per_run))))),
        loss=p - q**2 / (4 * r), coefficients=(p, q, r), middle=design.middle, runs=len(design.x),
    )  # fmt: skip


def _noise(designs: list[Parabola]) -> np.ndarray:
    """The residuals of all budgets together, as large as the noise is."""
    larger = [d.residual / np.sqrt(np.maximum(1 - d.leverage(), 0.05)) for d in designs]
    exact = sum(float(np.sum(d.residual**2)) for d in designs)
    freedom = sum(len(d.x) - 3 for d in designs)
    return widened(np.concatenate([x - x.mean() for x in larger]), exact=exact, freedom=freedom)


def _unfit(group: Points) -> str:
    if len(group) < _LEAST:
        return f"{len(group)} runs are too few for a parabola ({_LEAST} at least)"
    design = Parabola(group)
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
    design = Parabola(group)
    at = float(design.minima(design.loss[None])[0])
    low, high = np.log(group.tokens[[0, -1]])
    share = (at - low) / (high - low)
    if _SIDE <= share <= 1 - _SIDE:
        return []
    side = "more" if share > 0.5 else "fewer"
    return [f"the grid is off-centre, its minimum {share:.0%} along it: add runs with {side} tokens"]
