"""Do the runs lie on one surface at all? The question before a law's constants, which no interval of them answers.

    lack of fit     (squares that the law leaves - squares that a curve through each budget leaves) per degree of freedom,
                    over the latter's: an F test, as for any regression with groups (Draper & Smith, ch. 1.5)

A law of five constants says how low each budget's curve lies and how strongly it bends, both at once: what is left above E
makes the curve's bend, so that curves flatten as loss falls. Runs need not obey: batch, rate and data may differ
between budgets, or the form be wrong. The law then is a compromise whose optimum can be off by factors, with a narrow
interval. So a law is also fitted with a level for each budget,

    L = E_c + A / N^alpha + B / D^beta        E_c free for each budget c

which sees only where each curve is lowest and how it bends, and the bend of the largest budget's curve is told beside the law's.
"""

import numpy as np

from puna.errors import MissingExtra
from puna.scaling.law import Law
from puna.scaling.points import Points

_CHANCE = 1e-3  # of a false alarm
_LEAST = 5  # runs of a budget from which a curve through it says how large the noise is
_GRID = np.linspace(0.05, 0.95, 8)  # of both exponents
_DELTA = 1e-3  # as the parametric fit's


def missed(points: Points, law: Law) -> tuple[float, float] | None:
    """Mean log losses that the law and curves through each budget leave, where the runs do not lie on the law's surface."""
    groups = _told_by(points)
    if len(groups) < 2:
        return None
    off = [np.log(g.loss) - np.log(_told(law, g)) for g in groups]
    left, freedom = _within(groups)
    squares, more = sum(float(r @ r) for r in off), sum(map(len, groups)) - 5 - freedom
    if more < 1 or freedom < 2 or squares <= left or _by_chance((squares - left) / more, left / freedom, more, freedom):
        return None
    return float(np.sqrt(squares / sum(map(len, groups)))), float(np.sqrt(left / freedom))


def warnings(points: Points, law: Law, flops: float) -> tuple[str, ...]:
    """What to say where the runs do not lie on the law's surface. `flops`: for which the optimum with levels is told."""
    off = missed(points, law)
    if off is None:
        return ()
    largest = _told_by(points)[-1]
    optimum = law.optimum(flops, per_parameter=points.per_parameter()).parameters.value
    return (
        f"the runs do not lie on one surface E + A/N^alpha + B/D^beta: they miss it by {off[0]:.2%}, where a "
        f"curve through each budget leaves {off[1]:.2%}; the curve of {largest.budgets[0]:.2g} FLOPs bends "
        f"{bends(law, largest):.1f} times as strongly as the law's there. The parametric optimum at {flops:.3g} FLOPs, "
        f"{optimum:.3g} parameters, is a compromise; with a level of its own for each budget it is "
        f"{with_levels(points, flops):.3g}. Trust the isoFLOP curves",
    )


def _told_by(points: Points) -> list[Points]:
    """The budgets with runs enough to say how large the noise is."""
    return [group for _, group in points.by_budget() if len(group) >= _LEAST]


def bends(law: Law, group: Points) -> float:
    """How strongly a budget's runs bend, over log tokens, as a multiple of what the law says for the same runs."""
    x = np.log(group.tokens)
    measured, told = (np.polyfit(x - x.mean(), loss, 2)[0] for loss in (group.loss, _told(law, group)))
    return float(measured / told)


def with_levels(points: Points, flops: float) -> float:
    """The best parameters for `flops` by a law whose constant is free for each budget."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingExtra("scipy", "scaling") from None

    n, d = np.log(points.parameters), np.log(points.tokens)
    n0, d0 = float(n.mean()), float(d.mean())
    level = (points.budgets[:, None] == np.unique(points.budgets)).astype(float)

    def solved(exponents: np.ndarray) -> tuple[float, np.ndarray]:
        terms = [np.exp(-exponents[0] * (n - n0)), np.exp(-exponents[1] * (d - d0))]
        design = np.column_stack([level, *terms]) / points.loss[:, None]
        weight = np.ones(len(n))
        for _ in range(5):
            root = np.sqrt(weight)
            linear, *_ = np.linalg.lstsq(design * root[:, None], root, rcond=None)
            size = np.abs(design @ linear - 1)
            weight = _DELTA / np.maximum(size, _DELTA)
        huber = np.where(size <= _DELTA, 0.5 * size**2, _DELTA * (size - 0.5 * _DELTA))
        return float(huber.sum()) + 1e3 * float(min(0.0, *linear[-2:]) ** 2), linear[-2:]

    first = min(((a, b) for a in _GRID for b in _GRID), key=lambda x: solved(np.array(x))[0])
    found = minimize(
        lambda x: solved(x)[0],
        first,
        method="Nelder-Mead",
        bounds=[(1e-3, 3.0)] * 2,
        options={"xatol": 1e-4, "fatol": 1e-12},
    )
    (alpha, beta), (a, b) = found.x, np.maximum(solved(found.x)[1], 1e-12)
    ratio = np.log(alpha * a) + alpha * n0 - np.log(beta * b) - beta * d0
    product = flops / points.per_parameter()
    return float(np.exp((ratio + beta * np.log(product)) / (alpha + beta)))


def _told(law: Law, group: Points) -> np.ndarray:
    return law.e + law.a * group.parameters**-law.alpha + law.b * group.tokens**-law.beta


def _within(groups: list[Points]) -> tuple[float, int]:
    """Squares of log loss that a polynomial through each budget leaves, and how many numbers are left to say so."""
    left, freedom = 0.0, 0
    for group in groups:
        degree = min(4, len(group) - 2)
        x = np.log(group.tokens)
        powers = np.vander((x - x.mean()) / max(float(np.ptp(x)), 1e-9), degree + 1)
        y = np.log(group.loss)
        residual = y - powers @ np.linalg.lstsq(powers, y, rcond=None)[0]
        left += float(residual @ residual)
        freedom += len(group) - degree - 1
    return left, freedom


def _by_chance(more: float, left: float, of_more: int, of_left: int) -> bool:
    try:
        from scipy.stats import f
    except ImportError:
        raise MissingExtra("scipy", "scaling") from None
    return bool(f.sf(more / max(left, 1e-300), of_more, of_left) > _CHANCE)
