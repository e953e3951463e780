"""Answers in a given form, from a model that knows nothing of it."""

import json
import math
import re

import pytest
from tiny_llama import random_model
from worlds import WIDE, engine_of

from puna.chat import Request, Sampling, Structure, user
from puna.errors import ConfigError, DataError, MissingExtra

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
        Structure(kind="json", text='{"$ref": "#"}'),
        Structure(kind="json", text='{"type": "integer", "minimum": 5, "maximum": 1}'),
        Structure(kind="json", text='{"items": ' * 2000 + "{}" + "}" * 2000),
        Structure(kind="regex", text="(" * 50_000 + ")" * 50_000),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_when_the_request_comes(engine, structure):
    with pytest.raises(DataError, match=structure.kind) as caught:
        engine.stream(Request(prompt="q", structure=structure))
    assert len(caught.value.message) < 400 and "\n" not in caught.value.message


def test_a_form_of_an_unknown_kind_is_refused_with_those_there_are(engine):
    with pytest.raises(ConfigError, match="json, regex, grammar"):
        engine.stream(Request(prompt="q", structure=Structure(kind="xml", text="a")))


def test_a_ban_does_not_break_the_form_but_ends_the_request_where_nothing_is_left(engine):
    form = Structure(kind="regex", text="ba")
    beside = engine.stream(Request(prompt="q", sampling=Sampling(max_tokens=9)))
    with pytest.raises(DataError, match="logit_bias bans"):
        ask(engine, form, logit_bias=tuple((id, -math.inf) for id in range(engine.tokenizer.vocab_size)))
    assert list(beside)[-1].completion.completion_tokens == 9
    assert ask(engine, form, logit_bias=((98, -math.inf),)).text == "ba"  # there is a token for both letters


@pytest.mark.parametrize("draft", [False, True])
def test_guesses_change_nothing_of_an_answer_in_a_form(tokenizer, draft):
    model = random_model(WIDE)
    plain = engine_of("torch", tokenizer, model=model)
    guessing = engine_of("torch", tokenizer, model=model, lookahead=4, draft=model if draft else None)
    forms = [
        Structure(kind="regex", text="(ab){3,30}c"),
        Structure(kind="json", text='{"type": "array", "items": {"enum": ["東京", "é", "a b"]}, "minItems": 4}'),
        Structure(kind="grammar", text='start: "(" start ")" | "x"'),
    ]
    for seed, form in enumerate(forms * 4):
        settings = Sampling(temperature=seed % 3 / 2, seed=seed, max_tokens=30, min_tokens=seed)
        request = Request(prompt='ababab 東京 "a b"', sampling=settings, structure=form)
        assert guessing.generate([request])[0].text == plain.generate([request])[0].text


def test_a_form_that_was_asked_for_before_is_not_made_again(engine, monkeypatch):
    form = Structure(kind="regex", text="[0-9]{3}")
    first = ask(engine, form)
    monkeypatch.setattr(engine._reception.forms, "_make", None)
    assert ask(engine, form) == first


def test_without_the_library_the_error_names_the_command(engine, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"puna\[structured\]"):
        ask(engine, Structure(kind="regex", text="a"))
