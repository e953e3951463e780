"""Contamination: how much of an evaluation set lies in the training text (Llama 3 paper, section 5.1.4).

    ratio of an example = its tokens that lie in at least one 8-gram of tokens that the training text has too / its tokens
    contaminated        = ratio ≥ T

The paper chooses T per evaluation set as the value with the largest significant gain estimated from the scores: the
score on all examples minus the score on those below T (Singh et al. 2024). `gain` gives that curve. Post-training data
has a stricter rule there, no example equal to an evaluation prompt; `exact` counts those.

Memory is that of the evaluation sets, not of the training text: their 8-grams are hashed to 64 bits and sorted once, and
the training documents stream past. Two different 8-grams share a hash once in 10^19 pairs. An example of fewer than 8
tokens has no 8-gram; its ratio is 0, and `too_short` says how many there are, since for them the measure is blind.

    {"examples": 300, "too_short": 4, "exact": 0, "mean": {estimate}, "histogram": [281, 9, …],   ten bins of [0, 1]
     "above": {"0.3": {"passed": 10, "total": 300, "value": …, "low": …, "high": …}, …},
     "gain": {"threshold": 0.4, "gain": 0.02, "z": 2.3, "curve": [[threshold, gain, z, clean examples], …]}}
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.config import require
from puna.evaluation import intervals
from puna.evaluation.scores import plain, score
from puna.tokenizer import AnyTokenizer

_SPACE = re.compile(r"\s+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


@dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """How overlap is counted and which shares are shown."""

    n: int = 8  # tokens in a gram, as in the paper
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.8)
    min_clean: int = 30  # examples that must stay below a threshold for its gain to be estimated
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.n >= 1, f"n={self.n} is not a length")
        require(all(0 < t <= 1 for t in self.thresholds), "thresholds lie in (0, 1]")


def contamination_report(
    sets: Mapping[str, Sequence[str]],
    training: Iterable[str],
    tokenizer: AnyTokenizer,
    config: ContaminationConfig,
    outcomes: Mapping[str, Sequence[bool]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The contamination of each evaluation set by `training` texts, in one pass over them (see the module).

    With `outcomes` (which examples a model got right) of a set, the threshold is chosen by the estimated gain too.
    """
    found = overlap(sets, training, tokenizer, config.n)
    outcomes = outcomes or {}
    reports = {}
    for name, each in found.items():
        reports[name] = _summary(each, config)
        if name in outcomes:
            reports[name]["gain"] = gain(each.ratios, outcomes[name], config.min_clean)
    return reports


@dataclass(frozen=True)
class Overlap:
    """Per example of one evaluation set: the ratio, whether it was long enough to have one, and equality."""

    ratios: np.ndarray  # float64 in [0, 1]
    measurable: np.ndarray  # bool: at least one gram
    exact: np.ndarray  # bool: a training text equals it, but for case and white space


def overlap(
    sets: Mapping[str, Sequence[str]], training: Iterable[str], tokenizer: AnyTokenizer, n: int
) -> dict[str, Overlap]:
    """Which tokens of each set's examples lie in n-grams of the training texts."""
    hashes = {name: [gram_hashes(tokenizer.encode(t), n) for t in texts] for name, texts in sets.items()}
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *(h for each in hashes.values() for h in each)]))
    prompts = {_normal(text) for texts in sets.values() for text in texts}
    seen, equal = np.zeros(len(wanted), bool), set()
    for text in training:
        grams = gram_hashes(tokenizer.encode(text), n)
        if len(wanted):
            at = np.minimum(np.searchsorted(wanted, grams), len(wanted) - 1)
            seen[at[wanted[at] == grams]] = True
        normal = _normal(text)
        if normal in prompts:
            equal.add(normal)
    known = wanted[seen]
    result = {}
    for name, texts in sets.items():
        ratios = [_ratio(np.isin(grams, known, assume_unique=False), n) for grams in hashes[name]]
        measurable = [len(grams) > 0 for grams in hashes[name]]
        exact = [_normal(text) in equal for text in texts]
        result[name] = Overlap(np.array(ratios), np.array(measurable, bool), np.array(exact, bool))
    return result


def gram_hashes(tokens: Sequence[int], n: int) -> np.ndarray:
    """A 64-bit hash of each n-gram, `(max(0, T - n + 1),)` uint64; equal grams have equal hashes everywhere."""
    values = np.asarray(tokens, dtype=np.uint64)
    count = len(values) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    result = np.zeros(count, np.uint64)
    for i in range(n):  # arithmetic wraps modulo 2^64, as it should
        result = (result ^ values[i : i + count]) * _MULTIPLIER
        result ^= result >> np.uint64(29)
    return result


def _ratio(contaminated: np.ndarray, n: int) -> float:
    """The share of tokens covered by contaminated grams, gram `i` covering tokens `i … i+n-1`."""
    if not len(contaminated):
        return 0.0
    edges = np.zeros(len(contaminated) + n, np.int64)
    edges[: len(contaminated)] += contaminated
    edges[n:] -= contaminated
    return float((np.cumsum(edges)[:-1] > 0).mean())


def _normal(text: str) -> str:
    return _SPACE.sub(" ", text).strip().casefold()


def _summary(found: Overlap, config: ContaminationConfig) -> dict[str, Any]:
    above = {}
    for threshold in config.thresholds:
        share = score("above", found.ratios >= threshold).json()
        del share["outcomes"], share["chance"]
        above[f"{threshold:g}"] = share
    return {
        "examples": len(found.ratios),
        "too_short": int((~found.measurable).sum()),
        "exact": int(found.exact.sum()),
        "mean": plain(intervals.mean(found.ratios, seed=config.seed)),
        "histogram": np.histogram(found.ratios, bins=10, range=(0, 1))[0].tolist(),
        "above": above,
    }


def gain(ratios: Sequence[float], outcomes: Sequence[bool], min_clean: int = 30) -> dict[str, Any]:
    """The estimated performance gain from contamination for each threshold, and the threshold where it is largest.

    gain(T) = score(all) - score(ratio < T). Its z compares it with leaving out as many examples at random (variance of
    a mean drawn without replacement). Only gains with z > 1.96 can be chosen; with none, `threshold` is `null`:
    contamination, if any, is not seen to help.
    """
    ratios, right = np.asarray(ratios, float), np.asarray(outcomes, float)
    curve = []
    for threshold in np.round(np.arange(0.05, 1.001, 0.05), 2):
        clean = right[ratios < threshold]
        if not min_clean <= len(clean) < len(right):
            continue
        spread = np.sqrt(right.var(ddof=1) / len(clean) * (1 - len(clean) / len(right)))
        value = right.mean() - clean.mean()
        curve.append([float(threshold), float(value), float(value / spread) if spread else 0.0, len(clean)])
    significant = [point for point in curve if point[2] > 1.96]
    best = max(significant, key=lambda point: point[1], default=[None, None, None])
    return plain({"threshold": best[0], "gain": best[1], "z": best[2], "curve": curve})
