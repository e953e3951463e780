"""Runs that lie on no one surface are noticed; runs that do are not accused."""

import numpy as np
import pytest
from scaling_surfaces import CHINCHILLA, LOPSIDED

from puna.scaling import misfit, parametric
from puna.scaling.points import Points
from puna.scaling.stage import FitConfig, analysed

FAR = 1e23


def stepped(points, size: float, seed: int = 0):
    """The same runs with each budget a little above or below its neighbours."""
    budgets = np.unique(points.budgets)
    steps = dict(zip(budgets, size * np.random.default_rng(seed).standard_normal(len(budgets)), strict=True))
    return points.with_loss(points.loss * np.exp([steps[b] for b in points.budgets]))


@pytest.mark.parametrize("truth", [CHINCHILLA, LOPSIDED], ids=["chinchilla", "lopsided"])
@pytest.mark.parametrize("noise", [0.0005, 0.003])
def test_runs_on_a_surface_are_not_accused(truth, noise):
    for seed in range(3):
        points = truth.points(noise=noise, seed=seed, width=6)
        assert not misfit.warnings(points, parametric.fit(points, draws=0), FAR), seed


def test_budgets_that_lie_off_each_other_are_noticed():
    points = stepped(CHINCHILLA.points(noise=0.0005, width=6), 0.005)
    (said,) = misfit.warnings(points, parametric.fit(points, draws=0), FAR)
    assert "do not lie on one surface" in said


def test_curves_that_do_not_flatten_are_told_with_what_they_do_to_the_law():
    """As the Llama 3 paper's: the law must flatten them where loss falls, and moves its optimum to make up for it."""
    rows = []
    for flops in np.geomspace(6e18, 1e22, 8):
        best = 1e10 * (flops / 1e20) ** 0.537
        share = np.geomspace(1 / 5, 5, 9)
        loss = 0.8 * (flops / 1e20) ** -0.03 * (1 + 0.016 * np.log(share) ** 2)
        rows += [(flops / 6 / best / s, best * s, y, flops) for s, y in zip(share, loss, strict=True)]
    n, d, y, c = map(np.array, zip(*rows, strict=True))
    points = Points.of(n, d, y * np.exp(0.0005 * np.random.default_rng(0).standard_normal(len(y))), budgets=c)
    law = parametric.fit(points, draws=0)
    (said,) = misfit.warnings(points, law, FAR)
    assert misfit.bends(law, points.where(points.budgets == c.max())) > 1.5
    assert f"{law.optimum(FAR).parameters.value:.3g}" in said and f"{misfit.with_levels(points, FAR):.3g}" in said
    found, _ = analysed(FitConfig(counts="all", targets=(FAR,), draws=20, seed=0), points)
    assert said in found["warnings"]


def test_a_level_for_each_budget_finds_the_optimum_of_a_surface():
    plain = stepped(CHINCHILLA.points(width=6, sizes=9), 0.005)
    assert misfit.with_levels(plain, FAR) == pytest.approx(CHINCHILLA.best(FAR), rel=0.02)
