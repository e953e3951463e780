"""From compute to accuracy on a task: in two stages, or in one, and which of both predicts held-out models better.

    two stages   nll(C) = p + q log10 C                                    normalised NLL of the correct answer
                 accuracy = floor + (top - floor) / (1 + exp(s (nll - m)))  Llama 3 paper, 3.2.1
    one stage    -log accuracy' = a / C^k                                   accuracy' is rescaled so that chance is 0

The first stage uses small models alone, whose accuracy is still chance but whose likelihoods already improve; the second
may use any model with both numbers (Meta took Llama 2's). The NLL is that of the correct option's text, per character, so that
options and tokenizers compare. The one-stage law needs accuracies above chance. Both are offered since neither is always
better: `compare` hides the largest models and shows which came nearer.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puna.config import require
from puna.errors import DataError, MissingExtra
from puna.scaling.accuracy import Accuracy
from puna.scaling.law import LEVEL, Estimate, far_warnings
from puna.scaling.resample import smooth_resample, widened

_LEAST = 4  # models for either law


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Models as columns. `flops` may be NaN for models that only help the second stage."""

    flops: np.ndarray
    nll: np.ndarray  # of the correct answer, per character, nats
    accuracy: np.ndarray  # share
    chance: float

    @classmethod
    def of(
        cls, flops: Sequence[float], nll: Sequence[float], accuracy: Sequence[float], *, chance: float = 0.25
    ) -> "Scored":
        """Models from columns. Raises `DataError` for values that cannot be."""
        c, n, a = (np.asarray(x, dtype=float) for x in (flops, nll, accuracy))
        if not c.shape == n.shape == a.shape:
            raise DataError(f"{len(c)} FLOPs, {len(n)} NLLs, {len(a)} accuracies", hint="give one of each for a model")
        if not (np.all(n > 0) and np.all((a >= 0) & (a <= 1))):
            raise DataError("an NLL is not above 0, or an accuracy is not a share", hint="accuracies are from 0 to 1")
        require(0 <= chance < 1, f"chance={chance} must lie in 0..1")
        return cls(flops=c, nll=n, accuracy=a, chance=chance)

    @classmethod
    def read(cls, path: Path | str, *, chance: float = 0.25) -> "Scored":
        """Models from a CSV with the columns flops, nll, accuracy; an empty `flops` marks a second-stage model."""
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            columns = [[float(r[n] or "nan") for r in rows] for n in ("flops", "nll", "accuracy")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}", hint="give a CSV file") from None
        except (KeyError, TypeError, ValueError) as error:
            hint = "the first line is flops,nll,accuracy and each other line three numbers"
            raise DataError(f"{path} is not a table of models: {error!r}", hint=hint) from None
        return cls.of(*columns, chance=chance)

    def where(self, mask: np.ndarray) -> "Scored":
        return Scored(flops=self.flops[mask], nll=self.nll[mask], accuracy=self.accuracy[mask], chance=self.chance)


@dataclass(frozen=True, kw_only=True)
class TwoStage:
    """Compute -> NLL of the correct answer -> accuracy."""

    intercept: float
    slope: float  # NLL per factor of ten of compute, negative
    draws: np.ndarray = field(repr=False)  # (R, 2)
    scatter: float  # of a model's NLL around the line
    second: Accuracy
    largest_flops: float
    chance: float
    name: str = "two stages"

    def nll(self, flops: float) -> Estimate:
        """The correct answer's NLL per character, with the interval of one model."""
        x = np.log10(flops)
        value = self.intercept + self.slope * x
        drawn = self.draws[:, 0] + self.draws[:, 1] * x
        drawn = drawn + self.scatter * np.random.default_rng(1).standard_normal(len(drawn))
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) else (value, value)
        return Estimate(float(value), float(low), float(high))

    def at(self, flops: float) -> Estimate:
        return self.second.at(self.nll(flops))

    def warnings(self, flops: float) -> tuple[str, ...]:
        return far_warnings(flops, self.largest_flops, self.name)


