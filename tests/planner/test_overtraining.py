"""What Meta's 15T tokens for 8B cost and bought, by a public law."""

import pytest
from foresight import Known

from puna.model.sizes import SIZES
from puna.planner.overtraining import overtraining

SMALL = SIZES["llama-3.1-8b"]
KNOWN = Known()


@pytest.fixture(scope="module")
def metas():
    return overtraining(SMALL, 15e12, KNOWN, 8192)


def test_about_200b_tokens_would_have_been_compute_optimal(metas):
    """20 tokens for each parameter are 160B; Meta's announcement says about 200B (both are `about`)."""
    assert 130e9 < metas.optimal_tokens < 220e9
    assert metas.ratio == pytest.approx(15e12 / metas.optimal_tokens)


def test_it_cost_so_many_times_the_computing_and_lowered_the_loss(metas):
    assert metas.flops / metas.optimal_flops == pytest.approx(metas.ratio)
    assert 0.05 < metas.optimal_loss[0] - metas.loss[0] < 0.3


def test_the_same_loss_otherwise_is_larger_and_cheaper_to_train(metas):
    assert metas.equal.parameters > 2 * SMALL.parameters
    assert metas.equal_flops < metas.flops
    reached = KNOWN.loss(metas.equal, metas.equal_tokens)[0]
    assert reached == pytest.approx(metas.loss[0], rel=2e-3)


def test_it_pays_from_the_tokens_where_both_cost_the_same(metas):
    served = metas.pays_from
    small = metas.flops + 2 * SMALL.parameters * served
    large = metas.equal_flops + 2 * metas.equal.parameters * served
    assert small == pytest.approx(large)


def test_at_the_optimum_there_is_nothing_to_tell():
    found = overtraining(SMALL, KNOWN.optimal_tokens(SMALL), KNOWN, 8192)
    assert found.ratio == pytest.approx(1)
    assert found.equal is None
