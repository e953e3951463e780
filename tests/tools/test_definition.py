"""Arguments that a model may write, against schemas: each mistake comes back as words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import ConfigError
from puna.tools.definition import Tool, ToolError

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "days": {"type": "integer"},
        "factor": {"type": "number"},
        "metric": {"type": "boolean"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
    "required": ["city"],
}


def weather(arguments):
    if arguments["city"] == "Atlantis":
        raise ToolError("no such city")
    if arguments["city"] == "Babel":
        raise KeyError("tower")
    return json.dumps(arguments)


TOOL = Tool(name="weather", description="Gives the weather.", parameters=SCHEMA, function=weather)


def test_arguments_that_the_schema_accepts_reach_the_function():
    arguments = {
        "city": "Cusco",
        "days": 2,
        "factor": 1,
        "metric": True,
        "unit": "C",
        "tags": ["a", "b"],
        "place": {"x": 1},
    }
    assert json.loads(TOOL.call(arguments)) == arguments
    assert TOOL.problem(arguments) == ""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "argument 'city' is missing"),
        ({"city": 3}, "argument 'city' must be a string, not 3"),
        ({"city": None}, "argument 'city' must be a string, not null"),
        ({"city": "Cusco", "days": "2"}, "argument 'days' must be an integer, not \"2\""),
        ({"city": "Cusco", "days": 2.5}, "argument 'days' must be an integer, not 2.5"),
        ({"city": "Cusco", "days": True}, "argument 'days' must be an integer, not true"),
        ({"city": "Cusco", "factor": False}, "argument 'factor' must be a number, not false"),
        ({"city": "Cusco", "metric": 1}, "argument 'metric' must be a boolean, not 1"),
        ({"city": "Cusco", "unit": "K"}, 'argument \'unit\' must be one of "C", "F", not "K"'),
        ({"city": "Cusco", "tags": ["a", 1]}, "argument 'tags[1]' must be a string, not 1"),
        ({"city": "Cusco", "place": {}}, "argument 'place.x' is missing"),
        ({"city": "Cusco", "place": {"x": "1"}}, "argument 'place.x' must be an integer, not \"1\""),
        (
            {"town": "Cusco", "city": "x"},
            "argument 'town' is unknown; accepted: city, days, factor, metric, unit, tags, place",
        ),
        (["Cusco"], 'the arguments must be an object, not ["Cusco"]'),
        (None, "the arguments must be an object, not null"),
        ({"city": "Atlantis"}, "no such city"),
        ({"city": "Babel"}, "KeyError: 'tower'"),
    ],
)
def test_what_is_wrong_comes_back_as_words(arguments, error):
    assert TOOL.call(arguments) == f"error: {error}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(SCHEMA["properties"], JSON)))
def test_calling_never_raises_whatever_the_arguments(arguments):
    text = TOOL.call(arguments)
    assert isinstance(text, str)
    if TOOL.problem(arguments):
        assert text.startswith("error: ")


def test_a_long_value_is_shortened_in_the_error():
    assert len(TOOL.call({"city": ["x" * 1000]})) < 150


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "string"},
        {},
        {"type": "object", "properties": {"n": {"type": "int"}}},
        {"type": "object", "properties": {"n": {}}},
        {"type": "object", "properties": {"n": {"type": ["string", "null"]}}},
        {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}},
        {"type": "object", "required": ["n"]},
    ],
)
def test_a_schema_that_would_not_be_held_is_refused(parameters):
    with pytest.raises(ConfigError):
        Tool(name="f", description="", parameters=parameters, function=str)


def test_the_declaration_is_what_llama_is_told():
    assert TOOL.declaration() == {"name": "weather", "description": "Gives the weather.", "parameters": SCHEMA}
