"""The parametric law L = E + A / N^alpha + B / D^beta, fitted by variable projection (Hoffmann's approach 3, done well).

    minimise over alpha, beta    min over E, A, B >= 0    sum of Huber_delta(log prediction - log loss)

For given exponents the rest is linear, so only two numbers are searched for: a grid of both, then Nelder and Mead's
simplex. Fitting all five at once has a condition number around 1e11, and a hundred starting points to hide it.

The terms are *summed*. With their mean the objective is a hundred times smaller, L-BFGS's tolerance is absolute, and it
stops on the way: the constants that Hoffmann et al. printed come from there (Besiroglu et al. 2024, arXiv 2404.10102;
`tests/scaling/test_parametric.py` shows it). There is no option for the mean.

Terms are written at the middle of the data, A' = A * N0^-alpha: then A' and alpha are nearly independent, where A and
alpha are nearly the same number twice. Intervals: fits to resampled residuals, all at once (`_polish` takes a stack).
"""

import numpy as np

from puna.errors import DataError, MissingExtra
from puna.scaling.law import Law
from puna.scaling.points import Points, need
from puna.scaling.resample import smooth_resample, widened

DELTA = 1e-3  # log loss from which a residual counts by its size instead of its square
_GRID = np.linspace(0.05, 1.2, 24)  # of both exponents
_LEAST = 8


def fit(points: Points, *, name: str = "runs", draws: int = 200, seed: int = 0, drift: float = 0.0) -> Law:
    """The law of these runs. Raises `DataError` where they do not determine one.

    `drift` is what the law shall add to its intervals for each decade outside the runs; see `extrapolation`.
    """
    need(points, _LEAST, "the parametric fit")
    axes = _Axes(points)
    target = np.log(points.loss)
    best = _polish(axes, _start(axes, target)[None], target[None])[0]
    residual = target - axes.log_loss(best[None])[0]
    spread = _corrected(residual, axes.leverage(best))
    drawn = _resampled(axes, best, spread, draws, seed)
    e, a, alpha, b, beta = axes.constants(best[None])[0]
    _check(alpha, beta)
    return Law(
        name=name, source=f"parametric fit to {len(points)} runs", counts=points.counts,
        e=float(e), a=float(a), alpha=float(alpha), b=float(b), beta=float(beta),
        draws=axes.constants(drawn), noise=float(np.sqrt(np.mean(spread**2))), drift=drift, seen=points.seen(),
    )  # fmt: skip


class _Axes:
    """Log size and log tokens, measured from the middle of the runs. A row of constants here: log E, log A', alpha, ..."""

    def __init__(self, points: Points):
        n, d = np.log(points.parameters), np.log(points.tokens)
        self.n0, self.d0 = float(n.mean()), float(d.mean())
        self.n, self.d = n - self.n0, d - self.d0
        if min(np.ptp(n), np.ptp(d)) < 0.5:
            raise DataError(
                "the runs hardly differ in size or in tokens: no law can be told from them",
                hint="vary both by a factor of two at least",
            )

    def terms(self, rows: np.ndarray) -> np.ndarray:
        """E, A'/N^alpha, B'/D^beta of each run: (R, 3, n)."""
        log_e, log_a, alpha, log_b, beta = rows.T[:, :, None]
        constant = np.broadcast_to(log_e, (len(rows), len(self.n)))
        return np.exp(np.stack([constant, log_a - alpha * self.n, log_b - beta * self.d], axis=1))

    def log_loss(self, rows: np.ndarray) -> np.ndarray:
        return np.log(self.terms(rows).sum(axis=1))

    def jacobian(self, rows: np.ndarray) -> np.ndarray:
        """Of log loss by log E, log A', alpha, log B', beta: (R, n, 5)."""
        terms = self.terms(rows)
        e, a, b = (terms / terms.sum(axis=1, keepdims=True)).transpose(1, 0, 2)
        return np.stack([e, a, -a * self.n, b, -b * self.d], axis=2)

    def leverage(self, row: np.ndarray) -> np.ndarray:
        """How much each run pulls the fit to itself, 0 to 1."""
        q, _ = np.linalg.qr(self.jacobian(row[None])[0])
        return np.sum(q**2, axis=1)

    def constants(self, rows: np.ndarray) -> np.ndarray:
        """E, A, alpha, B, beta as the law has them."""
        log_e, log_a, alpha, log_b, beta = rows.T
        return np.stack(
            [np.exp(log_e), np.exp(log_a + alpha * self.n0), alpha, np.exp(log_b + beta * self.d0), beta], axis=1
        )


def _start(axes: _Axes, target: np.ndarray) -> np.ndarray:
    """Exponents by variable projection, first over a grid, then by simplex."""
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingExtra("scipy", "scaling") from None

    alphas, betas = (g.ravel() for g in np.meshgrid(_GRID, _GRID))
    cost, _ = _project(axes, target, alphas, betas)
    first = int(np.argmin(cost))

    def objective(exponents: np.ndarray) -> float:
        return float(_project(axes, target, exponents[:1], exponents[1:])[0][0])

    found = minimize(
        objective,
        [alphas[first], betas[first]],
        method="Nelder-Mead",
        bounds=[(1e-3, 3.0)] * 2,
        options={"xatol": 1e-5, "fatol": 1e-12, "initial_simplex": _simplex(alphas[first], betas[first])},
    )
    _, linear = _project(axes, target, found.x[:1], found.x[1:])
    e, a, b = np.log(np.maximum(linear[0], 1e-9))
    return np.array([e, a, found.x[0], b, found.x[1]])


