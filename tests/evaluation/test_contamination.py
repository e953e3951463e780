import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluation.contamination import ContaminationConfig, contamination_report, gain, overlap

letters = st.text(alphabet="xyz", max_size=40)


@settings(max_examples=80, deadline=None)
@given(st.lists(letters, min_size=1, max_size=4), st.lists(letters, max_size=4))
def test_ratio_equals_the_definition(tokenizer, texts, training):
    n = 3
    known = {t[i : i + n] for t in training for i in range(len(t) - n + 1)}
    expected = []
    for text in texts:
        covered = {j for i in range(len(text) - n + 1) if text[i : i + n] in known for j in range(i, i + n)}
        expected.append(len(covered) / len(text) if text else 0.0)
    np.testing.assert_allclose(overlap({"set": texts}, training, tokenizer, n)["set"].ratios, expected)


def test_copied_and_new_examples_are_told_apart(tokenizer):
    draw = random.Random(0)
    training = ["".join(draw.choices("abcdefghij ", k=400)) for _ in range(50)]
    copied = [t[100:200] for t in training[:10]]
    new = ["".join(draw.choices("klmnopqrst ", k=100)) for _ in range(30)]
    report = contamination_report({"mixed": [*copied, *new]}, training, tokenizer, ContaminationConfig())["mixed"]
    assert report["above"]["0.8"]["passed"] == 10
    assert report["histogram"][0] == 30 and sum(report["histogram"]) == report["examples"] == 40
    assert report["above"]["0.8"]["low"] < 0.25 < report["above"]["0.8"]["high"]
    assert "gain" not in report


def test_short_examples_are_counted_as_not_measurable_and_equal_ones_as_exact(tokenizer):
    training = ["Who eats the grass?", "abc"]
    report = contamination_report(
        {"q": ["abc", "who  eats the\tgrass?", "something else altogether"]}, training, tokenizer, ContaminationConfig()
    )["q"]
    assert (report["too_short"], report["exact"]) == (1, 2)


def test_every_set_is_measured_in_one_pass(tokenizer):
    training = iter(["the herd is in the high grassland"])
    report = overlap({"a": ["the herd is in the high"], "b": ["nothing of the sort here"]}, training, tokenizer, 8)
    assert report["a"].ratios[0] == 1.0 and report["b"].ratios[0] == 0.0


def test_the_threshold_is_where_the_significant_gain_is_largest():
    # Half of the examples were seen, and only those are answered well.
    ratios = [0.0] * 100 + [0.7] * 100
    outcomes = [i % 10 < 3 for i in range(100)] + [i % 10 < 9 for i in range(100)]
    result = gain(ratios, outcomes)
    assert result["threshold"] == pytest.approx(0.05)
    assert result["gain"] == pytest.approx(0.6 - 0.3) and result["z"] > 5


def test_without_a_significant_gain_there_is_no_threshold():
    ratios = list(np.linspace(0, 1, 200))
    assert gain(ratios, [i % 2 == 0 for i in range(200)])["threshold"] is None
    assert gain([0.0] * 50, [True] * 50) == {"threshold": None, "gain": None, "z": None, "curve": []}
