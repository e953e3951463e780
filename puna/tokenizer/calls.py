"""Tool calls as text: the five ways in which Llama models write them in the body of an assistant's message.

    json       {"name": "f", "parameters": {"n": 1}}               3.1, one after another joined by "; "
    function   <function=f>{"n": 1}</function>                      3.1, where the prompt asks for it; joined alike
    pythonic   [f(n=1), g(city='Lima')]                             3.2 and later: a list holds all of a message's calls
    builtin    brave_search.call(query="who said \\"hello\\"")       values are JSON, so quotes are escaped
    python     print(6 * 7)                                         the source itself, for the code interpreter

The two last stand after `<|python_tag|>`, which `dialog.py` places; this module sees only text. `call_stream.py` reads
what is written here, and the two are inverse for well-formed calls.

A call that its dialect cannot express is refused, never bent: a parameter that is no identifier in `name=value`, a name
with `>` in a tag, values that JSON has no word for, brackets deeper than the reader goes.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from puna.chat import Dialect, ToolCall
from puna.errors import PunaError
from puna.tokenizer.literals import DEEPEST, LONGEST_NUMBER

PYTHON_TAG = "<|python_tag|>"
BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_INTERPRETER = "code_interpreter"
TAGGED: tuple[Dialect, ...] = ("builtin", "python")  # always behind the tag; the message then ends with <|eom_id|>
JOINT = "; "  # between calls that are not in a list
LONGEST_NAME = 256  # characters

_TAG_NAME = re.compile(r"[^<>\s]+")


def write_call(call: ToolCall) -> str:
    """`call` in its dialect. Raises `PunaError` for one that its dialect cannot express."""
    if call.dialect not in _WRITERS:
        raise PunaError(f"{call.dialect!r} is not a dialect of tool calls", hint=f"they are {', '.join(_WRITERS)}")
    if len(call.name) > LONGEST_NAME:
        raise PunaError(
            f"a call of {call.name[:40]!r}… has a name of {len(call.name)} characters",
            hint=f"names have at most {LONGEST_NAME}",
        )
    problem = _problem(call.arguments)
    if problem:
        raise PunaError(
            f"the arguments of a call of {call.name!r} cannot be written: {problem}",
            hint="arguments are strings, numbers, booleans, None, lists, and tables with strings as keys",
        )
    return _WRITERS[call.dialect](call)


def write_calls(calls: Sequence[ToolCall]) -> Iterator[tuple[str, bool]]:
    """The texts of one message's calls, in order, each with whether it needs a tag even at the start of the body.

    Neighbours that can share a text do. Raises `PunaError` for a call that its dialect cannot express.
    """
    for kind, run in groupby(calls, key=lambda call: _JOINED.get(call.dialect, "apart")):
        texts = [write_call(call) for call in run]
        if kind == "apart":
            yield from ((text, True) for text in texts)
        elif kind == "list":
            yield f"[{', '.join(text[1:-1] for text in texts)}]", False
        else:
            yield JOINT.join(texts), False


_JOINED: dict[str, str] = {"json": "row", "function": "row", "pythonic": "list"}


def _write_json(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "parameters": call.arguments}, ensure_ascii=False)


def _write_function(call: ToolCall) -> str:
    if not _TAG_NAME.fullmatch(call.name):
        raise PunaError(
            f"{call.name!r} cannot stand in <function=NAME>",
            hint="the name must not be empty or hold '<', '>' or white space; use the dialect 'json'",
        )
    return f"<function={call.name}>{json.dumps(call.arguments, ensure_ascii=False)}</function>"


def _write_pythonic(call: ToolCall) -> str:
    if not is_dotted_name(call.name):
        raise PunaError(
            f"{call.name!r} cannot be called in Python's notation",
            hint="the name must be an identifier, or some with dots between; use the dialect 'json'",
        )
    return f"[{call.name}({_keywords(call, _python)})]"


def _write_builtin(call: ToolCall) -> str:
    if call.name not in BUILTIN_TOOLS:
        raise PunaError(
            f"{call.name!r} is not a built-in tool", hint=f"they are {', '.join(BUILTIN_TOOLS)}; use the dialect 'json'"
        )
    return f"{call.name}.call({_keywords(call, lambda value: json.dumps(value, ensure_ascii=False))})"


def _write_python(call: ToolCall) -> str:
    code = call.arguments.get("code")
    if call.name != CODE_INTERPRETER or call.arguments.keys() != {"code"} or not isinstance(code, str):
        raise PunaError(
            f"a call of {call.name!r} with arguments {sorted(call.arguments)} cannot be written as Python source",
            hint=f"the dialect 'python' is for {CODE_INTERPRETER!r} with a text 'code'; use 'json'",
        )
    return code


_WRITERS: dict[str, Callable[[ToolCall], str]] = {
    "json": _write_json,
    "function": _write_function,
    "pythonic": _write_pythonic,
    "builtin": _write_builtin,
    "python": _write_python,
}


def is_dotted_name(name: str) -> bool:
    """Whether `name` is an identifier, or several with dots between."""
    return all(part.isidentifier() for part in name.split("."))


def _keywords(call: ToolCall, write: Callable[[Any], str]) -> str:
    for key in call.arguments:
        if not key.isidentifier():
            raise PunaError(
                f"the parameter {key!r} of a call of {call.name!r} cannot be written as name=value",
                hint="it must be an identifier; use the dialect 'json'",
            )
    return ", ".join(f"{key}={write(value)}" for key, value in call.arguments.items())


def _python(value: Any) -> str:
    """`value` as Python's literal; the floats that have none in JSON's words, which are read alike."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_python, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_python(item)}' for key, item in value.items())}}}"
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _problem(value: Any, depth: int = 1) -> str:
    """Why `value` cannot be written; empty if it can."""
    if isinstance(value, dict | list | tuple):
        if depth > DEEPEST:
            return f"brackets within brackets, more than {DEEPEST}"
        if isinstance(value, dict) and (odd := next((k for k in value if not isinstance(k, str)), None)) is not None:
            return f"the key {odd!r} is no string"
        inner = value.values() if isinstance(value, dict) else value
        return next(filter(None, (_problem(item, depth + 1) for item in inner)), "")
    if isinstance(value, int) and abs(value) >= 10**LONGEST_NUMBER:
        return f"a number of more than {LONGEST_NUMBER} digits"
    return "" if value is None or isinstance(value, str | int | float) else f"{value!r:.60} is no value of JSON"
