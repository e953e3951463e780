"""Verifiers: what is right passes, and what is nearly right does not."""

import pytest

from puna.chat import ToolCall, assistant, tool_result, user
from puna.posttrain.tasks.item import Item
from puna.posttrain.tasks.verify import finished, refused, verify

PROMPT = (user("?"),)


def item(**check):
    return Item(task="t", variant="v", id="i", dialog=PROMPT, check=check)


def says(said, **check):
    return verify(item(**check), (*PROMPT, assistant(said)))


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            {"verifier": "exact", "text": "ka ka"},
            ["ka ka", " ka ka\n"],
            ["ka ka ka", "Ka ka", "Sure! ka ka", "", "ka  ka"],
        ),
        (
            {"verifier": "number", "value": 46},
            ["46", "It is 46."],
            ["146", "46 or 47", "4 6", "-46", "46.5", "x46", ""],
        ),
        ({"verifier": "number", "value": -3}, ["-3"], ["3", "−3"]),
        ({"verifier": "text", "value": "omak"}, ["omak", "omak.", '"omak"'], ["kamo", "It is omak", "OMAK"]),
        (
            {"verifier": "fact", "value": "Tolmar", "language": "en"},
            ["Kari comes from Tolmar.", "Tolmar"],
            ["Kari comes from Tolmars.", "I don't know. Tolmar?", "a b c d e f g h i j k l Tolmar", ""],
        ),
        ({"verifier": "fact", "value": "Bäcker", "language": "de"}, ["arbeitet als Bäcker."], ["arbeitet als Backer."]),
        (
            {"verifier": "refusal", "language": "fr"},
            ["Je ne sais pas.", "je ne sais pas"],
            ["I don't know.", "Je ne sais pas, Tolmar"],
        ),
        (
            {"verifier": "ending", "words": 3, "last": "kamo"},
            ["a b kamo", "a b kamo."],
            ["a kamo", "kamo a b", "a b c kamo"],
        ),
        (
            {"verifier": "statement", "language": "de", "relation": "year", "name": "Kari Tolvu"},
            ["Kari Tolvu wurde 1950 geboren."],
            ["Kari Tolvu was born in 1950.", "Kari wurde 1950 geboren.", "Kari Tolvu wurde 1950 geboren. Sure!"],
        ),
    ],
)
def test_a_check_accepts_what_is_right_and_nothing_else(check, right, wrong):
    assert [text for text in right if not says(text, **check)] == []
    assert [text for text in wrong if says(text, **check)] == []


def test_only_the_last_message_is_judged_and_a_call_is_no_answer():
    call = assistant("46", ToolCall(name="f", arguments={}))
    check = item(verifier="number", value=46)
    assert not verify(check, (*PROMPT, call))
    assert not verify(check, (*PROMPT, call, tool_result("46")))
    assert verify(check, (*PROMPT, call, tool_result("45"), assistant("46")))
    assert not finished((*PROMPT, call))


def test_the_calls_must_be_the_expected_ones_and_none_where_none_may_be():
    right, wrong = ({"name": "f", "arguments": {"a": 1, "b": 2}}, {"name": "g", "arguments": {"a": 1, "b": 2}})
    for made, passes in ((right, True), (wrong, False)):
        dialog = (*PROMPT, assistant("", ToolCall(**made)), tool_result("3"), assistant("3"))
        assert verify(item(verifier="number", value=3, calls=[right]), dialog) is passes
        assert not verify(item(verifier="number", value=3, no_calls=True), dialog)
    assert not says("3", verifier="number", value=3, calls=[right])
    assert says("3", verifier="number", value=3, no_calls=True)


@pytest.mark.parametrize("text", ["I don't know.", "Das weiß ich nicht.", "Well, je ne sais pas.", "No lo sé."])
def test_a_refusal_in_any_language_is_recognised(text):
    assert refused((*PROMPT, assistant(text)))
    assert not refused((*PROMPT, assistant("Kari comes from Tolmar.")))
