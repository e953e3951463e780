"""Answers in a given form, from a model that knows nothing of it."""

import json
import re

import pytest
from worlds import engine_of

from puna.chat import Request, Sampling, Structure, user
from puna.errors import DataError, MissingExtra

llguidance = pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def engine(tokenizer):
    return engine_of("torch", tokenizer)


def ask(engine, structure: Structure, **sampling):
    settings = {"max_tokens": 90, "temperature": 1.0, **sampling}
    return engine.generate([Request(prompt="q", sampling=Sampling(**settings), structure=structure)])[0]


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_follows_its_json_schema(engine, seed):
    spaces = tuple((id, -100.0) for id in (9, 10, 13, 32))  # a random model would write blanks for ever
    answer = ask(engine, Structure(kind="json", text=json.dumps(SCHEMA)), seed=seed, logit_bias=spaces)
    assert answer.finish_reason == "stop"
    value = json.loads(answer.text)
    assert value.keys() == {"name", "age"} and 0 <= value["age"] <= 99 and len(value["name"]) <= 6


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_its_regular_expression_or_grammar(engine, temperature):
    pattern = r"[0-9]{3}-(yes|no)"
    answer = ask(engine, Structure(kind="regex", text=pattern), temperature=temperature)
    assert re.fullmatch(pattern, answer.text) and answer.finish_reason == "stop"
    grammar = 'start: "(" start ")" | "x"'
    answer = ask(engine, Structure(kind="grammar", text=grammar), temperature=temperature, logit_bias=((120, 5.0),))
    assert re.fullmatch(r"\(*x\)*", answer.text) and answer.text.count("(") == answer.text.count(")")


def test_the_form_has_the_last_word_over_min_tokens(engine):
    answer = ask(engine, Structure(kind="regex", text="abc"), min_tokens=50)
    assert (answer.text, answer.finish_reason) == ("abc", "stop")


def test_a_form_does_not_touch_the_requests_beside_it(engine):
    plain = Request(prompt="q", sampling=Sampling(max_tokens=20))
    formed = Request(prompt="q", sampling=Sampling(max_tokens=20), structure=Structure(kind="regex", text="[0-9]+"))
    dialog = Request(dialog=(user("hi"),), sampling=Sampling(max_tokens=9), structure=formed.structure)
    together = engine.generate([plain, formed, dialog])
    assert together[0].text == engine.generate([plain])[0].text
    assert all(re.fullmatch("[0-9]+", a.text) for a in together[1:])


@pytest.mark.parametrize(
    "structure",
    [
        Structure(kind="json", text="{"),
        Structure(kind="json", text='{"type": "alien"}'),
        Structure(kind="regex", text="("),
        Structure(kind="grammar", text="start: nowhere"),
        Structure(kind="regex", text="a" * 300_000),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_when_the_request_comes(engine, structure):
    with pytest.raises(DataError, match=structure.kind):
        engine.stream(Request(prompt="q", structure=structure))


def test_without_the_library_the_error_names_the_command(engine, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"puna\[structured\]"):
        ask(engine, Structure(kind="regex", text="a"))