@dataclass(frozen=True, kw_only=True)
class OneStage:
    """Compute -> accuracy: a power law of the log of accuracy above chance."""

    scale: float  # log of a
    exponent: float
    draws: np.ndarray = field(repr=False)  # (R, 2)
    scatter: float  # of accuracy
    largest_flops: float
    chance: float
    name: str = "one stage"

    def at(self, flops: float) -> Estimate:
        value, drawn = (_one_stage(rows, flops, self.chance) for rows in (self._best(), self.draws))
        drawn = drawn + self.scatter * np.random.default_rng(1).standard_normal(len(drawn))
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) else (value[0], value[0])
        return Estimate(float(value[0]), max(0.0, float(low)), min(1.0, float(high)))

    def _best(self) -> np.ndarray:
        return np.array([[self.scale, self.exponent]])

    def warnings(self, flops: float) -> tuple[str, ...]:
        return far_warnings(flops, self.largest_flops, self.name)


def fit_two_stage(models: Scored, *, draws: int = 300, seed: int = 0) -> TwoStage:
    """Both stages. Raises `DataError` with fewer than four models for a stage, or likelihoods that do not improve."""
    known = np.isfinite(models.flops)
    if known.sum() < _LEAST:
        raise DataError(f"the first stage needs {_LEAST} models with FLOPs, not {int(known.sum())}")
    x, y = np.log10(models.flops[known]), models.nll[known]
    design = np.stack([np.ones_like(x), x], axis=1)
    solve = np.linalg.pinv(design)
    intercept, slope = solve @ y
    if slope >= 0:
        raise DataError(
            "the correct answer's NLL does not fall with compute: nothing can be predicted from it",
            hint="is it of the correct option, per character, and lower for better models?",
        )
    residual = y - design @ (intercept, slope)
    spread = widened(residual, exact=float(residual @ residual), freedom=len(x) - 2)
    made = design @ (intercept, slope) + smooth_resample(spread, (draws, len(x)), seed)
    return TwoStage(
        intercept=float(intercept), slope=float(slope), draws=(solve @ made.T).T,
        scatter=float(np.sqrt(residual @ residual / max(1, len(x) - 2))),
        second=fit_accuracy(models, draws=draws, seed=seed),
        largest_flops=float(models.flops[known].max()), chance=models.chance,
    )  # fmt: skip


