"""A stream says exactly what the whole answer says, however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.chat import Completion
from puna.serve.replies import Speech, visible
from puna.tokenizer.dialog import PYTHON_TAG, parse_text

CALL = '{"name": "f", "parameters": {"n": 1}}'
TEXTS = [
    "plain text",
    "",
    '  {"name": "Alice", "age": 3}',
    CALL,
    f"  {CALL} and then words",
    f"{CALL}; {CALL}",
    CALL.replace('"f"', '"unknown"'),
    f'Let me see.{PYTHON_TAG}wolfram_alpha.call(query="1+1")',
    f"{PYTHON_TAG}print(1 < 2)",
    "a < b <| c <|python_ d",
    f"text {CALL}",
    "[f(n=1), f()] and then words",
    "[g(n=1)]",
    "[1, 2]",
    '<function=f>{"n": 1}</function>',
    '<function=g>{"n": 1}</function> or so',
]


@given(
    st.sampled_from(TEXTS) | st.lists(st.sampled_from([*TEXTS, "{", "<", " ", PYTHON_TAG]), max_size=3).map("".join),
    st.sampled_from([frozenset(), frozenset({"f"})]),
    st.sampled_from(["stop", "length"]),
    st.lists(st.integers(1, 9), max_size=60),
)
def test_the_deltas_of_a_stream_add_up_to_the_whole_answer(text, tools, reason, sizes):
    completion = Completion(message=parse_text(text), text=text, finish_reason=reason)
    speech, at, deltas = Speech(tools), 0, []
    for size in [*sizes, len(text)]:
        deltas.append(speech.say(text[at : at + size]))
        at += size
    rest, calls = speech.finish(completion)
    assert ("".join(deltas) + rest, calls) == visible(completion, tools)


def test_nothing_of_a_call_is_shown_as_text():
    for text in (CALL, f"{PYTHON_TAG}print(1)", '<function=f>{"n": 1}</function>', "[f(n=1), f()]"):
        speech = Speech(frozenset({"f"}))
        assert [speech.say(character) for character in text] == [""] * len(text)


def test_text_is_shown_as_it_comes_even_where_tools_are_offered():
    speech = Speech(frozenset({"f"}))
    assert [speech.say(word) for word in ("It", " is", " 3 < 4", " {x}")] == ["It", " is", " 3 < 4", " {x}"]


def test_what_began_like_a_call_is_shown_once_it_is_none():
    for text in ('{"name": "f", "ag', '{"name": "Alice"', '{"name": "g"', "[1,", "[f]", "<b"):
        speech = Speech(frozenset({"f"}))
        assert [speech.say(character) for character in text] == [""] * (len(text) - 1) + [text]


def test_a_raw_completion_holds_nothing_back():
    assert Speech(None).say(f"{{ {PYTHON_TAG}") == f"{{ {PYTHON_TAG}"


@pytest.mark.parametrize("reason", ["stop", "tool_calls"])
def test_a_call_that_was_cut_off_is_text(reason):
    text = f"{PYTHON_TAG}print(1"
    cut = Completion(message=parse_text(text), text=text, finish_reason="length")
    whole = Completion(message=parse_text(text), text=text, finish_reason=reason)
    assert visible(cut, frozenset()) == (text, ())
    assert visible(whole, frozenset())[1][0].arguments == {"code": "print(1"}
