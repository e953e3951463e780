"""The envelope of training curves: at each amount of compute the size whose curve is lowest there (Hoffmann's approach 1).

One run gives a loss for every compute it passed, so few runs give a whole range of budgets. But a loss in the middle of
a run is that of a run of that length only if the learning rate had come down by then: with cosine or annealed schedules
the middle is too high and the envelope favours the sizes whose runs end there. Use it on runs with a constant rate,
or on several lengths per size; `fit` warns where it sees losses come down at the ends of the runs.

Between the sizes that were run the lowest is found by a parabola in log size through a curve and its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puna.errors import DataError
from puna.scaling.frontier import Frontier
from puna.scaling.law import FLOPS_PER_PARAMETER, Counts
from puna.scaling.resample import widened

_REACH = 2  # curves on each side of the lowest that the parabola goes through
_END = 0.1  # of a run's tokens, in which a schedule's descent shows
_STEEPER = 1.5  # than before: with a constant rate a run's end is the flattest part
_DISPLACED = 0.01  # of the size, from which a window's parabola is not to be trusted


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """One run: loss (nats per token, smoothed) after each number of tokens."""

    parameters: float
    tokens: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """The lowest size at each compute, and the power law through them."""

    flops: np.ndarray
    parameters: np.ndarray
    loss: np.ndarray
    frontier: Frontier
    warnings: tuple[str, ...] = ()


def fit(
    curves: Sequence[TrainingCurve],
    *,
    name: str = "runs",
    counts: Counts = "all",
    per_parameter: float = FLOPS_PER_PARAMETER,
    steps: int = 60,
    draws: int = 400,
    seed: int = 0,
) -> Envelope:
    """The envelope at `steps` amounts of compute. Raises `DataError` where curves do not overlap enough for one."""
    sizes = np.array([c.parameters for c in curves], dtype=float)
    if len(set(sizes.tolist())) < 2 * _REACH + 1:
        hint = f"run {2 * _REACH + 1} sizes or more for tokens that overlap in compute"
        raise DataError(
            f"an envelope needs curves of {2 * _REACH + 1} sizes, not {len(set(sizes.tolist()))}", hint=hint
        )
    compute = _compute(curves, per_parameter, steps)
    table = _table(curves, compute, per_parameter)  # (C, run)
    windows = _windows(table)
    if len(windows) < 3:
        hint = "the lowest curve must have two others on each side over a range of compute: add sizes or lengthen runs"
        raise DataError("the curves have no envelope: at hardly any compute is a middle size the lowest", hint=hint)
    rows = np.array([i for i, _ in windows])
    designs = [_Window(np.log(sizes[members]), table[i, members], members) for i, members in windows]
    best = np.array([w.minimum(w.loss) for w in designs])
    log_flops = np.log(compute[rows])
    slope, offset = np.polyfit(log_flops, log_flops - np.log(per_parameter) - best, 1)
    drawn = _resampled(designs, log_flops, len(curves), per_parameter, draws, seed)
    frontier = Frontier(
        name=name, source=f"envelope of {len(curves)} training curves", counts=counts,
        factor=float(np.exp(offset)), exponent=float(slope), draws=drawn, largest_flops=float(compute[rows].max()),
    )  # fmt: skip
    return Envelope(
        flops=compute[rows], parameters=np.exp(best), loss=np.array([w.lowest for w in designs]), frontier=frontier,
        warnings=_schedule_warnings(curves) + _spacing_warnings(designs),
    )  # fmt: skip


class _Window:
    """The lowest curve at one compute with its neighbours in size, and the parabola through them."""

    def __init__(self, log_size: np.ndarray, loss: np.ndarray, members: np.ndarray):
        self.members, self.loss = members, loss
        self.middle = float(log_size.mean())
        self.powers = np.stack([(log_size - self.middle) ** k for k in range(3)], axis=1)
        self.solve = np.linalg.pinv(self.powers)
        self.coefficients = self.solve @ loss
        self.residual = loss - self.powers @ self.coefficients
        p, q, r = self.coefficients
        self.lowest = float(p - q * q / (4 * r)) if r > 0 else float(loss.min())

    def minimum(self, losses: np.ndarray) -> np.ndarray:
        """Log size at the minimum for losses of shape (n,) or (n, R); NaN where there is none."""
        _, q, r = self.solve @ losses
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(r > 0, self.middle - q / (2 * r), np.nan)


def _compute(curves: Sequence[TrainingCurve], per_parameter: float, steps: int) -> np.ndarray:
    """Amounts of compute, even in the logarithm, over where at least five curves are."""
    starts = sorted(per_parameter * c.parameters * c.tokens[0] for c in curves)
    ends = sorted((per_parameter * c.parameters * c.tokens[-1] for c in curves), reverse=True)
    low, high = starts[2 * _REACH], ends[2 * _REACH]
    if not low < high:
        raise DataError("the curves do not overlap in compute", hint="give all sizes similar amounts of compute")
    return np.geomspace(low, high, steps)


def _table(curves: Sequence[TrainingCurve], compute: np.ndarray, per_parameter: float) -> np.ndarray:
    """Each curve's loss at each compute; NaN where the run was not."""
    columns = []
    for curve in curves:
        at = np.log(compute / (per_parameter * curve.parameters))
        tokens = np.log(curve.tokens)
        columns.append(np.interp(at, tokens, curve.loss, left=np.nan, right=np.nan))
    return np.stack(columns, axis=1)


