import numpy as np
import pytest

from puna.errors import DataError
from puna.scaling.downstream import Scored, compare, fit_better, fit_one_stage, fit_two_stage

FLOPS = np.geomspace(1e19, 1e23, 13)


def two_stage_world(noise, seed, flops=FLOPS):
    """NLL a line in log compute, accuracy a sigmoid of it."""
    random = np.random.default_rng(seed)
    nll = 1.9 - 0.25 * np.log10(flops / 1e18) + noise * random.standard_normal(len(flops))
    accuracy = 0.25 + 0.7 / (1 + np.exp(6 * (nll - 1.1)))
    return Scored.of(flops, nll, np.clip(accuracy + noise * random.standard_normal(len(flops)), 0, 1))


def one_stage_world(noise, seed, flops=FLOPS):
    random = np.random.default_rng(seed)
    above = np.exp(-2.2 / (flops / 1e20) ** 0.28)
    accuracy = np.clip(0.25 + 0.75 * above + noise * random.standard_normal(len(flops)), 0, 1)
    nll = 2.2 - 1.2 * (flops / 1e19) ** 0.07 + 0.08 * random.standard_normal(len(flops))  # a poor proxy
    return Scored.of(flops, np.maximum(nll, 0.05), accuracy)


def test_two_stages_find_the_truth_two_orders_of_magnitude_on():
    law = fit_two_stage(two_stage_world(0.003, 0))
    truth = two_stage_world(0.0, 0, np.array([1e25])).accuracy[0]
    told = law.at(1e25)
    assert told.value == pytest.approx(truth, abs=0.03)
    assert told.low < truth < told.high
    assert not law.warnings(1e25)
    assert law.warnings(1e28)


def test_models_without_flops_help_the_second_stage_alone():
    small = two_stage_world(0.003, 1, FLOPS[:6])  # all near chance
    large = two_stage_world(0.003, 2, np.geomspace(1e22, 1e25, 6))
    unknown = Scored.of([*small.flops, *[np.nan] * 6], [*small.nll, *large.nll], [*small.accuracy, *large.accuracy])
    truth = two_stage_world(0.0, 0, np.array([1e24])).accuracy[0]
    assert fit_two_stage(unknown).at(1e24).value == pytest.approx(truth, abs=0.06)


def test_one_stage_finds_its_truth():
    law = fit_one_stage(one_stage_world(0.004, 0))
    truth = one_stage_world(0.0, 0, np.array([1e25])).accuracy[0]
    told = law.at(1e25)
    assert told.value == pytest.approx(truth, abs=0.02)
    assert told.low <= truth <= told.high


@pytest.mark.parametrize(("world", "better"), [(two_stage_world, "two stages"), (one_stage_world, "one stage")])
def test_the_law_that_predicts_the_hidden_models_is_used(world, better):
    law, compared = fit_better(world(0.004, 3), hidden=3)
    assert set(compared.errors) == {"two stages", "one stage"}
    assert compared.better == better == law.name
    assert compared.errors[better] < 0.05


def test_hidden_models_are_not_seen():
    models = two_stage_world(0.003, 4)
    changed = models.accuracy.copy()
    changed[-2:] = 0.3  # would bend any curve that saw them
    lied = Scored.of(models.flops, models.nll, changed)
    assert compare(lied).errors["two stages"] > 0.3
    assert compare(models).errors["two stages"] < 0.05


def test_what_says_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not fall"):
        fit_two_stage(Scored.of(FLOPS, np.linspace(1, 2, 13), np.full(13, 0.3)))
    with pytest.raises(DataError, match="above chance"):
        fit_one_stage(Scored.of(FLOPS, np.linspace(2, 1, 13), np.full(13, 0.25)))
    (tmp_path / "m.csv").write_text("flops,nll,accuracy\n1e19,x,0.3\n")
    with pytest.raises(DataError, match="not a table"):
        Scored.read(tmp_path / "m.csv")