def _simplex(alpha: float, beta: float) -> np.ndarray:
    step = 0.5 * float(_GRID[1] - _GRID[0])
    return np.array([[alpha, beta], [alpha + step, beta], [alpha, beta + step]])


def _project(
    axes: _Axes, target: np.ndarray, alphas: np.ndarray, betas: np.ndarray, rounds: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of exponents the best E, A', B' >= 0, and the sum of Huber terms there.

    Iterated least squares: (prediction - loss) / loss is the residual in log loss to first order, and a run beyond
    DELTA has its square weighted down to its size. A negative constant is set to zero and the others solved again.
    """
    columns = np.stack(
        [
            np.ones((len(alphas), len(axes.n))),
            np.exp(-alphas[:, None] * axes.n),
            np.exp(-betas[:, None] * axes.d),
        ],
        axis=2,
    )
    loss = np.exp(target)
    weight = np.ones(columns.shape[:2])
    for _ in range(rounds):
        linear = _nonnegative(columns, loss, weight / loss**2)
        residual = np.log(np.maximum(np.einsum("rnk,rk->rn", columns, linear), 1e-9)) - target
        weight = DELTA / np.maximum(np.abs(residual), DELTA)
    return _huber(residual).sum(axis=1), linear


def _nonnegative(columns: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted least squares with three constants, none of them negative."""
    free = np.ones((len(columns), 3), bool)
    for _ in range(3):
        used = columns * free[:, None, :]
        normal = np.einsum("rnj,rn,rnk->rjk", used, weight, used)
        normal += np.einsum("rj,jk->rjk", ~free, np.eye(3)) + 1e-12 * np.trace(normal, axis1=1, axis2=2)[
            :, None, None
        ] * np.eye(3)
        right = np.einsum("rnj,rn,n->rj", used, weight, loss)
        linear = np.linalg.solve(normal, right[..., None])[..., 0]
        if (linear >= 0).all():
            break
        free &= linear > 0
    return np.maximum(linear, 0.0)


def _huber(residual: np.ndarray) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))


def _polish(axes: _Axes, rows: np.ndarray, targets: np.ndarray, rounds: int = 60) -> np.ndarray:
    """All constants at once by Levenberg and Marquardt from near the solution, for a stack of targets: (R, 5), (R, n)."""
    rows = np.broadcast_to(rows, (len(targets), 5)).copy()
    damping = np.full(len(rows), 1e-3)
    residual = axes.log_loss(rows) - targets
    cost = _huber(residual).sum(axis=1)
    for _ in range(rounds):
        weight = DELTA / np.maximum(np.abs(residual), DELTA)
        jacobian = axes.jacobian(rows)
        normal = np.einsum("rnj,rn,rnk->rjk", jacobian, weight, jacobian)
        gradient = np.einsum("rnj,rn,rn->rj", jacobian, weight, residual)
        scale = np.einsum("rjj->rj", normal) + 1e-15
        step = np.linalg.solve(normal + damping[:, None, None] * scale[:, :, None] * np.eye(5), -gradient[..., None])
        tried = rows + np.clip(step[..., 0], -1.0, 1.0)
        tried[:, (2, 4)] = np.clip(tried[:, (2, 4)], 1e-3, 3.0)
        tried_residual = axes.log_loss(tried) - targets
        tried_cost = _huber(tried_residual).sum(axis=1)
        better = tried_cost <= cost
        rows = np.where(better[:, None], tried, rows)
        residual = np.where(better[:, None], tried_residual, residual)
        cost = np.where(better, tried_cost, cost)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e6)
    return rows


def _corrected(residual: np.ndarray, leverage: np.ndarray) -> np.ndarray:
    """Residuals as large as the noise was: a fit follows each run by its leverage, and five constants are spent."""
    larger = residual / np.sqrt(np.maximum(1 - leverage, 0.05))
    larger = larger - larger.mean()
    return widened(larger, exact=float(np.sum(residual**2)), freedom=len(residual) - 5)


def _resampled(axes: _Axes, best: np.ndarray, spread: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Fits to the law's own losses with residuals drawn anew."""
    made = axes.log_loss(best[None])[0] + smooth_resample(spread, (draws, len(spread)), seed)
    return _polish(axes, best[None], made, rounds=40)


def _check(alpha: float, beta: float) -> None:
    for name, value, what in (("alpha", alpha, "size"), ("beta", beta, "tokens")):
        if not 2e-3 < value < 2.9:
            raise DataError(
                f"the runs do not say how loss falls with {what}: {name} comes out as {value:.3g}",
                hint=f"add runs that differ more in {what}",
            )
