"""The sampling settings that a client of the server or a person in the terminal may turn, and how far.

One table, so that `top_p` means the same and stops at the same bounds wherever it is set. Defaults are the ones that
Llama's instruct models are published with: temperature 0.6, top-p 0.9.
"""

import dataclasses
from dataclasses import dataclass

from puna.chat import Sampling
from puna.errors import ConfigError

MAX_STOPS = 4  # OpenAI's limit
LONGEST_STOP = 256  # characters
LAST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One setting: its type, its bounds (inclusive), and a line that explains it."""

    kind: type[int] | type[float]
    low: float
    high: float
    meaning: str


KNOBS = {
    "temperature": Knob(kind=float, low=0, high=2, meaning="0 always takes the likeliest token; higher is freer"),
    "top_p": Knob(kind=float, low=0.01, high=1, meaning="draw from the likeliest tokens that make up this probability"),
    "top_k": Knob(kind=int, low=0, high=1_000_000, meaning="draw from this many of the likeliest tokens (0: all)"),
    "min_p": Knob(kind=float, low=0, high=1, meaning="drop tokens below this share of the likeliest's probability"),
    "repetition_penalty": Knob(
        kind=float, low=0.01, high=10, meaning="divide the logits of tokens seen before (1: off)"
    ),
    "presence_penalty": Knob(kind=float, low=-2, high=2, meaning="against tokens that the answer has already"),
    "frequency_penalty": Knob(kind=float, low=-2, high=2, meaning="the same, by how often it has them"),
    "min_tokens": Knob(kind=int, low=0, high=1_000_000, meaning="the shortest answer"),
    "seed": Knob(kind=int, low=0, high=LAST_SEED, meaning="the same seed gives the same answer"),
    "max_tokens": Knob(kind=int, low=1, high=1_000_000, meaning="the longest answer"),
}
DEFAULT = Sampling(temperature=0.6, top_p=0.9, max_tokens=1024)


def turn(sampling: Sampling, name: str, text: str) -> Sampling:
    """`sampling` with one setting replaced by what a person typed. Raises `ConfigError` with what is accepted."""
    if name == "stop":
        stops = tuple(text.split())
        if len(stops) > MAX_STOPS:
            raise ConfigError(f"{len(stops)} stop strings", hint=f"at most {MAX_STOPS}, separated by spaces")
        return dataclasses.replace(sampling, stop=stops)
    if name not in KNOBS:
        raise ConfigError(f"unknown setting {name!r}", hint=f"known: {', '.join([*KNOBS, 'stop'])}")
    knob = KNOBS[name]
    try:
        value = knob.kind(text)
    except ValueError:
        value = None
    if value is None or not knob.low <= value <= knob.high:
        what = "a whole number" if knob.kind is int else "a number"
        raise ConfigError(f"{name} cannot be {text!r}", hint=f"{what} from {knob.low:g} to {knob.high:g}")
    return dataclasses.replace(sampling, **{name: value})
