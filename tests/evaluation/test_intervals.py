import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.evaluation import intervals


@given(st.integers(1, 500), st.data())
def test_wilson_lies_in_the_unit_interval_and_holds_the_share(total, data):
    passed = data.draw(st.integers(0, total))
    estimate = intervals.wilson(passed, total)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high > estimate.low  # never a point, unlike the normal interval


def test_wilson_matches_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for passed, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        estimate = intervals.wilson(passed, total)
        assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_wilson_covers_the_truth_about_95_times_in_100(share):
    total = 60
    weights = [math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]
    inside = [e.low <= share <= e.high for e in (intervals.wilson(k, total) for k in range(total + 1))]
    assert 0.92 < sum(w for w, i in zip(weights, inside) if i) < 0.98


def test_the_papers_interval_is_the_papers_formula():
    estimate = intervals.normal(80, 100)
    assert estimate.high - estimate.value == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 100))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 1), (9, 9), (12, 3), (0, 30)])
def test_mcnemar_equals_the_enumerated_coin(wins, losses):
    n = wins + losses
    uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses)) / 2**n
    assert intervals.mcnemar(wins, losses) == pytest.approx(uneven)


def test_mcnemar_survives_many_items():
    assert 0 <= intervals.mcnemar(6000, 3000) < 1e-100


def test_paired_counts_each_item_once_and_has_a_sign():
    first, second = [1, 1, 0, 0, 0, 1], [1, 0, 1, 1, 0, 1]
    result = intervals.paired(first, second)
    assert (result.wins, result.losses, result.ties) == (2, 1, 3)
    assert result.difference.value == pytest.approx(1 / 6)
    assert result == intervals.paired(first, second)
    with pytest.raises(ValueError, match="6 and 2"):
        intervals.paired(first, [1, 0])


def test_ratio_is_the_weighted_mean_and_its_interval_covers_the_truth():
    generator, hits = np.random.default_rng(1), 0
    for trial in range(100):
        sizes = generator.integers(100, 2000, 80)
        bits = sizes * generator.normal(2.0, 0.4, 80)
        estimate = intervals.ratio(bits, sizes, seed=trial)
        assert estimate.value == pytest.approx(bits.sum() / sizes.sum())
        hits += estimate.low <= 2.0 <= estimate.high
    assert 86 <= hits <= 100


def test_one_document_gives_no_certainty():
    estimate = intervals.ratio([100.0], [50.0])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, -math.inf, math.inf)


def test_relative_change_of_equal_costs_is_exactly_zero():
    bits = np.random.default_rng(0).uniform(100, 900, 50)
    same, worse = intervals.ratio_change(bits, bits), intervals.ratio_change(bits, 1.05 * bits)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert worse.low == pytest.approx(0.05) and worse.high == pytest.approx(0.05)


def test_auc_is_the_share_of_ordered_pairs():
    x, y = [0.1, 0.4, 0.4, 0.9], [0.0, 0.4, 0.2]
    pairs = [(a > b) + 0.5 * (a == b) for a, b in product(x, y)]
    assert intervals.auc(x, y).value == pytest.approx(sum(pairs) / len(pairs))


def test_auc_interval_covers_the_truth():
    # Two unit normals one standard deviation apart have an area of Φ(1/√2).
    truth, generator, hits = 0.5 * (1 + math.erf(0.5)), np.random.default_rng(2), 0
    for _ in range(200):
        estimate = intervals.auc(generator.normal(1, 1, 60), generator.normal(0, 1, 60))
        hits += estimate.low <= truth <= estimate.high
    assert 180 <= hits <= 199


def test_perfect_separation_is_not_taken_for_certainty():
    estimate = intervals.auc([2.0, 3.0, 4.0], [0.0, 1.0])
    assert estimate.value == 1.0 and estimate.high == 1.0 and estimate.low < 0.8
    many = intervals.auc(np.arange(100, 200), np.arange(100))
    assert many.low > 0.95


def test_reversed_scores_reverse_the_area():
    generator = np.random.default_rng(3)
    x, y = generator.normal(1, 1, 40), generator.normal(0, 1, 50)
    forward, back = intervals.auc(x, y), intervals.auc(-x, -y)
    assert forward.value + back.value == pytest.approx(1)
    assert forward.low + back.high == pytest.approx(1)
