"""Functions that no training text knows: an invented name over an ordinary operation.

Whether a model reads the declaration of a function, rather than remembering its name, shows on names it has never met.
Here a name is two or three made-up syllables, such as `tolvi` or `mabrensu`, and its hash decides whether it may be
trained on or is held out, so the two can never overlap, whatever the seeds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from puna.errors import ConfigError
from puna.tools.definition import Tool

ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["", "", "l", "m", "n", "r", "s"]
HELD_OUT_SHARE = 5  # one name in five


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What an invented function does; `function` takes the arguments in the order of `parameters`."""

    description: str
    parameters: dict[str, str]  # name -> type
    function: Callable[..., Any]


INTEGERS = {"a": "integer", "b": "integer"}

OPERATIONS: dict[str, Operation] = {
    "add": Operation(description="adds a and b", parameters=INTEGERS, function=lambda a, b: a + b),
    "subtract": Operation(description="subtracts b from a", parameters=INTEGERS, function=lambda a, b: a - b),
    "multiply": Operation(description="multiplies a by b", parameters=INTEGERS, function=lambda a, b: a * b),
    "larger": Operation(description="gives the larger of a and b", parameters=INTEGERS, function=max),
    "smaller": Operation(description="gives the smaller of a and b", parameters=INTEGERS, function=min),
    "join": Operation(
        description="joins two texts", parameters={"s": "string", "t": "string"}, function=lambda s, t: s + t
    ),
    "reverse": Operation(description="writes a text backwards", parameters={"s": "string"}, function=lambda s: s[::-1]),
    "length": Operation(description="counts the letters of a text", parameters={"s": "string"}, function=len),
}


def invented_function(name: str, operation: str) -> Tool:
    """A tool `name` that computes one of `OPERATIONS`. Raises `ConfigError` for an operation that is not there."""
    if operation not in OPERATIONS:
        raise ConfigError(f"{operation!r} is not an operation", hint=f"one of {', '.join(OPERATIONS)}")
    chosen = OPERATIONS[operation]

    def function(arguments: dict[str, Any]) -> str:
        return str(chosen.function(*(arguments[name] for name in chosen.parameters)))

    return Tool(
        name=name,
        description=chosen.description,
        parameters={
            "type": "object",
            "properties": {name: {"type": kind} for name, kind in chosen.parameters.items()},
            "required": list(chosen.parameters),
        },
        function=function,
    )


def invented_names(seed: int, count: int, *, split: Literal["train", "heldout"]) -> list[str]:
    """`count` different names of one side. The same seed gives the same names; no name is ever on both sides."""
    draw, names = random.Random(f"invented names {split} {seed}"), {}
    while len(names) < count:
        syllables = draw.choice([2, 2, 3])
        name = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(syllables)) + draw.choice(CODAS)
        if is_held_out(name) == (split == "heldout"):
            names[name] = None
    return list(names)


def is_held_out(name: str) -> bool:
    """Which side a name is on."""
    return xxhash.xxh3_64_intdigest(name.encode()) % HELD_OUT_SHARE == 0
