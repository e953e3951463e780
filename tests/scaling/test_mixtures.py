import functools

import numpy as np
import pytest

from puna.errors import ConfigError, DataError
from puna.scaling.mixtures import Mixtures, fit, spread_mixtures

SOURCES = ("books", "code", "math", "web")


def exponential(w):
    return 2.2 + 0.9 * np.exp(w @ np.array([-1.5, 0.4, -0.6, 0.8]))


def steps(w):
    return 2.5 + 0.3 * (w[:, 0] < 0.3) + 0.2 * (w[:, 1] > 0.4)


def smooth(w):
    return 3 - 0.2 * np.log(0.05 + w[:, 0]) - 0.3 * np.sqrt(w[:, 1] + 0.02) - 0.1 * np.log(0.02 + w[:, 2])


@functools.cache
def runs_of(world, runs=30, noise=0.005):
    mixtures = spread_mixtures(SOURCES, runs, seed=1)
    weights = np.array([[m[s] for s in SOURCES] for m in mixtures])
    loss = world(weights) + noise * np.random.default_rng(0).standard_normal(runs)
    return Mixtures.of(mixtures, loss.tolist())


@functools.cache
def law_of(world):
    return fit(runs_of(world))


@pytest.mark.parametrize(("world", "kind"), [(exponential, "log-linear"), (steps, "trees"), (smooth, "gp")])
def test_the_kind_that_predicts_unseen_runs_is_used(world, kind):
    law = law_of(world)
    assert law.kind == kind
    assert law.kind == min(law.judged, key=lambda j: j.error).kind


def test_what_is_recommended_is_better_than_the_best_run_and_its_loss_is_foretold():
    runs = runs_of(exponential)
    law = law_of(exponential)
    weights, told = law.recommend()
    truth = exponential(np.array([[weights[s] for s in SOURCES]]))[0]
    assert truth < runs.loss.min()
    assert told.low < truth < told.high
    capped, _ = law.recommend(most=0.4)
    assert max(capped.values()) <= 0.4 + 1e-9


def test_texts_count_by_their_importance():
    mixtures = spread_mixtures(SOURCES[:3], 10, seed=2)
    losses = [{"prose": 3 - m["books"], "programs": 3 - m["code"]} for m in mixtures]
    runs = Mixtures.of(mixtures, losses)
    prose, _ = fit(runs, importance={"prose": 1.0}).recommend()
    programs, _ = fit(runs, importance={"programs": 1.0}).recommend()
    assert prose["books"] > 0.5 > prose["code"]
    assert programs["code"] > 0.5 > programs["books"]


def test_mixtures_to_run_are_spread():
    chosen = np.array([[m[s] for s in SOURCES] for m in spread_mixtures(SOURCES, 16)])
    assert chosen.sum(axis=1) == pytest.approx(np.ones(16), abs=1e-3)
    gaps = np.linalg.norm(chosen[:, None] - chosen[None], axis=2) + 9 * np.eye(16)
    random = np.random.default_rng(0).dirichlet(np.ones(4), 16)
    random_gaps = np.linalg.norm(random[:, None] - random[None], axis=2) + 9 * np.eye(16)
    assert gaps.min() > 2 * random_gaps.min()


def test_what_is_no_table_of_mixtures_is_refused():
    with pytest.raises(DataError, match="at least 8"):
        fit(runs_of(exponential, runs=5))
    with pytest.raises(DataError, match="negative"):
        Mixtures.of([{"a": -1.0, "b": 2.0}], [1.0])
    with pytest.raises(DataError, match="same texts"):
        Mixtures.of([{"a": 1.0}, {"a": 1.0}], [{"x": 1.0}, {"y": 1.0}])
    with pytest.raises(ConfigError, match="no source 'wiki'"):
        law_of(exponential).loss({"wiki": 1.0})
