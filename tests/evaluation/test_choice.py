import math

import pytest

from puna.chat import user
from puna.evaluation.choice import Item, choice_report


class Likelihoods:
    """Scores each option by a table."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def score(self, continuations):
        self.asked += continuations
        return [self.table[c.text] for c in continuations]


def test_length_normalisation_can_change_the_answer():
    model = Likelihoods({"no": -3.0, "certainly not": -6.0})
    items = [Item(context="Is it?", options=("no", "certainly not"), answer=1)]
    report = choice_report(model, "q", items)
    assert (report["raw"]["passed"], report["per_byte"]["passed"]) == (0, 1)


def test_a_model_without_an_opinion_gets_nothing_and_chance_says_what_guessing_would_get():
    model = Likelihoods(dict.fromkeys("abcd", -1.0))
    items = [Item(options=tuple("abcd"), answer=0), Item(options=("a", "b"), answer=0)]
    report = choice_report(model, "q", items)
    assert report["raw"]["passed"] == 0
    assert report["raw"]["chance"] == pytest.approx((1 / 4 + 1 / 2) / 2)


def test_impossible_options_are_never_chosen():
    model = Likelihoods({"a": -math.inf, "b": -1e9})
    assert choice_report(model, "q", [Item(options=("a", "b"), answer=1)])["per_byte"]["passed"] == 1


def test_dialogs_reach_the_model():
    model = Likelihoods({"a": -1.0, "b": -2.0})
    choice_report(model, "q", [Item(dialog=(user("?"),), options=("a", "b"), answer=0)])
    assert all(c.dialog == (user("?"),) for c in model.asked)


def test_an_answer_that_is_no_option_is_refused():
    with pytest.raises(ValueError, match="one of 2"):
        Item(options=("a", "b"), answer=2)
