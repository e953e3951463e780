import numpy as np
import pytest
from scaling_surfaces import CHINCHILLA

from puna.errors import ConfigError
from puna.model.sizes import SIZES
from puna.scaling.family import counted, of_size, recipe_for
from puna.scaling.grid import GridConfig, budgets, centre, cost, lowest_size, missing_side, run_at, runs_at
from puna.scaling.points import Points

GRID = GridConfig(flops=3e14)


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-70b", "llama-3.1-405b", "llama-3.2-1b", "llama-3.2-3b"])
def test_the_rules_give_the_family_s_own_sizes_back(name):
    known = SIZES[name]
    found = of_size(counted(known).matrices, vocab_size=known.vocab_size, context=8192)
    assert counted(found).matrices == pytest.approx(counted(known).matrices, rel=0.05)
    assert found.dim == pytest.approx(known.dim, rel=0.15)
    assert found.n_layers == pytest.approx(known.n_layers, rel=0.25)
    assert found.n_kv_heads in (4, 6, 8)


def test_parameters_are_counted_three_ways():
    c = SIZES["llama-3-8b"]
    told = counted(c)
    assert told.all == c.parameters
    assert told.all - told.body == 2 * c.vocab_size * c.dim
    # FLOPs come from the matrices, the head among them, tied or not.
    assert c.train_flops_per_token(1) - 6 * told.matrices == pytest.approx(0, abs=6 * c.n_layers * c.dim)
    tied = SIZES["llama-3.2-1b"]
    assert counted(tied).matrices > counted(tied).body + tied.vocab_size * tied.dim - 3 * tied.n_layers * tied.dim


@pytest.mark.parametrize("size", np.geomspace(3e4, 3e11, 15))
def test_any_size_has_a_member(size):
    found = of_size(size, vocab_size=512 if size < 1e8 else 128_256, context=128)
    assert counted(found).matrices == pytest.approx(size, rel=0.5 if size < 1e5 or 1e8 < size < 5e8 else 0.2)


def test_all_runs_together_cost_what_was_allowed():
    runs = [r for b in budgets(GRID) for r in runs_at(GRID, b, 1e6)]
    runs.append(run_at(GRID, GRID.beyond * budgets(GRID)[-1], 1e6, predicted=True))
    assert len(runs) == GRID.budgets * GRID.sizes + 1
    assert cost(runs) == pytest.approx(GRID.flops, rel=1e-6)


def test_a_budget_s_runs_cost_the_same_and_differ_in_size():
    for budget in budgets(GRID):
        runs = runs_at(GRID, budget, 5e5)
        assert [r.flops for r in runs] == pytest.approx([budget] * len(runs))
        sizes = [counted(r.model).matrices for r in runs]
        assert len(set(sizes)) == GRID.sizes
        assert sizes[-1] / sizes[0] == pytest.approx(GRID.span, rel=0.25)


def test_later_budgets_are_centred_on_the_minima_of_earlier_ones():
    points = CHINCHILLA.points(budgets=np.array([1e18, 3e18]), width=20)
    assert centre(GRID, 1e19, points) == pytest.approx(CHINCHILLA.best(1e19), rel=0.15)
    assert centre(GRID, 1e19, None) == pytest.approx((1e19 / 240) ** 0.5)


def test_a_budget_that_is_lowest_at_its_edge_gets_a_run_there():
    inside = CHINCHILLA.points(budgets=np.array([1e19]), width=8)
    assert missing_side(GRID, inside) is None
    above = CHINCHILLA.points(budgets=np.array([1e19]), width=3, offset=20)
    assert missing_side(GRID, above) < above.parameters.min()
    below = CHINCHILLA.points(budgets=np.array([1e19]), width=3, offset=0.05)
    assert missing_side(GRID, below) > below.parameters.max()
    flat = Points.of([1e6, 2e6], [1e9, 5e8], [3.0, 3.0])
    assert lowest_size(flat) is None


def test_rate_and_batch_follow_the_size_and_the_length():
    small, large = (of_size(n, vocab_size=128_256, context=2048) for n in (4e8, 8e9))
    a, b = recipe_for(small, 1e10, 2048), recipe_for(large, 2e11, 2048)
    assert a.learning_rate > b.learning_rate
    assert a.batch_tokens < b.batch_tokens
    short = recipe_for(small, 1e7, 2048)
    assert short.steps >= 900 and short.batch_tokens < a.batch_tokens and short.learning_rate < a.learning_rate
    for r, tokens in ((a, 1e10), (b, 2e11), (short, 1e7)):
        assert r.steps * r.batch_tokens == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize("wrong", [{"sizes": 3}, {"budgets": 1}, {"factor": 1.0}, {"flops": 0}, {"beyond": 0.5}])
def test_a_grid_that_tells_nothing_is_refused(wrong):
    with pytest.raises(ConfigError):
        GridConfig(**wrong)
