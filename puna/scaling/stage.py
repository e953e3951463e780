"""The stage that turns runs into a fit: `law.json` to ask, `points.csv` to fit again, `fit.json` and `report.html` to read.

Runs are checkpoints of the training loop (their manifests have all that is needed) or a CSV of one's own. Runs at budgets
from `predict_above` on are kept out of the fit and predicted by it: what an honest fit is judged by.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from puna.artifacts import Artifact, stage, write_atomic
from puna.config import from_json, require
from puna.errors import DataError
from puna.model.sizes import LlamaConfig
from puna.scaling import envelope, extrapolation, isoflop, misfit
from puna.scaling.envelope import TrainingCurve
from puna.scaling.family import counted
from puna.scaling.law import Counts, Law
from puna.scaling.page import fit_page
from puna.scaling.points import Points, count_warnings

COLUMNS = ("parameters", "tokens", "flops", "loss", "budgets")
_SMOOTHED = 40  # points that a training curve is reduced to, even in log tokens


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How runs become a law."""

    name: str = "runs"
    counts: Counts = "matrices"  # what `parameters` counts
    predict_above: float = 0.0  # budgets (FLOPs) from here on are predicted, not fitted; 0: all are fitted
    targets: tuple[float, ...] = ()  # FLOPs for which the best size is told; none: 10 and 100 times the largest budget
    draws: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.counts in ("all", "matrices", "body"), f"counts={self.counts!r} is none of all, matrices, body")
        require(self.draws >= 20, f"draws={self.draws}: an interval needs at least 20")


@stage("fit")
def fit_scaling(config: FitConfig, runs: Sequence[Artifact] | Path, *, out: Path) -> dict[str, Any]:
    """Fit `runs`. Metrics: exponents, optima, errors on predicted runs. Raises `DataError` where they give no law."""
    curves: list[TrainingCurve] = []
    if isinstance(runs, Path):
        points = Points.read(runs, counts=config.counts)
    else:
        points = points_of(runs, config.counts)
        curves = [curve_of(run, config.counts) for run in runs]
    found, law = analysed(config, points, curves)
    write_atomic(out / "points.csv", as_csv(points))
    write_atomic(out / "law.json", json.dumps(law.to_json()))
    write_atomic(out / "fit.json", json.dumps(found, indent=1))
    write_atomic(out / "report.html", fit_page(found, law))
    return {k: found[k] for k in ("runs", "exponents", "optima", "errors", "warnings")}


def points_of(runs: Sequence[Artifact], counts: Counts) -> Points:
    """The runs' sizes, tokens, FLOPs (head and attention counted) and held-out losses."""
    rows = []
    for run in runs:
        model, length = _model(run), run.config["lm"]["sequence_length"]
        if "val_loss" not in run.metrics:
            hint = "give the run held-out text"
            raise DataError(f"{run.path} has no loss on held-out text, which a scaling law is of", hint=hint)
        tokens = float(run.metrics["tokens"])
        flops = tokens * model.train_flops_per_token(length)
        rows.append((getattr(counted(model), counts), tokens, run.metrics["val_loss"], flops))
    n, d, loss, flops = (list(c) for c in zip(*rows))
    return Points.of(n, d, loss, flops=flops, counts=counts)


