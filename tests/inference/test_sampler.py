import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.chat import Sampling
from puna.errors import ConfigError
from puna.inference import sampler
from puna.inference.sampler import Rows, draw, uniform

V = 1500
P = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], dtype=np.float32)


def shares(sampling: dict, logits: np.ndarray, draws: int = 4000) -> np.ndarray:
    """How often each token is drawn over many seeds."""
    settings = [Sampling(**sampling, seed=seed) for seed in range(draws)]
    rows = np.ascontiguousarray(np.broadcast_to(logits, (draws, len(logits))))
    tokens, _ = draw(rows, Rows.of(settings, len(logits)), [0] * draws)
    return np.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1.0}, P),
        ({"temperature": 0.5}, P**2),
        ({"temperature": 1.0, "top_k": 2}, P * np.array([1, 1, 0, 0, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.6}, P * np.array([1, 1, 0, 0, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.7}, P * np.array([1, 1, 1, 0, 0, 0])),
        ({"temperature": 1.0, "min_p": 0.3}, P * np.array([1, 1, 1, 0, 0, 0])),
        ({"temperature": 1.0, "min_p": 1.0}, P * np.array([1, 0, 0, 0, 0, 0])),
        # Of the top 3 (0.8 in all), 0.4 and 0.25 hold 81%.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, P * np.array([1, 1, 0, 0, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.95, "min_p": 0.5}, P * np.array([1, 1, 0, 0, 0, 0])),
        ({"temperature": 0.0}, P * np.array([1, 0, 0, 0, 0, 0])),
    ],
)
def test_tokens_are_drawn_as_often_as_the_cut_distribution_says(sampling, expected):
    order = [3, 0, 5, 1, 4, 2]  # likeliest first would hide a wrong index
    measured = shares(sampling, np.log(P)[order])
    expected = (expected / expected.sum())[order]
    assert (measured[expected == 0] == 0).all()
    assert abs(measured - expected).max() < 0.03


def test_a_flat_distribution_needs_more_candidates_than_a_few_and_gets_them():
    logits = np.zeros(2000, dtype=np.float32)
    drawn = shares({"temperature": 1.0, "top_p": 0.9}, logits, 6000)
    assert 1500 < (drawn > 0).sum() <= 1801


RANDOM = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 300, 1000]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(-5, 2**64),
)


@given(st.lists(RANDOM, min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_row_gets_the_same_token_alone_and_in_any_batch(samplings, seed):
    logits = np.random.default_rng(seed).standard_normal((len(samplings), V), dtype=np.float32) * (seed % 4)
    counts = list(range(len(samplings)))
    together, logprobs = draw(logits, Rows.of(samplings, V), counts)
    for i, sampling in enumerate(samplings):
        alone, logprob = draw(logits[i : i + 1], Rows.of([sampling], V), counts[i : i + 1])
        assert alone == together[i : i + 1]
        assert logprob[0] == pytest.approx(logprobs[i], abs=1e-5)


@given(st.lists(RANDOM, min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_logits_that_stay_on_a_device_give_the_same_tokens(samplings, seed):
    logits = np.random.default_rng(seed).standard_normal((len(samplings), V), dtype=np.float32) * (1 + seed % 4)
    rows, counts = Rows.of(samplings, V), [seed] * len(samplings)
    tokens, logprobs = draw(logits, rows, counts)
    same, close = draw(torch.from_numpy(logits), rows, counts)
    assert tokens == same and logprobs == pytest.approx(close, abs=1e-5)


def test_the_log_probability_is_the_models_own_whatever_the_sampling():
    tokens, logprobs = draw(np.log(P)[None], Rows.of([Sampling(temperature=0.2, top_k=2, seed=1)], len(P)), [0])
    assert logprobs[0] == pytest.approx(float(np.log(P[tokens[0]])), abs=1e-5)


def test_uniform_numbers_are_uniform_and_independent_between_seeds_and_counts():
    seeds, counts = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    u = uniform(seeds.ravel(), counts.ravel()).reshape(200, 200)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert len(np.unique(u)) == u.size
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2.0}, {"max_tokens": -1}]
)
def test_a_setting_out_of_range_is_an_error_that_shows_it(wrong):
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        sampler.check(Sampling(**wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": "5"}, {"temperature": None}, {"temperature": True}, {"top_k": 2.5}, {"seed": 1.5}, {"stop": "end"},
        {"ignore_end": "no"}, {"logit_bias": {5: 1.0}}, {"logit_bias": ((1.5, 1.0),)}, {"logit_bias": ((1, "a"),)},
        {"logit_bias": ((1, np.inf),)}, {"repetition_penalty": 1e300}, {"presence_penalty": -1e300}, {"logprobs": 2.5},
    ],
)  # fmt: skip
def test_a_setting_of_a_wrong_type_or_beyond_all_numbers_is_refused_with_what_is_accepted(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))) as caught:
        sampler.check(Sampling(**wrong))
    assert caught.value.hint


@pytest.mark.parametrize(
    "tiny", [{"temperature": 1e-38}, {"temperature": 5e-324}, {"top_p": 1e-46, "temperature": 1.0}]
)
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"min_p": 0.1}])
def test_the_smallest_temperature_or_top_p_takes_the_likeliest_token(tiny, more):
    logits = np.random.default_rng(3).standard_normal((4, V), dtype=np.float32) * 30
    settings = [Sampling(**tiny, **more, seed=seed) for seed in range(4)]
    assert draw(logits, Rows.of(settings, V), [0] * 4)[0] == logits.argmax(-1).tolist()
