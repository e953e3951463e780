"""The nouns of a result: what passed out of how many, beside what chance would give, and what changed between two.

Verified tasks live elsewhere (they know the world that was invented); they hand lists of booleans over and get these
forms back. As JSON, and as the report reads them:

    task        {"passed": 231, "total": 300, "value": 0.77, "low": 0.72, "high": 0.81, "chance": 0.0,
                 "outcomes": "1101…"}                              one character per item, in the task's fixed order
    comparison  {"wins": 60, "losses": 12, "ties": 228, "p_value": 1e-8,
                 "difference": {"value": 0.16, "low": 0.11, "high": 0.21, "n": 300}}
    refusal     {"known_answered": task, "known_refused": task, "unknown_refused": task,
                 "auc": {"value": 0.61, "low": …, "high": …, "n": …}, "curve": [[known_refused, unknown_refused], …]}

The outcomes make any two checkpoints comparable item by item (McNemar), which separates far more than two intervals do.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.evaluation import intervals
from puna.evaluation.intervals import Estimate, Paired

_CURVE_POINTS = 41


@dataclass(frozen=True, kw_only=True)
class Score:
    """A task's result: a share with Wilson's 95% interval. `chance` is what guessing would get."""

    name: str
    passed: int
    total: int
    value: float
    low: float
    high: float
    chance: float = 0.0
    outcomes: str = ""

    def json(self) -> dict[str, Any]:
        """The form above, without the name (it is the key)."""
        return {k: v for k, v in plain(self).items() if k != "name"}


def score(name: str, outcomes: Sequence[bool], *, chance: float = 0.0) -> Score:
    """The score of a task from its outcomes, one per item."""
    passed = sum(map(bool, outcomes))
    share = intervals.wilson(passed, len(outcomes))
    return Score(
        name=name,
        passed=passed,
        total=len(outcomes),
        value=share.value,
        low=share.low,
        high=share.high,
        chance=chance,
        outcomes="".join("1" if o else "0" for o in outcomes),
    )


def tasks(outcomes: dict[str, Sequence[bool]], chance: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """The JSON of several tasks by name, plus `all` over every item of all of them (each item counts once)."""
    chance = chance or {}
    together = [o for each in outcomes.values() for o in each]
    expected = sum(chance.get(name, 0.0) * len(each) for name, each in outcomes.items()) / max(1, len(together))
    scores = [score(name, each, chance=chance.get(name, 0.0)) for name, each in outcomes.items()]
    return {s.name: s.json() for s in [*scores, score("all", together, chance=expected)]}


def parse_outcomes(text: str) -> list[bool]:
    """The outcomes that `Score.outcomes` spells."""
    return [c == "1" for c in text]


def compare(before: Score | dict[str, Any], after: Score | dict[str, Any], *, seed: int = 0) -> Paired:
    """Two systems on one task, item by item. Raises `ValueError` if they were not measured on equally many items."""
    first, second = (s.outcomes if isinstance(s, Score) else s["outcomes"] for s in (before, after))
    return intervals.paired(parse_outcomes(first), parse_outcomes(second), seed=seed)


def refusal(
    known_correct: Sequence[bool],
    known_refused: Sequence[bool],
    unknown_refused: Sequence[bool],
    known_scores: Sequence[float] = (),
    unknown_scores: Sequence[float] = (),
) -> dict[str, Any]:
    """How well "I don't know" is said where it is true and only there.

    `known_*` are questions on facts of the training text, `unknown_*` on names it never had. The scores (any number
    that is higher the readier the model is to refuse, such as the log-likelihood of a refusal) give the area under the
    ROC curve, which no operating point can flatter; refusing everything, or at random, has an area of 0.5.
    """
    report = {
        "known_answered": score("known_answered", known_correct).json(),
        "known_refused": score("known_refused", known_refused).json(),
        "unknown_refused": score("unknown_refused", unknown_refused).json(),
    }
    if len(known_scores) and len(unknown_scores):
        report["auc"] = plain(intervals.auc(unknown_scores, known_scores))
        report["curve"] = _curve(np.asarray(known_scores, float), np.asarray(unknown_scores, float))
    return report


def _curve(known: np.ndarray, unknown: np.ndarray) -> list[list[float]]:
    """The ROC curve as (known refused, unknown refused) at up to 41 thresholds between nothing and everything."""
    thresholds = np.quantile(np.concatenate([known, unknown]), np.linspace(1, 0, _CURVE_POINTS))
    points = [(0.0, 0.0), *((float((known >= t).mean()), float((unknown >= t).mean())) for t in thresholds)]
    return [[round(x, 4), round(y, 4)] for x, y in dict.fromkeys([*points, (1.0, 1.0)])]


def plain(value: Estimate | Paired | Score | Any) -> Any:
    """A result as JSON: dataclasses as dicts, floats to six significant digits, infinities and NaN as `null`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