def fit_accuracy(models: Scored, *, name: str = "task", draws: int = 300, seed: int = 0) -> Accuracy:
    """The second stage: a sigmoid of the NLL from chance to a top that is fitted."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingExtra("scipy", "scaling") from None
    if len(models.nll) < _LEAST:
        raise DataError(f"the second stage needs {_LEAST} models, not {len(models.nll)}")
    middle, width = float(np.median(models.nll)), float(np.ptp(models.nll)) + 1e-9
    chance = models.chance

    def curve(p: np.ndarray) -> np.ndarray:
        top, slope, mid = p
        return chance + (top - chance) / (1 + np.exp(np.clip(slope * (models.nll - mid), -60, 60)))

    def solve(target: np.ndarray, start: Sequence[float]) -> Any:
        bounds = ([chance + 0.02, 0.1 / width, middle - 5 * width], [1.0, 200 / width, middle + 5 * width])
        inside = np.clip(start, *(np.array(b) + s * 1e-6 for b, s in zip(bounds, (1, -1))))
        # A model at chance says little; the differences are of shares, which are about equally sure.
        return least_squares(lambda p: curve(p) - target, inside, bounds=bounds)

    starts = [[top, s / width, middle + m * width] for top in (0.95, 0.7) for s in (4, 12) for m in (-0.4, 0, 0.4)]
    best = min((solve(models.accuracy, s) for s in starts), key=lambda f: f.cost)
    residual = models.accuracy - curve(best.x)
    freedom = max(1, len(residual) - 3)
    spread = widened(residual, exact=float(residual @ residual), freedom=freedom)
    made = curve(best.x) + smooth_resample(spread, (min(draws, 100), len(residual)), seed)
    drawn = np.stack([solve(np.clip(m, 0, 1), best.x).x for m in made])
    top, slope, mid = best.x
    return Accuracy(
        name=name, source=f"sigmoid through {len(models.nll)} models", floor=chance, top=float(top),
        slope=float(slope), middle=float(mid),
        draws=np.column_stack([np.full(len(drawn), chance), drawn]),
        scatter=float(np.sqrt(residual @ residual / freedom)),
    )  # fmt: skip


def fit_one_stage(models: Scored, *, draws: int = 300, seed: int = 0) -> OneStage:
    """The direct law. Models at or below chance carry no information for it and are left out."""
    rescaled = (models.accuracy - models.chance) / (1 - models.chance)
    used = np.isfinite(models.flops) & (rescaled > 0.01) & (rescaled < 0.999)
    if used.sum() < _LEAST:
        raise DataError(
            f"the one-stage law needs {_LEAST} models with FLOPs and above chance, not {int(used.sum())}",
            hint="use the two-stage law, which reads likelihoods",
        )
    x, y = np.log(models.flops[used]), np.log(-np.log(rescaled[used]))
    design = np.stack([np.ones_like(x), -x], axis=1)
    # The error of log(-log p) is that of p over p |log p|: near chance and near one it says little.
    weight = rescaled[used] * np.abs(np.log(rescaled[used]))
    solve = np.linalg.pinv(design * weight[:, None]) * weight
    fitted = solve @ y
    residual = (y - design @ fitted) * weight
    spread = widened(residual, exact=float(residual @ residual), freedom=len(x) - 2)
    made = design @ fitted + smooth_resample(spread, (draws, len(x)), seed) / weight
    law = OneStage(
        scale=float(fitted[0]), exponent=float(fitted[1]), draws=(solve @ made.T).T, scatter=0.0,
        largest_flops=float(models.flops[used].max()), chance=models.chance,
    )  # fmt: skip
    errors = models.accuracy[used] - [law.at(c).value for c in models.flops[used]]
    scatter = float(np.sqrt(errors @ errors / max(1, len(x) - 2)))
    return OneStage(**{**law.__dict__, "scatter": scatter})


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Both laws on models that neither saw."""

    hidden: int
    errors: dict[str, float]  # law -> root mean square of the error in accuracy
    covered: dict[str, int]  # law -> hidden models inside its interval
    better: str


def compare(models: Scored, *, hidden: int = 2, seed: int = 0) -> Compared:
    """Fit both laws without the `hidden` largest models, and predict those."""
    order = np.argsort(np.where(np.isfinite(models.flops), models.flops, -np.inf))
    out = order[len(order) - hidden :]
    rest = np.setdiff1d(np.arange(len(order)), out)
    errors, covered = {}, {}
    for fit in (fit_two_stage, fit_one_stage):
        try:
            law = fit(models.where(rest), seed=seed)
        except DataError:
            continue
        told = [law.at(float(c)) for c in models.flops[out]]
        measured = models.accuracy[out]
        errors[law.name] = float(np.sqrt(np.mean([(t.value - m) ** 2 for t, m in zip(told, measured)])))
        covered[law.name] = sum(t.low <= m <= t.high for t, m in zip(told, measured))
    if not errors:
        raise DataError("neither law can be fitted without the largest models", hint="measure more models")
    return Compared(hidden=hidden, errors=errors, covered=covered, better=min(errors, key=errors.__getitem__))


def fit_better(models: Scored, *, hidden: int = 2, seed: int = 0) -> tuple[TwoStage | OneStage, Compared]:
    """The law that predicts the largest models better, fitted to all."""
    compared = compare(models, hidden=hidden, seed=seed)
    fit = fit_two_stage if compared.better == "two stages" else fit_one_stage
    return fit(models, seed=seed), compared


def _one_stage(rows: np.ndarray, flops: float, chance: float) -> np.ndarray:
    scale, exponent = rows.T
    return chance + (1 - chance) * np.exp(-np.exp(np.clip(scale - exponent * np.log(flops), -60, 60)))
