"""Intervals cover the truth at their stated rate, 90%: over 200 draws of the noise for each fit.

The parametric fit and the envelope take minutes for that; by default they are held to it over fewer draws.
"""

import math
import os

import pytest
from scaling_surfaces import CHINCHILLA

from puna.scaling import displacement, envelope, isoflop, parametric
from puna.scaling.law import LEVEL

AT = 1e22


@pytest.fixture(autouse=True)
def no_warnings(monkeypatch):
    """They are fits of their own, ten times as long as the parabolas, and no interval depends on them."""
    monkeypatch.setattr(displacement, "warnings", lambda *_: [])


def outside(rate: float, draws: int) -> bool:
    """Whether a coverage is farther from the stated one than three standard errors of such a count."""
    return abs(rate - LEVEL) > 3 * math.sqrt(LEVEL * (1 - LEVEL) / draws)


def parametric_intervals(seed):
    law = parametric.fit(CHINCHILLA.points(noise=0.003, seed=seed), draws=100)
    return law.optimum(AT).parameters, law.exponent()


def isoflop_intervals(seed):
    frontier = isoflop.fit(CHINCHILLA.points(noise=0.003, seed=seed), draws=100).frontier
    return frontier.optimum(AT).parameters, frontier.exponents()[0]


def envelope_intervals(seed):
    frontier = envelope.fit(CHINCHILLA.curves(noise=0.003, seed=seed), draws=200).frontier
    return frontier.optimum(AT).parameters, frontier.exponents()[0]


def covered(intervals, draws):
    truths = (CHINCHILLA.best(AT), CHINCHILLA.exponent)
    hits = [[i.low <= t <= i.high for i, t in zip(intervals(seed), truths)] for seed in range(draws)]
    return [sum(column) / draws for column in zip(*hits)]


@pytest.mark.parametrize(
    ("intervals", "draws"),
    [(isoflop_intervals, 200), (parametric_intervals, 24), (envelope_intervals, 24)],
    ids=["isoflop", "parametric", "envelope"],
)
def test_intervals_cover_at_their_rate(intervals, draws):
    for rate in covered(intervals, draws):
        assert not outside(rate, draws), rate


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="minutes long: set PUNA_SLOW=1")
@pytest.mark.parametrize("intervals", [parametric_intervals, envelope_intervals], ids=["parametric", "envelope"])
def test_intervals_cover_at_their_rate_over_200_draws(intervals):
    for rate in covered(intervals, 200):
        assert not outside(rate, 200), rate
