"""What a call says about how tokens are drawn, in OpenAI's fields and in those that other servers have beside them.

temperature top_p presence_penalty frequency_penalty logit_bias seed stop        OpenAI's own
top_k min_p repetition_penalty min_tokens ignore_eos                             go in `extra_body`
logprobs top_logprobs (chat)   logprobs echo (completions)                       log-probabilities
response_format   structured_outputs {json | regex | grammar}                    the form of the answer
cache_salt                                                                       whose prompts share the cache
"""

import dataclasses
import json
import math
import secrets
from typing import Any

from puna.chat import Sampling, Structure
from puna.serve import knobs
from puna.serve.fields import Fields, json_type, refuse

LEAST_TOP_P = 1e-6
MOST_BIASES = 1024
LONGEST_SALT = 256
MOST_LOGPROBS = 20  # OpenAI's limit
ANY_OBJECT = '{"type": "object"}'


def sampling(fields: Fields, vocab_size: int) -> Sampling:
    """How tokens are drawn, but for the length of the answer. Raises `ApiError`."""
    numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    drawn: dict[str, Any] = {name: fields.number(name, *_bounds(name)) for name in numbers}
    drawn |= {name: fields.integer(name, *_bounds(name)) for name in ("top_k", "min_tokens")}
    seed = fields.integer("seed", -(2**63), knobs.LAST_SEED)
    given = {name: value for name, value in drawn.items() if value is not None}
    if "top_p" in given:  # OpenAI's API allows 0: the likeliest token
        given["top_p"] = max(given["top_p"], LEAST_TOP_P)
    return dataclasses.replace(
        knobs.DEFAULT,
        **given,
        seed=secrets.randbits(63) if seed is None else seed % 2**63,
        stop=_stops(fields),
        logit_bias=_biases(fields, vocab_size),
        ignore_end=fields.flag("ignore_eos"),
    )


def chat_logprobs(fields: Fields) -> int | None:
    """How many likeliest tokens are reported beside each one of a chat's answer; None if nothing is."""
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top and not wanted:
        refuse("top_logprobs goes with logprobs=true", "top_logprobs")
    return (top or 0) if wanted else None


def completion_logprobs(fields: Fields) -> int | None:
    """The same for a completion, where one field says both."""
    return fields.integer("logprobs", 0, MOST_LOGPROBS)


def structure(fields: Fields) -> Structure | None:
    """The form that the answer must have. Raises `ApiError`."""
    found = [form for form in (_response_format(fields), _structured_outputs(fields)) if form]
    if len(found) > 1:
        refuse("response_format and structured_outputs both name a form", "structured_outputs")
    return found[0] if found else None


def owner(fields: Fields) -> str:
    """Whose prompts may share what the cache keeps of them."""
    salt = fields.text("cache_salt", "")
    if len(salt) > LONGEST_SALT:
        refuse(f"cache_salt has {len(salt)} characters; at most {LONGEST_SALT} are accepted", "cache_salt")
    return salt


def _bounds(name: str) -> tuple[Any, Any]:
    return 0 if name == "top_p" else knobs.KNOBS[name].low, knobs.KNOBS[name].high


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop", [])
    stops = [value] if isinstance(value, str) else value
    accepted = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= knobs.LONGEST_STOP for s in stops)
    if not accepted or len(stops) > knobs.MAX_STOPS:
        refuse(
            f"stop must be a string or at most {knobs.MAX_STOPS} strings of 1 to {knobs.LONGEST_STOP} characters",
            "stop",
            "invalid_value",
        )
    return tuple(stops)


def _biases(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    value = fields.take("logit_bias", {})
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        refuse(f"logit_bias must be an object of at most {MOST_BIASES} tokens", "logit_bias", "invalid_type")
    biases = []
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            refuse(f"logit_bias: {token!r} is no token; ids go from 0 to {vocab_size - 1}", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            refuse(f"logit_bias of {token} must be a number from -100 to 100", "logit_bias", "invalid_value")
        biases.append((int(token), -math.inf if bias == -100 else float(bias)))  # -100 bans, as OpenAI says
    return tuple(biases)


def _response_format(fields: Fields) -> Structure | None:
    value = fields.take("response_format")
    if value is None:
        return None
    form = Fields(value, "response_format")
    kind = form.text("type")
    if kind == "json_schema":
        described = Fields(form.take("json_schema"), form.name("json_schema"))
        schema = described.take("schema")
        described.ignore("name", "description", "strict")  # it is always followed strictly
        described.done()
        form.done()
        return Structure(kind="json", text=_schema(schema, described.name("schema")))
    form.done()
    if kind not in ("text", "json_object"):
        refuse(f"response_format {kind!r} is none of text, json_object, json_schema", form.name("type"))
    return Structure(kind="json", text=ANY_OBJECT) if kind == "json_object" else None


def _structured_outputs(fields: Fields) -> Structure | None:
    value = fields.take("structured_outputs")
    if value is None:
        return None
    form = Fields(value, "structured_outputs")
    schema = form.take("json")
    forms = [Structure(kind="json", text=_schema(schema, form.name("json")))] if schema is not None else []
    for kind in ("regex", "grammar"):
        if text := form.text(kind, ""):
            forms.append(Structure(kind=kind, text=text))
    form.done()
    if len(forms) != 1:
        refuse("structured_outputs must have one of json, regex and grammar", "structured_outputs")
    return forms[0]


def _schema(value: Any, name: str) -> str:
    if not isinstance(value, dict):
        refuse(f"{name} must be an object, not {json_type(value)}", name, "invalid_type")
    return json.dumps(value)