def _windows(table: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Where a curve is lowest with others on both sides: (row, the columns of it and its neighbours)."""
    found = []
    for row, losses in enumerate(table):
        present = np.flatnonzero(np.isfinite(losses))
        if len(present) < 2 * _REACH + 1:
            continue
        lowest = int(np.argmin(losses[present]))
        if _REACH <= lowest < len(present) - _REACH:
            members = present[lowest - _REACH : lowest + _REACH + 1]
            loss = losses[members]
            if np.polyfit(np.arange(len(loss)), loss, 2)[0] > 0:
                found.append((row, members))
    return found


def _resampled(
    windows: list[_Window], log_flops: np.ndarray, runs: int, per_parameter: float, draws: int, seed: int
) -> np.ndarray:
    """Power laws through envelopes of curves with noise: a run is high or low as a whole, and scatters along the way."""
    freedom = sum(len(w.loss) - 3 for w in windows)
    all_residuals = np.concatenate([w.residual for w in windows])
    size = np.sqrt(np.sum(all_residuals**2) / max(1, freedom))
    offsets = np.zeros(runs)
    counts = np.zeros(runs)
    for w in windows:
        np.add.at(offsets, w.members, w.residual)
        np.add.at(counts, w.members, 1)
    touched = counts > 0
    between = np.mean((offsets[touched] / counts[touched]) ** 2) / max(1e-300, np.mean(all_residuals**2))
    share = float(np.clip(between, 0.0, 1.0))
    independent = max(1, int(touched.sum()) - 3)
    scale = float(np.sqrt(np.mean(widened(np.array([-size, size]), exact=0.0, freedom=independent) ** 2)))
    random = np.random.default_rng(seed)
    whole = np.sqrt(share) * scale * random.standard_normal((runs, draws))
    drawn = []
    for w in windows:
        along = np.sqrt(1 - share) * scale * random.standard_normal((len(w.loss), draws))
        fitted = (w.powers @ w.coefficients)[:, None]
        drawn.append(w.minimum(fitted + whole[w.members] + along))
    sizes = np.stack(drawn)  # (C, R)
    tokens = log_flops[:, None] - np.log(per_parameter) - sizes
    tokens = tokens[:, np.isfinite(tokens).all(axis=0)]
    slopes, constants = np.polyfit(log_flops, tokens, 1)
    return np.stack([constants, slopes], axis=1)


def _schedule_warnings(curves: Sequence[TrainingCurve]) -> tuple[str, ...]:
    """Whether the runs' losses come down at their ends as no constant rate makes them."""
    ratios = []
    for curve in curves:
        x = np.log(curve.tokens)
        last, before = x[-1] + np.log([1 - _END, (1 - _END) ** 3])
        late, early = x >= last, (x >= before) & (x < last)
        if late.sum() >= 2 and early.sum() >= 2:
            slopes = [np.polyfit(x[part], np.log(curve.loss[part]), 1)[0] for part in (late, early)]
            if slopes[1] < 0:
                ratios.append(slopes[0] / slopes[1])
    if ratios and np.median(ratios) > _STEEPER:
        return (
            f"losses fall {np.median(ratios):.1f} times as steeply at the runs' ends as before: the learning rate came down "
            "there, so the middle of a run is not what a shorter run would reach. Use the isoFLOP or parametric fit",
        )
    return ()


def _spacing_warnings(windows: list[_Window]) -> tuple[str, ...]:
    """Whether sizes are so far apart that a lopsided curve through them has its minimum elsewhere."""
    shifts = []
    for w in windows:
        c = np.polyfit(w.powers[:, 1], w.loss, 3)
        fine = np.linspace(w.powers[:, 1].min(), w.powers[:, 1].max(), 801)
        found = w.minimum(w.loss) - w.middle
        if np.isfinite(found):
            shifts.append(fine[int(np.argmin(np.polyval(c, fine)))] - found)
    sizes = len({int(m) for w in windows for m in w.members})
    if shifts and abs(np.mean(shifts)) > max(_DISPLACED, 3 * np.std(shifts) / np.sqrt(sizes)):
        return (
            f"lopsided curves through the same sizes are lowest {np.expm1(np.mean(shifts)):+.1%} in size away: the sizes "
            "are too far apart for a parabola. Add sizes between them, or use the parametric fit",
        )
    return ()
