import json

import numpy as np
import pytest

from puna.evaluation import scores


def test_a_score_survives_json_and_can_be_compared_from_it():
    before = scores.score("tools", [True, False, False, True]).json()
    after = scores.score("tools", [True, True, False, False]).json()
    result = scores.compare(json.loads(json.dumps(before)), json.loads(json.dumps(after)))
    assert (result.wins, result.losses, result.ties) == (1, 1, 2)


def test_all_counts_every_item_once_and_its_chance_is_the_items():
    result = scores.tasks({"a": [True] * 3, "b": [False]}, chance={"a": 0.2})
    assert (result["all"]["passed"], result["all"]["total"]) == (3, 4)
    assert result["all"]["chance"] == pytest.approx(0.15)
    assert result["all"]["outcomes"] == "1110"


def test_no_items_is_no_number():
    empty = scores.score("none", []).json()
    assert empty["value"] is None and (empty["low"], empty["high"]) == (0.0, 1.0)


def test_refusing_at_random_has_an_area_of_one_half():
    draw = np.random.default_rng(0)
    report = scores.refusal([True] * 9, [False] * 9, [False] * 9, draw.normal(size=400), draw.normal(size=400))
    assert report["auc"]["low"] < 0.5 < report["auc"]["high"]
    curve = np.array(report["curve"])
    assert (np.diff(curve, axis=0) >= 0).all() and curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1]


def test_telling_known_from_unknown_raises_the_area():
    report = scores.refusal([True], [False], [True], [0.1, 0.2, 0.3], [0.8, 0.9])
    assert report["auc"]["value"] == 1.0


def test_plain_json_has_no_infinities():
    assert scores.plain({"a": float("inf"), "b": [np.float64(0.5), np.int64(3)], "c": float("nan")}) == {
        "a": None,
        "b": [0.5, 3],
        "c": None,
    }
