"""Tool calls as models really write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.chat import ToolCall, assistant
from puna.errors import PunaError
from puna.tokenizer.calls import CODE_INTERPRETER
from puna.tokenizer.dialog import parse_text
from puna.tokenizer.tools_prompt import functions_prompt, system_prompt


def call(name, **arguments):
    return ToolCall(name=name, arguments=arguments)


def search(query):
    return ToolCall(name="brave_search", arguments={"query": query}, dialect="builtin")


def code(source):
    return ToolCall(name=CODE_INTERPRETER, arguments={"code": source}, dialect="python")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"name": "f", "parameters": {"n": 1}}', assistant("", call("f", n=1))),
        ('\n {"name":"f","parameters":{"n":1}}\n', assistant("", call("f", n=1))),
        ('{\n    "type": "function",\n    "name": "f",\n    "parameters": {}\n}', assistant("", call("f"))),
        ('{"name": "f", "arguments": {"n": 1}}', assistant("", call("f", n=1))),
        ('{"parameters": {"n": 1}, "name": "f"}', assistant("", call("f", n=1))),
        ('{"name": "f", "parameters": {"a": {"b": [1, {"c": 2}]}}}', assistant("", call("f", a={"b": [1, {"c": 2}]}))),
        ('{"name": "f", "parameters": {"t": "it\'s \\"}\\" ok"}}', assistant("", call("f", t='it\'s "}" ok'))),
        ('{"name": "f", "parameters": {"t": "two\nlines"}}', assistant("", call("f", t="two\nlines"))),
        ('{"name": "f", "parameters": {"n": 1}} Done.', assistant("Done.", call("f", n=1))),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', assistant("", call("f"), call("g"))),
        ('{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', assistant("", call("f"), call("g"))),
        ('<|python_tag|>{"name": "f", "parameters": {"n": 1}}', assistant("", call("f", n=1))),
        ('<|python_tag|>brave_search.call(query="gold")', assistant("", search("gold"))),
        ('<|python_tag|> brave_search.call( query = "gold" ) ', assistant("", search("gold"))),
        ('<|python_tag|>brave_search.call(query="who said \\"hello\\"")', assistant("", search('who said "hello"'))),
        ('<|python_tag|>brave_search.call(query="it\'s (not) gold")', assistant("", search("it's (not) gold"))),
        ("<|python_tag|>brave_search.call(query='it\\'s')", assistant("", search("it's"))),
        ('<|python_tag|>brave_search.call(query="gold") Done.', assistant("Done.", search("gold"))),
        ("<|python_tag|>print(1)\nprint(2)", assistant("", code("print(1)\nprint(2)"))),
        ("<|python_tag|>my.call(query=1)", assistant("", code("my.call(query=1)"))),
    ],
)
def test_a_call_is_found(text, message):
    assert parse_text(text) == message


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Alice", "age": 3}',
        '{"name": "Alice", "parameters": {}, "age": 3}',
        '{"name": "Alice", "parameters": "tall"}',
        '{"name": 3, "parameters": {}}',
        '{"name": "f"}',
        '{"type": "object", "name": "f", "parameters": {}}',
        '{"name": "f", "parameters": {"n": 1}',
        '[{"name": "f", "parameters": {}}]',
        'To call it, write {"name": "f", "parameters": {}}.',
        'brave_search.call(query="gold")',  # without the tag nothing but the words of a call
        "{" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_what_is_no_call_stays_text(text):
    assert parse_text(text) == assistant(text)


@pytest.mark.parametrize(
    "source",
    [
        'brave_search.call(query="gold',
        'brave_search.call("gold")',
        "brave_search.call(query=gold())",
        "brave_search.call(**{'query': 1})",
        'brave_search.call(query="a" "b", **x)',
        "brave_search.call(" + "query=" + "[" * 100_000,
    ],
)
def test_a_malformed_builtin_call_is_left_to_the_interpreter(source):
    assert parse_text("<|python_tag|>" + source) == assistant("", code(source))


PIECES = ['{"name"', ": ", '"f"', ', "parameters"', "{", "}", "[", "]", '"', "\\", "<|python_tag|>", "'", ", ", "1e999"]
PIECES += ["brave_search.call(", "query=", ")", "=", ";", "\n", "None", "é", "**", "NaN"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_no_text_breaks_the_parser(text):
    message = parse_text(text)
    assert message.role == "assistant"
    assert message.tool_calls or message.content == text


def test_the_system_prompt_has_the_published_order():
    prompt = system_prompt(
        "You are a helpful assistant.",
        builtins=("brave_search", "wolfram_alpha"),
        knowledge_date="December 2023",
        today="21 September 2024",
    )
    assert prompt == (
        "Environment: ipython\nTools: brave_search, wolfram_alpha\nCutting Knowledge Date: December 2023\n"
        "Today Date: 21 September 2024\n\nYou are a helpful assistant."
    )


def test_the_system_prompt_says_only_what_there_is():
    assert system_prompt() == ""
    assert system_prompt("Be kind.") == "Be kind."
    assert system_prompt(code_interpreter=True) == "Environment: ipython"
    definition = {"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}}
    assert system_prompt("Be kind.", functions=[definition]) == functions_prompt([definition]) + "\n\nBe kind."
    assert '"name": "f"' in functions_prompt([definition])


def test_an_unknown_builtin_tool_is_refused():
    with pytest.raises(PunaError, match="google_search"):
        system_prompt(builtins=("google_search",))
