"""How sure a measured number is: every result of an evaluation carries a 95% interval.

    a share of N items        Wilson's score interval; also the normal one that the Llama 3 paper prints (section 5.1.1),
                              S ± 1.96·sqrt(S(1-S)/N), which collapses to a point at 0% and 100%
    two systems, same items   McNemar's exact test on the items where they differ, and a bootstrap of the difference
    a mean, a ratio of sums   bootstrap over documents: the document is what was sampled, its tokens are not independent
    area under the ROC curve  DeLong's variance; where it vanishes (perfect separation), Newcombe's score interval

Every bootstrap is seeded, so a report made twice is the same report.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # standard normal quantile that leaves 2.5% on each side
RESAMPLES = 2000
_BATCH = 1 << 21  # indices drawn at a time, which bounds the bootstrap's memory


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95% interval, from `n` observations (items, documents)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two systems on the same items: `wins` only the second got right, `losses` only the first, `ties` neither or both.

    `difference` is second minus first, as a share of the items; `p_value` is McNemar's exact two-sided one.
    """

    wins: int
    losses: int
    ties: int
    difference: Estimate
    p_value: float


def wilson(passed: int, total: int) -> Estimate:
    """The share `passed/total` with Wilson's score interval, good near 0 and 1 and for few items (Wilson 1927)."""
    if total == 0:
        return Estimate(value=math.nan, low=0.0, high=1.0, n=0)
    share, z2 = passed / total, Z * Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # At the ends the bound is the end itself; rounding would put it a hair inside.
    low = 0.0 if passed == 0 else max(0.0, centre - half)
    high = 1.0 if passed == total else min(1.0, centre + half)
    return Estimate(value=share, low=low, high=high, n=total)


def normal(passed: int, total: int) -> Estimate:
    """The share with the Llama 3 paper's interval S ± 1.96·sqrt(S(1-S)/N), to compare with published tables."""
    if total == 0:
        return Estimate(value=math.nan, low=0.0, high=1.0, n=0)
    share = passed / total
    half = 1.96 * math.sqrt(share * (1 - share) / total)
    return Estimate(value=share, low=max(0.0, share - half), high=min(1.0, share + half), n=total)


def paired(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> Paired:
    """Compare two systems by their outcomes on the same items, in the same order. Raises `ValueError` if lengths differ."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"paired outcomes must have one length, these have {len(a)} and {len(b)}")
    wins, losses = int((b & ~a).sum()), int((a & ~b).sum())
    return Paired(
        wins=wins,
        losses=losses,
        ties=len(a) - wins - losses,
        difference=mean(b.astype(float) - a.astype(float), seed=seed),
        p_value=mcnemar(wins, losses),
    )


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value: how often a fair coin gives a split at least as uneven (McNemar 1947)."""
    n, few = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    tail = np.logaddexp.reduce([_log_binomial(n, k) for k in range(few + 1)]) - n * math.log(2)
    return min(1.0, 2 * math.exp(tail))


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def mean(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of independent values, with a percentile bootstrap interval."""
    values = np.asarray(values, dtype=float)
    return ratio(values, np.ones_like(values), seed=seed)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Estimate:
    """Sum over sum (bits over bytes), with a percentile bootstrap over the pairs, one pair per document.

    One document has no spread to resample: its interval is then the whole line, not a point.
    """
    numerators, denominators = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    n = len(numerators)
    if n == 0:
        return Estimate(value=math.nan, low=-math.inf, high=math.inf, n=0)
    value = float(numerators.sum() / denominators.sum())
    if n == 1:
        return Estimate(value=value, low=-math.inf, high=math.inf, n=1)
    low, high = np.quantile(_resampled_ratios(numerators, denominators, seed), [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high), n=n)


def ratio_change(before: Sequence[float], after: Sequence[float], *, seed: int = 0) -> Estimate:
    """The relative change of a sum, after/before - 1, the same documents in both (paired bootstrap over documents).

    With bits of the full-precision model as `before` and of its quantised form as `after` it is the quantisation loss.
    """
    change = ratio(after, before, seed=seed)
    return Estimate(value=change.value - 1, low=change.low - 1, high=change.high - 1, n=change.n)


def _resampled_ratios(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> np.ndarray:
    n, generator = len(numerators), np.random.default_rng(seed)
    at_once = max(1, _BATCH // n)
    ratios = []
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(0, n, size=(min(at_once, RESAMPLES - start), n))
        ratios.append(numerators[drawn].sum(1) / denominators[drawn].sum(1))
    return np.concatenate(ratios)


def auc(positives: Sequence[float], negatives: Sequence[float]) -> Estimate:
    """The probability that a positive scores above a negative (ties count half), with DeLong's interval.

    DeLong, DeLong and Clarke-Pearson 1988. Its variance is zero at perfect separation; there, and with a single
    observation on a side, the interval is Newcombe's (2006, method 5), which never collapses.
    """
    x, y = np.asarray(positives, dtype=float), np.asarray(negatives, dtype=float)
    m, n = len(x), len(y)
    if m == 0 or n == 0:
        return Estimate(value=math.nan, low=0.0, high=1.0, n=m + n)
    above_negatives = _share_below(x, np.sort(y))  # V10: per positive, the share of negatives below it
    below_positives = 1 - _share_below(y, np.sort(x))  # V01: per negative, the share of positives above it
    value = float(above_negatives.mean())
    spread = 0.0
    if min(m, n) > 1:
        spread = math.sqrt(above_negatives.var(ddof=1) / m + below_positives.var(ddof=1) / n)
    if spread == 0.0:
        return _newcombe(value, m, n)
    return Estimate(value=value, low=max(0.0, value - Z * spread), high=min(1.0, value + Z * spread), n=m + n)


def _share_below(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    below, up_to = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (below + up_to) / (2 * len(ordered))


def _newcombe(value: float, m: int, n: int) -> Estimate:
    """All θ that are within Z standard errors of `value`, the error taken at θ (as Wilson's interval does)."""
    theta = np.linspace(0, 1, 100_001)
    extra = (m + n) / 2 - 1
    variance = theta * (1 - theta) / (m * n) * (1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
    inside = theta[np.abs(theta - value) <= Z * np.sqrt(variance) + 1e-12]
    return Estimate(value=value, low=float(inside.min()), high=float(inside.max()), n=m + n)
