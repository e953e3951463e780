import inspect
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.chat import Completion, Continuation, assistant, user
from puna.curation.classifier import Classifier
from puna.curation.quality import PROMPT, HeuristicJudge, Judge, auc
from puna.errors import DataError

from .conftest import prose


class Scripted:
    """A generator that gives prepared answers."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def generate(self, requests):
        self.asked += [request.dialog[-1].content for request in requests]
        return [Completion(message=assistant(a), text=a, finish_reason="stop") for a in self.answers]


def test_a_judge_asks_any_generator_and_reads_its_scores():
    generator = Scripted(["Score: 4", "I would say Score:2.", "no idea", "Score: 9"])
    assert Judge(generator).grade(["a", "b", "c", "d"]) == [4, 2, None, None]
    assert "<extract>\nb\n</extract>" in generator.asked[1]


def test_the_heuristic_judge_answers_the_same_prompt_and_prefers_prose_to_noise():
    explained = (
        "A river carries stones because its water is fast. When the valley widens, the water slows down, which means that "
        "sand settles first.\n\nFor example, the delta of a large river grows by metres each year. If a dam is built, it "
        "returns to the sea.\n"
    )
    noise = "\n".join("| 12 | 44 | -- | 99.1 | xx |" for _ in range(40))
    good, bad, code = Judge(HeuristicJudge()).grade([explained, noise, inspect.getsource(json)])
    assert good >= 3 > bad and code >= 3


def test_the_heuristic_judge_is_certain_of_its_own_answer():
    judge = HeuristicJudge()
    dialog = (user(PROMPT.format(extract=prose(1))),)
    from puna.chat import Request

    answer = judge.generate([Request(dialog=dialog)])[0].text
    assert judge.score([Continuation(text=answer, dialog=dialog), Continuation(text="no", dialog=dialog)]) == [
        0.0,
        -math.inf,
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auc_is_how_often_a_good_one_scores_above_a_bad_one(pairs):
    scores, labels = zip(*pairs)
    up, down = [s for s, g in pairs if g], [s for s, g in pairs if not g]
    if not (up and down):
        with pytest.raises(DataError):
            auc(scores, labels)
        return
    wins = sum((u > d) + 0.5 * (u == d) for u in up for d in down)
    area, low, high = auc(scores, labels)
    assert area == pytest.approx(wins / (len(up) * len(down)))
    assert 0.0 <= low <= area + 1e-12 and area - 1e-12 <= high <= 1.0


def labelled(count, seed=0):
    texts = [
        prose(seed + n) if n % 2 else " ".join(f"menu{n % 7} item{k % 5} click here" for k in range(20))
        for n in range(count)
    ]
    return texts, [bool(n % 2) for n in range(count)]


def test_the_classifier_learns_what_tells_good_from_bad():
    texts, good = labelled(120)
    classifier = Classifier.train(texts, good, epochs=3, seed=1)
    unseen, truth = labelled(60, seed=5000)
    assert auc([classifier.score(t) for t in unseen], truth)[0] > 0.95


def test_training_twice_gives_the_same_bytes_and_loading_the_same_scores(tmp_path):
    texts, good = labelled(60)
    for name in ("a", "b"):
        Classifier.train(texts, good, epochs=3, seed=1).save(tmp_path / name)
        _waste = [[float("nan")] * 5000 for _ in range(50)]  # another state of the heap
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    trained = Classifier.train(texts, good, epochs=3, seed=1)
    assert [Classifier.load(tmp_path / "a").score(t) for t in texts] == [trained.score(t) for t in texts]


def test_no_words_no_score_but_the_bias():
    texts, good = labelled(20)
    assert 0.0 < Classifier.train(texts, good, epochs=1, seed=1).score("") < 1.0
