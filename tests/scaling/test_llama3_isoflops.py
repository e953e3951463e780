"""Llama 3's own scaling law, from its isoFLOP curves (paper, figure 2) to the 405B.

The figure's points are not in this repository: they are Meta's plot, and whoever digitised it owns their table. So there are
two tests. One takes points as a user gives them (`PUNA_LLAMA3_ISOFLOPS=points.csv`, with the columns parameters, tokens, loss
and budgets) and holds the fit to the published result. The other needs no points: it builds curves around the *published*
frontier and optimum, and so shows only that the machinery gives back what went in, at the paper's budgets and sizes.
"""

import os

import numpy as np
import pytest

from puna.scaling import isoflop
from puna.scaling.points import Points

BUDGETS = [6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21, 1e22]
FLAGSHIP = 3.8e25
POINTS = os.environ.get("PUNA_LLAMA3_ISOFLOPS")


@pytest.mark.skipif(not POINTS, reason="give the figure's points: PUNA_LLAMA3_ISOFLOPS=points.csv")
def test_the_points_of_the_figure_that_a_user_gives_lead_to_the_published_law():
    found = isoflop.fit(Points.read(POINTS))
    of_tokens = found.frontier.exponents()[1]
    assert of_tokens.value == pytest.approx(0.537, abs=0.01)
    assert of_tokens.low < 0.537 < of_tokens.high
    best = found.frontier.optimum(FLAGSHIP)
    assert 393e9 <= best.parameters.value <= 405e9
    assert best.parameters.low < 402e9 < best.parameters.high
    assert found.frontier.factor == pytest.approx(0.299, abs=0.01)


def test_curves_built_around_the_published_frontier_lead_back_to_it():
    """D* = 16.55T at 3.8e25 FLOPs and an exponent of 0.537 (the paper's text and figure), 402B there."""
    per_parameter = FLAGSHIP / (402e9 * 16.55e12)  # the paper's FLOPs are 5.7 per parameter and token, not 6
    rows = []
    random = np.random.default_rng(0)
    for flops in BUDGETS:
        best = 16.55e12 * (flops / FLAGSHIP) ** 0.537
        for share in np.geomspace(1 / 6, 6, 13):
            tokens = best * share
            loss = 0.8 * (flops / 1e20) ** -0.03 * (1 + 0.012 * np.log(share) ** 2)
            loss *= 1 + 0.0005 * random.standard_normal()
            rows.append((flops / per_parameter / tokens, tokens, loss, flops))
    n, d, y, c = map(np.array, zip(*rows))
    found = isoflop.fit(Points.of(n, d, y, flops=c, budgets=c))
    best = found.frontier.optimum(FLAGSHIP, per_parameter=per_parameter)
    assert found.frontier.exponent == pytest.approx(0.537, abs=0.01)
    assert 393e9 <= best.parameters.value <= 411e9
    assert best.parameters.low < 402e9 < best.parameters.high
    assert not best.warnings  # 3.6 orders of magnitude beyond the largest budget
