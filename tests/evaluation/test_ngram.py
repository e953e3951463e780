from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluation import ngram

sequences = st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=6)


class Plain:
    """Modified Kneser-Ney as one would write it with dictionaries: the specification."""

    def __init__(self, documents, vocabulary, order):
        self.vocabulary, self.order, start = vocabulary, order, vocabulary
        counts = [Counter() for _ in range(order + 2)]
        for document in documents:
            symbols = [start, *document]
            for k in range(1, order + 1):
                for i in range(len(symbols) - k + 1):
                    counts[k][tuple(symbols[i : i + k])] += 1
        self.adjusted = {}
        for k in range(1, order + 1):
            left = Counter(gram[1:] for gram in counts[k + 1]) if k < order else None
            self.adjusted[k] = {
                gram: 0 if gram[-1] == start else (count if k == order or gram[0] == start else left[gram])
                for gram, count in counts[k].items()
            }

    def discount(self, k):
        n = Counter(self.adjusted[k].values())
        if not all(n[c] for c in (1, 2, 3, 4)):
            return [0, 0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        d = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        return d if all(0 <= d[i] <= i for i in range(4)) else [0, 0.5, 1.0, 1.5]

    def probability(self, history, symbol):
        p = 1 / self.vocabulary
        for k in range(1, self.order + 1):
            if k - 1 > len(history):
                break
            h = tuple(history[len(history) - (k - 1) :])
            following = {g[-1]: a for g, a in self.adjusted[k].items() if g[:-1] == h}
            total, d = sum(following.values()), self.discount(k)
            if total == 0:
                continue
            gamma = sum(d[min(a, 3)] for a in following.values()) / total
            a = following.get(symbol, 0)
            p = max(0, a - d[min(a, 3)]) / total + gamma * p
        return p


@settings(max_examples=60, deadline=None)
@given(sequences, st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 4))
def test_fast_model_equals_the_dictionary_model(documents, query, order):
    fast, plain = ngram.count(documents, 5, order).model(order), Plain(documents, 5, order)
    expected = [np.log2(plain.probability([5, *query[:i]], s)) for i, s in enumerate(query)]
    np.testing.assert_allclose(fast.log2(np.array(query)), expected, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(sequences, st.lists(st.integers(0, 4), max_size=6), st.booleans(), st.integers(1, 5))
def test_probabilities_sum_to_one_after_any_history(documents, history, started, order):
    model = ngram.count(documents, 5, order).model(order)
    last = [model.log2(np.array([*history, s]), started=started)[-1] for s in range(5)]
    assert np.exp2(last).sum() == pytest.approx(1, abs=1e-12)


def test_probabilities_sum_to_one_with_estimated_discounts():
    # Enough text that the discounts come from its counts of counts and not from the fallback.
    generator = np.random.default_rng(0)
    text = generator.choice(40, size=6000, p=generator.dirichlet(np.full(40, 0.3)))
    counts = ngram.count([text[:3000], text[3000:]], 40, 4)
    model = counts.model(4)
    for history in (text[100:103], [7, 7, 7], [39, 1], []):
        queries = [model.log2(np.array([*history, s]))[-1] for s in range(40)]
        assert np.exp2(queries).sum() == pytest.approx(1, abs=1e-12)


def test_a_lower_order_of_the_same_counts_is_the_model_counted_at_that_order():
    documents = [list(b"the herd is in the high grassland"), list(b"the grass is high and the herd is here")]
    query = np.frombuffer(b"the high herd", np.uint8)
    together, alone = ngram.count(documents, 256, 5), ngram.count(documents, 256, 3)
    np.testing.assert_array_equal(together.model(3).log2(query), alone.model(3).log2(query))


def test_longer_memory_helps_on_text_with_structure():
    words = ["herd ", "grass ", "hill ", "rain "]
    generator = np.random.default_rng(1)
    text = "".join(generator.choice(words, 4000)).encode()
    counts = ngram.count([np.frombuffer(text[:-500], np.uint8)], 256, 5)
    held_out = np.frombuffer(text[-500:], np.uint8)
    costs = [-counts.model(k).log2(held_out, started=False).mean() for k in range(1, 6)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.6  # two bits a word of five or six letters


def test_documents_do_not_run_into_each_other():
    model = ngram.count([[0, 1], [2, 3]] * 50, 4, 3).model(3)
    across = model.log2(np.array([0, 1, 2]))[-1]
    assert across < model.log2(np.array([2, 3]))[-1] - 1  # 1 was never followed by 2


@pytest.mark.parametrize("vocabulary", [128_000, 1 << 59])  # the second: keys too wide to be packed with a position
def test_large_vocabularies(vocabulary):
    high = vocabulary - 1
    documents, query = [[high, 5, high], [5, high]], [high, 5, 0]
    fast, plain = ngram.count(documents, vocabulary, 3).model(3), Plain(documents, vocabulary, 3)
    expected = [np.log2(plain.probability([vocabulary, *query[:i]], s)) for i, s in enumerate(query)]
    np.testing.assert_allclose(fast.log2(np.array(query)), expected, rtol=1e-9)


def test_no_text_at_all_is_the_uniform_model():
    model = ngram.count([], 16, 5).model(5)
    np.testing.assert_allclose(model.log2(np.array([3, 4])), [-4, -4])
