"""From small runs on mixtures of data to the weights of a large one.

Each run trains the same small model on another mixture and measures its loss on one or more held-out texts. Three kinds of
model learn loss from weights; the one that predicts runs it has not seen best is used, since which that is depends on the
sources and on how many runs there are:

    gp           a Gaussian process over the weights: smooth, with its own uncertainty
    log-linear   loss = c + k exp(t . w), one for each text (Ye et al. 2024, arXiv 2403.16952)
    trees        boosted regression trees (as RegMix, Liu et al. 2024, arXiv 2407.01492)

Every kind is judged by the same folds: fitted without a fold, asked for it. Recommended is the average of the best of many
mixtures that the winner would choose, since the very best one is the one whose prediction is most in error, and never one
far from all runs. The recommendation has a predicted loss and an interval; run it to know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from puna.config import require
from puna.errors import DataError, MissingExtra
from puna.scaling.law import Estimate

_LEAST = 8  # runs
_CANDIDATES = 20_000
_AVERAGED = 100  # of the best candidates
_HELD = 0.02  # pull on a slope towards none
_Z = 1.645


@dataclass(frozen=True, kw_only=True)
class Mixtures:
    """Runs on mixtures: weights (R, sources) that sum to one, and losses (R, texts)."""

    sources: tuple[str, ...]
    texts: tuple[str, ...]
    weights: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(
        cls, runs: Sequence[Mapping[str, float]], loss: Sequence[Mapping[str, float]] | Sequence[float]
    ) -> "Mixtures":
        """Runs from their weights by source, and a loss, or losses by text. Raises `DataError` for what cannot be."""
        if len(runs) != len(loss) or not runs:
            raise DataError(f"{len(runs)} mixtures and {len(loss)} losses", hint="give a loss for each mixture")
        sources = tuple(sorted({s for r in runs for s in r}))
        weights = np.array([[float(r.get(s, 0.0)) for s in sources] for r in runs])
        if (weights < 0).any() or (weights.sum(axis=1) <= 0).any():
            raise DataError("a mixture has a negative weight or none at all", hint="weights are shares of the text")
        named = [x if isinstance(x, Mapping) else {"loss": float(x)} for x in loss]
        texts = tuple(sorted(named[0]))
        if any(tuple(sorted(x)) != texts for x in named):
            raise DataError("the runs were not measured on the same texts", hint="give every run the same losses")
        table = np.array([[float(x[t]) for t in texts] for x in named])
        if not np.isfinite(table).all():
            raise DataError("a loss is not a number", hint="leave out runs that diverged")
        return cls(
            sources=sources, texts=texts, weights=weights / weights.sum(axis=1, keepdims=True), loss=table
        )  # fmt: skip

    def where(self, chosen: np.ndarray) -> "Mixtures":
        return Mixtures(sources=self.sources, texts=self.texts, weights=self.weights[chosen], loss=self.loss[chosen])


Predict = Callable[[np.ndarray], np.ndarray]  # weights (R, sources) -> losses (R,)


def gaussian_process(weights: np.ndarray, loss: np.ndarray) -> Predict:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
    except ImportError:
        raise MissingExtra("sklearn", "scaling") from None
    import warnings

    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * RBF(np.full(weights.shape[1], 0.5), (0.05, 20.0))
    kernel = kernel + WhiteKernel(1e-2, (1e-6, 1.0))
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound: that source does not matter
        model.fit(weights, loss)
    return model.predict


def log_linear(weights: np.ndarray, loss: np.ndarray) -> Predict:
    """loss = c + k exp(t . w) by least squares from several c; slopes are kept small where the runs do not say them."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingExtra("scipy", "scaling") from None
    middle = weights.mean(axis=0)
    centred = weights - middle
    spread = float(np.std(loss)) + 1e-9
    size = weights.shape[1]

    def rise(p: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.exp(np.clip(p[1] + (w - middle) @ p[2:], -30, 30))

    def misfit(p: np.ndarray) -> np.ndarray:
        return np.concatenate([(p[0] + rise(p, weights) - loss) / spread, _HELD * p[2:]])

    def slopes(p: np.ndarray) -> np.ndarray:
        up = rise(p, weights)[:, None]
        fit = np.concatenate([np.ones_like(up), up, up * centred], axis=1) / spread
        return np.concatenate([fit, np.concatenate([np.zeros((size, 2)), _HELD * np.eye(size)], axis=1)])

    found = []
    for share in (0.3, 0.8):
        floor = share * loss.min()
        logs = np.log(np.maximum(loss - floor, 1e-9))
        first, *_ = np.linalg.lstsq(
            np.concatenate([centred, _HELD * np.eye(size)]),
            np.concatenate([logs - logs.mean(), np.zeros(size)]),
            rcond=None,
        )
        found.append(least_squares(misfit, [floor, logs.mean(), *first], jac=slopes, max_nfev=100))
    best = min(found, key=lambda f: f.cost).x
    return lambda w: best[0] + rise(best, w)


def trees(weights: np.ndarray, loss: np.ndarray) -> Predict:
    try:
        from sklearn.ensemble import GradientBoostingRegressor
    except ImportError:
        raise MissingExtra("sklearn", "scaling") from None
    model = GradientBoostingRegressor(
        n_estimators=200, learning_rate=0.05, max_depth=2, subsample=0.8, min_samples_leaf=2, random_state=0
    )
    return model.fit(weights, loss).predict


KINDS: dict[str, Callable[[np.ndarray, np.ndarray], Predict]] = {
    "gp": gaussian_process,
    "log-linear": log_linear,
    "trees": trees,
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How a kind predicted runs it had not seen: error (nats) and how well it ordered them (Spearman)."""

    kind: str
    error: float
    order: float


@dataclass(frozen=True, kw_only=True)
class MixtureLaw:
    """The winner, fitted to all runs, one model for each text."""

    kind: str
    sources: tuple[str, ...]
    texts: tuple[str, ...]
    judged: tuple[Judged, ...]
    runs: Mixtures = field(repr=False)
    models: tuple[Predict, ...] = field(repr=False)
    importance: np.ndarray = field(repr=False)  # of the texts, summing to one

    def loss(self, weights: Mapping[str, float]) -> Estimate:
        """Predicted loss of a mixture, over the texts by their importance. Interval: the error on unseen runs."""
        unknown = sorted(set(weights) - set(self.sources))
        require(not unknown, f"no source {unknown[0] if unknown else ''!r}", hint=f"one of {', '.join(self.sources)}")
        row = np.array([[float(weights.get(s, 0.0)) for s in self.sources]])
        require(row.sum() > 0, "a mixture needs a weight above 0")
        value = float(self._predict(row / row.sum())[0])
        error = next(j.error for j in self.judged if j.kind == self.kind)
        return Estimate(value, value - _Z * error, value + _Z * error)

    def recommend(self, *, most: float = 1.0, seed: int = 0) -> tuple[dict[str, float], Estimate]:
        """The mixture to use, and what is expected of it. `most` bounds a source's share."""
        candidates = self._candidates(most, seed)
        best = np.argsort(self._predict(candidates))[:_AVERAGED]
        chosen = candidates[best].mean(axis=0)
        weights = {s: float(w) for s, w in zip(self.sources, chosen / chosen.sum())}
        return weights, self.loss(weights)

    def _predict(self, weights: np.ndarray) -> np.ndarray:
        return np.stack([m(weights) for m in self.models], axis=1) @ self.importance

    def _candidates(self, most: float, seed: int) -> np.ndarray:
        """Mixtures no farther from a run than runs are from each other."""
        random = np.random.default_rng(seed)
        size = len(self.sources)
        require(most * size >= 1, f"most={most} leaves no mixture of {size} sources")
        drawn = np.concatenate(
            [random.dirichlet(np.full(size, a), _CANDIDATES // 2) for a in (0.7, 2.0)] + [self.runs.weights]
        )
        drawn = drawn[drawn.max(axis=1) <= most + 1e-9]
        between = _nearest(self.runs.weights, self.runs.weights, itself=True)
        near = _nearest(drawn, self.runs.weights) <= between.max()
        return drawn[near]


def fit(runs: Mixtures, *, importance: Mapping[str, float] | None = None, folds: int = 5, seed: int = 0) -> MixtureLaw:
    """The kind that predicts unseen runs best, fitted to all. Raises `DataError` with too few runs."""
    if len(runs.weights) < _LEAST:
        raise DataError(
            f"a mixture law needs at least {_LEAST} runs, not {len(runs.weights)}", hint="run more mixtures"
        )
    share = np.array([float((importance or {}).get(t, 0.0 if importance else 1.0)) for t in runs.texts])
    require(share.sum() > 0, "no text has any importance", hint=f"texts are {', '.join(runs.texts)}")
    share = share / share.sum()
    judged = tuple(judge(kind, runs, share, folds, seed) for kind in KINDS)
    winner = min(judged, key=lambda j: j.error).kind
    models = tuple(KINDS[winner](runs.weights, runs.loss[:, i]) for i in range(len(runs.texts)))
    return MixtureLaw(
        kind=winner, sources=runs.sources, texts=runs.texts, judged=judged, runs=runs, models=models, importance=share
    )


def judge(kind: str, runs: Mixtures, importance: np.ndarray, folds: int, seed: int) -> Judged:
    """Each fold of the runs predicted by a model that was fitted to the others."""
    from scipy.stats import spearmanr

    order = np.random.default_rng(seed).permutation(len(runs.weights))
    told = np.empty(len(order))
    for fold in np.array_split(order, min(folds, len(order))):
        rest = np.setdiff1d(order, fold)
        columns = [
            KINDS[kind](runs.weights[rest], runs.loss[rest, i])(runs.weights[fold]) for i in range(len(runs.texts))
        ]
        told[fold] = np.stack(columns, axis=1) @ importance
    measured = runs.loss @ importance
    rank: Any = spearmanr(told, measured).statistic if np.ptp(told) > 0 else 0.0
    return Judged(kind=kind, error=float(np.sqrt(np.mean((told - measured) ** 2))), order=float(rank))


def spread_mixtures(sources: Sequence[str], runs: int, *, seed: int = 0, least: float = 0.0) -> list[dict[str, float]]:
    """Mixtures to run: spread over the simplex (each next one far from those before it), corners not favoured."""
    require(runs > 0 and len(sources) > 1, "mixtures need at least two sources and one run")
    random = np.random.default_rng(seed)
    pool = random.dirichlet(np.ones(len(sources)), 400)
    pool = least + (1 - least * len(sources)) * pool
    chosen = [np.full(len(sources), 1 / len(sources))]
    while len(chosen) < runs:
        chosen.append(pool[int(np.argmax(_nearest(pool, np.array(chosen))))])
    return [{s: round(float(w), 4) for s, w in zip(sources, row)} for row in chosen]


def _nearest(rows: np.ndarray, others: np.ndarray, itself: bool = False) -> np.ndarray:
    """Each row's distance to the nearest of `others` (not counting itself)."""
    gap = np.linalg.norm(rows[:, None] - others[None], axis=2)
    if itself:
        np.fill_diagonal(gap, np.inf)
    return gap.min(axis=1)
