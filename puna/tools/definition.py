"""A tool: a name and a description for the model, a schema for its arguments, and the function behind it.

A model's call is a guess at all three, so everything that is wrong with it comes back as text for the model to read and
mend: `error: argument 'n' must be an integer, not "ten"`. Calling a tool never raises.

The schema is the part of JSON Schema that Llama's function declarations use:

    {"type": "object", "properties": {"n": {"type": "integer", "description": "how many"}}, "required": ["n"]}

with types string, integer, number, boolean, array (`items`) and object (`properties`, `required`), and `enum`. A property
that is not declared is not accepted.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from puna.config import require

Schema = Mapping[str, Any]

KEYWORDS = {"type", "description", "properties", "required", "items", "enum"}
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
}


class ToolError(Exception):
    """What a tool's function raises to tell the model that it cannot do as asked, and why."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """Something that a model can call: `function(arguments)` gives the result as text, or raises `ToolError`.

    Raises `ConfigError` if `parameters` is not a schema of an object or uses what is not supported.
    """

    name: str
    description: str
    parameters: Schema
    function: Callable[[dict[str, Any]], str]

    def __post_init__(self) -> None:
        require(bool(self.name), "a tool needs a name")
        require(self.parameters.get("type") == "object", f"the parameters of {self.name!r} must be of type 'object'")
        _check_schema(self.parameters, self.name)

    def problem(self, arguments: Any) -> str:
        """What is wrong with the arguments, in words; empty if the schema accepts them."""
        return _problem(self.parameters, arguments, "")

    def call(self, arguments: Any) -> str:
        """The result as text; `error: ...` if the arguments are not accepted or the function fails."""
        problem = self.problem(arguments)
        if problem:
            return f"error: {problem}"
        try:
            return self.function(arguments)
        except ToolError as error:
            return f"error: {error}"
        except Exception as error:  # a tool may be anybody's function; its failure is news for the model, not our end
            return f"error: {type(error).__name__}: {error}"

    def declaration(self) -> dict[str, Any]:
        """The tool as a model is told of it: the name, the description and the schema."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}


def _check_schema(schema: Schema, where: str) -> None:
    for keyword in schema:
        known = f"supported: {', '.join(sorted(KEYWORDS))}"
        require(keyword in KEYWORDS, f"the schema of {where!r} uses {keyword!r}", hint=known)
    kind = schema.get("type")
    known = f"supported: {', '.join(TYPES)}"
    require(isinstance(kind, str) and kind in TYPES, f"the schema of {where!r} has type {kind!r}", hint=known)
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        require(name in properties, f"the schema of {where!r} requires {name!r}, which is not one of its properties")
    for name, nested in properties.items():
        _check_schema(nested, f"{where}.{name}")
    if "items" in schema:
        _check_schema(schema["items"], f"{where}[]")


def _problem(schema: Schema, value: Any, path: str) -> str:
    subject = f"argument {path!r}" if path else "the arguments"
    kind = schema["type"]
    boolean = isinstance(value, bool) and kind != "boolean"  # to Python, True is an integer
    if boolean or not isinstance(value, TYPES[kind]):
        article = "an" if kind[0] in "aio" else "a"
        return f"{subject} must be {article} {kind}, not {_shown(value)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{subject} must be one of {', '.join(map(_shown, schema['enum']))}, not {_shown(value)}"
    if kind == "object":
        return _object_problem(schema, value, path)
    if kind == "array" and "items" in schema:
        problems = (_problem(schema["items"], item, f"{path}[{i}]") for i, item in enumerate(value))
        return next(filter(None, problems), "")
    return ""


def _object_problem(schema: Schema, value: Mapping[str, Any], path: str) -> str:
    properties = schema.get("properties", {})

    def full(name: object) -> str:
        return f"{path}.{name}" if path else str(name)

    for name in schema.get("required", ()):
        if name not in value:
            return f"argument {full(name)!r} is missing"
    for name, item in value.items():
        if name not in properties:
            return f"argument {full(name)!r} is unknown; accepted: {', '.join(properties) or 'none'}"
        problem = _problem(properties[name], item, full(name))
        if problem:
            return problem
    return ""


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