def curve_of(run: Artifact, counts: Counts) -> TrainingCurve:
    """A run's training loss by tokens, averaged in steps that are even in the logarithm."""
    lines = [json.loads(line) for line in run.file("metrics.jsonl").read_bytes().splitlines()]
    tokens = np.cumsum([line["tokens"] for line in lines]).astype(float)
    loss = np.array([line["loss"] for line in lines])
    edges = np.unique(np.geomspace(max(1, len(loss) // 20), len(loss), _SMOOTHED).astype(int))
    pairs = [(tokens[a:b].mean(), loss[a:b].mean()) for a, b in pairwise(edges)]
    x, y = (np.array(c) for c in zip(*pairs)) if pairs else (tokens, loss)
    return TrainingCurve(parameters=float(getattr(counted(_model(run)), counts)), tokens=x, loss=y)


def analysed(config: FitConfig, points: Points, curves: Sequence[TrainingCurve] = ()) -> tuple[dict[str, Any], Law]:
    """All that the page and the command line tell of these runs, as plain JSON, and the law."""
    kept = np.ones(len(points), bool) if not config.predict_above else points.budgets < config.predict_above
    if not kept.any():
        hint = f"the budgets are {', '.join(f'{b:.3g}' for b in np.unique(points.budgets))}"
        raise DataError(
            f"no runs are left to be fitted: all are to be predicted, from {config.predict_above:.3g} FLOPs", hint=hint
        )
    fitted = points.where(kept)
    law = extrapolation.fit(fitted, name=config.name, draws=config.draws, seed=config.seed)
    warnings = [*count_warnings(fitted)]
    found: dict[str, Any] = {
        "name": config.name,
        "counts": config.counts,
        "runs": {"fitted": int(kept.sum()), "predicted": int((~kept).sum())},
        "points": [dict(zip((*COLUMNS, "fitted"), row)) for row in _rows(points, kept)],
        "law": {k: v for k, v in law.to_json().items() if k != "draws"},
        "exponents": {"parametric": law.exponent().to_json()},
        "optima": {},
        "errors": {"predicted": [], "by_size": []},
    }
    targets = config.targets or tuple(float(m * fitted.budgets.max()) for m in (10, 100))
    frontiers = _frontiers(config, fitted, curves, found, warnings)
    each = fitted.per_parameter()
    for flops in targets:
        answers = {"parametric": law.optimum(flops, per_parameter=each)}
        answers |= {name: f.optimum(flops, per_parameter=each) for name, f in frontiers.items()}
        found["optima"][f"{flops:.3g}"] = {name: _told(o) for name, o in answers.items()}
        warnings += [w for o in answers.values() for w in o.warnings] + _disagreement(flops, answers)
    warnings += misfit.warnings(fitted, law, max(targets))
    hidden = points.where(~kept)
    for n, d, loss in zip(hidden.parameters, hidden.tokens, hidden.loss):
        found["errors"]["predicted"].append(_error(extrapolation.Hidden(
            parameters=float(n), tokens=float(d), loss=float(loss), predicted=law.loss(float(n), float(d)))))  # fmt: skip
    found["errors"]["by_size"] = [_error(h) for h in extrapolation.by_size(fitted, law.drift)]
    found["warnings"] = list(dict.fromkeys(warnings))
    return found, law


def _frontiers(
    config: FitConfig, fitted: Points, curves: Sequence[TrainingCurve], found: dict[str, Any], warnings: list[str]
) -> dict[str, Any]:
    frontiers = {}
    try:
        flat = isoflop.fit(fitted, name=config.name, draws=config.draws, seed=config.seed)
        found["isoflop"] = {
            "curves": [{**asdict(c), "tokens": c.tokens.to_json()} for c in flat.curves],
            "frontier": _frontier(flat.frontier),
        }
        frontiers["isoflop"] = flat.frontier
        warnings += [f"isoFLOP: {w}" for w in flat.warnings]
    except DataError as error:
        warnings.append(f"isoFLOP: {error.message}")
    if curves:
        try:
            hull = envelope.fit(
                curves, name=config.name, counts=config.counts, per_parameter=fitted.per_parameter(),
                draws=config.draws, seed=config.seed,
            )  # fmt: skip
            found["envelope"] = {"frontier": _frontier(hull.frontier)}
            frontiers["envelope"] = hull.frontier
            warnings += [f"envelope: {w}" for w in hull.warnings]
        except DataError as error:
            warnings.append(f"envelope: {error.message}")
    for name, frontier in frontiers.items():
        found["exponents"][name] = frontier.exponents()[0].to_json()
    return frontiers


def _disagreement(flops: float, answers: Mapping[str, Any]) -> list[str]:
    """Methods whose intervals do not meet: at least one of their assumptions is wrong here, and no interval knows it."""
    said = []
    for name, optimum in answers.items():
        mine, law = optimum.parameters, answers["parametric"].parameters
        if mine.low > law.high or mine.high < law.low:
            said.append(
                f"at {flops:.3g} FLOPs {name} gives {mine.value:.3g} parameters and the parametric law {law.value:.3g}, beyond "
                "both intervals: the curves are no parabolas or the law has another form; add runs near the minima"
            )
    return said


def _frontier(frontier: Any) -> dict[str, Any]:
    return {k: v for k, v in frontier.to_json().items() if k != "draws"}


def _told(optimum: Any) -> dict[str, Any]:
    loss = optimum.loss.to_json() if optimum.loss else None
    return {"parameters": optimum.parameters.to_json(), "tokens": optimum.tokens.to_json(), "loss": loss}


def _error(hidden: extrapolation.Hidden) -> dict[str, Any]:
    return {
        "parameters": hidden.parameters,
        "tokens": hidden.tokens,
        "loss": hidden.loss,
        "predicted": hidden.predicted.to_json(),
        "error": hidden.error,
    }


def _rows(points: Points, kept: np.ndarray) -> list[tuple]:
    columns = (points.parameters, points.tokens, points.flops, points.loss, points.budgets)
    return [(*(float(v) for v in row), bool(k)) for *row, k in zip(*columns, kept)]


def as_csv(points: Points) -> str:
    """The points as `Points.read` takes them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(zip(*(getattr(points, name).tolist() for name in COLUMNS)))
    return text.getvalue()


def _model(run: Artifact) -> LlamaConfig:
    return from_json(LlamaConfig, run.config["model"])
