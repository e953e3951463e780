"""Tool calls as text, and back: what stands in the body of an assistant's message.

    json       {"name": "f", "parameters": {"n": 1}}             calls one after another are joined by "; "
    builtin    brave_search.call(query="who said \\"hello\\"")     values are JSON, so quotes are escaped
    python     the source itself, for the code interpreter

The two last stand after `<|python_tag|>`, which `dialog.py` places; this module sees only text. Writing and parsing
are inverse for well-formed calls. Parsing accepts more than writing gives, since models are not exact: other spacing,
`"type": "function"`, `arguments` for `parameters`, Python's quotes, and words after a call.

What looks like JSON but is no call (an answer such as `{"name": "Alice", "age": 3}`) stays text. A call has a name, a
table of parameters, and nothing else.
"""

import ast
import json
import re
from typing import Any

from puna.chat import ToolCall
from puna.errors import PunaError

BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_INTERPRETER = "code_interpreter"
JOINT = "; "  # between JSON calls

_JSON = json.JSONDecoder(strict=False)  # models write line ends inside strings
_BETWEEN_CALLS = re.compile(r"\s*[;,]?\s*")
_BUILTIN_HEAD = re.compile(rf"\s*({'|'.join(BUILTIN_TOOLS)})\.call\(")
_KEYWORD = re.compile(r"\s*,?\s*([A-Za-z_]\w*)\s*=\s*")
_CLOSE = re.compile(r"\s*\)")
# What the parsers raise for text that is not theirs; a deep enough nesting exhausts the stack.
_MALFORMED = (ValueError, SyntaxError, RecursionError, MemoryError)


def write_call(call: ToolCall) -> str:
    """`call` in its dialect. Raises `PunaError` for one that its dialect cannot express."""
    if call.dialect == "json":
        return json.dumps({"name": call.name, "parameters": call.arguments}, ensure_ascii=False)
    if call.dialect == "python":
        if call.name != CODE_INTERPRETER or call.arguments.keys() != {"code"}:
            raise PunaError(
                f"a call of {call.name!r} with arguments {sorted(call.arguments)} cannot be written as Python source",
                hint=f"the dialect 'python' is for {CODE_INTERPRETER!r} with the argument 'code'; use 'json'",
            )
        return call.arguments["code"]
    if call.name not in BUILTIN_TOOLS:
        raise PunaError(
            f"{call.name!r} is not a built-in tool", hint=f"they are {', '.join(BUILTIN_TOOLS)}; use the dialect 'json'"
        )
    arguments = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in call.arguments.items())
    return f"{call.name}.call({', '.join(arguments)})"


def parse_json_calls(text: str) -> tuple[tuple[ToolCall, ...], str]:
    """The JSON calls at the start of `text`, and the text after them (all of it, where there is no call)."""
    calls: list[ToolCall] = []
    end = 0
    while True:
        start = _BETWEEN_CALLS.match(text, end).end() if calls else len(text) - len(text.lstrip())
        if not text.startswith("{", start):
            break
        try:
            value, stop = _JSON.raw_decode(text, start)
        except _MALFORMED:
            break
        call = _as_call(value)
        if call is None:
            break
        calls.append(call)
        end = stop
    return tuple(calls), text[end:]


def _as_call(value: dict[str, Any]) -> ToolCall | None:
    name, kind = value.get("name"), value.get("type", "function")
    keys = value.keys() - {"name", "type"}
    if len(keys) != 1 or not keys <= {"parameters", "arguments"} or kind != "function":
        return None
    arguments = value[keys.pop()]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name=name, arguments=arguments)


def parse_tagged(text: str) -> tuple[tuple[ToolCall, ...], str]:
    """The calls in `text`, which followed a `<|python_tag|>`, and the text after them.

    It is a built-in tool's call, or JSON calls, or else source for the code interpreter.
    """
    calls, rest = parse_json_calls(text)
    if calls:
        return calls, rest
    head = _BUILTIN_HEAD.match(text)
    found = head and _parse_arguments(text, head.end())
    if found:
        arguments, end = found
        return (ToolCall(name=head[1], arguments=arguments, dialect="builtin"),), text[end:]
    return (ToolCall(name=CODE_INTERPRETER, arguments={"code": text}, dialect="python"),), ""


def _parse_arguments(text: str, at: int) -> tuple[dict[str, Any], int] | None:
    """Keyword arguments from `at` up to the closing bracket, and the place after it; None where they are malformed."""
    start, arguments = at, {}
    while not (close := _CLOSE.match(text, at)):
        keyword = _KEYWORD.match(text, at)
        if not keyword:
            return None
        try:
            arguments[keyword[1]], at = _JSON.raw_decode(text, keyword.end())
        except _MALFORMED:
            return _parse_python_arguments(text, start)
    return arguments, close.end()


def _parse_python_arguments(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """The same where the values are Python's literals: `query='it\\'s'`. The call must be all there is."""
    try:
        call = ast.parse("f(" + text[start:].strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}, len(text)
    except _MALFORMED:
        return None
