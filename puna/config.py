"""Configuration is a value: frozen dataclasses that become JSON and come back the same.

A recipe is a function that returns a complete configuration; a variant is `dataclasses.replace`. On the command line
`puna run tiny pretrain.steps=200 data=PATH` changes single fields; names and types are checked, and a typo is answered
with the nearest name. There is no merging of files, no registry, and no environment variable that changes a result.

A configuration class is `@dataclass(frozen=True, kw_only=True)`, each field documented by the comment or string beside
it, units in the name (`warmup_steps`, `timeout_s`), rules in `__post_init__` by `require`.
Supported field types: bool, int, float, str, Path, None in unions, tuples of those, dicts with string keys, and nested
configuration classes.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from puna.errors import ConfigError

C = TypeVar("C")


def require(condition: bool, message: str, *, hint: str = "") -> None:
    """State a rule of a configuration; raises `ConfigError` with `message` where it does not hold."""
    if not condition:
        raise ConfigError(message, hint=hint)


def to_json(value: Any, *, machine: bool = True) -> Any:
    """A configuration as plain JSON values (dicts, lists, strings, numbers).

    Without `machine`, fields are left out whose metadata says that they describe the machine, not the result: the same
    result may be begun on one and finished on another.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in dataclasses.fields(value) if machine or not f.metadata.get("machine")]
        return {f.name: to_json(getattr(value, f.name), machine=machine) for f in kept}
    if isinstance(value, Mapping):
        return {str(k): to_json(v, machine=machine) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v, machine=machine) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def from_json(kind: type[C], data: Mapping[str, Any]) -> C:
    """The configuration of class `kind` that `to_json` wrote. Raises `ConfigError` for unknown or ill-typed fields."""
    return _convert(kind, data, kind.__name__)


def digest(value: Any) -> str:
    """A short hash of a configuration or of any JSON value; equal values have equal digests."""
    text = json.dumps(to_json(value), sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def override(config: C, assignments: Iterable[str]) -> C:
    """`config` with fields replaced, each assignment a string `path.to.field=value`.

    Raises `ConfigError` for an unknown name (with the nearest one), for a value of the wrong type, and for a missing `=`.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        require(bool(equals), f"{assignment!r} is not a setting", hint="write settings as name=value, e.g. seed=1")
        config = _replace(config, path.split("."), text, path)
    return config


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """The fields in which two configurations (or JSON values) differ, as lines `name: a -> b`."""
    a, b = to_json(a), to_json(b)
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [f"{prefix}: {a!r} -> {b!r}"]
    lines = []
    for key in sorted(a.keys() | b.keys()):
        name = f"{prefix}.{key}" if prefix else key
        if key not in a or key not in b:
            lines.append(f"{name}: {a.get(key, '(absent)')!r} -> {b.get(key, '(absent)')!r}")
        else:
            lines += differences(a[key], b[key], name)
    return lines


def _replace(config: Any, path: list[str], text: str, whole: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(config, Mapping):
        require(not rest, f"{whole!r} goes deeper than the setting does")
        return {**config, name: _number_or_text(text)}
    fields = {f.name: f for f in dataclasses.fields(config)}
    if name not in fields:
        _unknown(name, whole, fields)
    current = getattr(config, name)
    if rest:
        nested = dataclasses.is_dataclass(current) or isinstance(current, Mapping)
        require(nested, f"{whole!r}: {name!r} is a single value, it has no fields")
        return dataclasses.replace(config, **{name: _replace(current, rest, text, whole)})
    annotation = typing.get_type_hints(type(config))[name]
    return dataclasses.replace(config, **{name: parse(annotation, text, whole)})


def _number_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unknown(name: str, whole: str, known: Iterable[str]) -> typing.NoReturn:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    raise ConfigError(f"unknown setting {whole!r}", hint=hint)


def parse(annotation: Any, text: str, name: str) -> Any:
    """A command-line string as a value of the annotated type. Raises `ConfigError` where it is not one."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if str in options:
        return text
    if Path in options:
        return Path(text).expanduser()
    if any(dataclasses.is_dataclass(o) for o in options):
        raise ConfigError(f"{name!r} is a group of settings", hint=f"set one of its fields: {name}.FIELD=VALUE")
    container = next((o for o in options if typing.get_origin(o) is tuple), None)
    if container is not None and not text.startswith("["):
        text = json.dumps([_number_or_text(t) for t in text.split(",") if t])
    try:
        value = json.loads(text.lower() if bool in options else text)
    except json.JSONDecodeError:
        value = text
    return _convert(annotation, value, name)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _convert(annotation: Any, value: Any, name: str) -> Any:
    """A JSON value as a value of the annotated type; `ConfigError` where it is not one."""
    if annotation is Any:
        return value
    if _is_union(annotation):
        return _convert_union(typing.get_args(annotation), value, name)
    if dataclasses.is_dataclass(annotation):
        return _convert_dataclass(annotation, value, name)
    origin = typing.get_origin(annotation)
    if origin is tuple and isinstance(value, list | tuple):
        first, *others = typing.get_args(annotation)
        elements = [first] * len(value) if others == [...] else [first, *others]
        if len(elements) != len(value):
            raise ConfigError(f"{name}={value!r} is not accepted", hint=f"expected {len(elements)} values")
        return tuple(_convert(e, v, f"{name}[{i}]") for i, (e, v) in enumerate(zip(elements, value)))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        element = (typing.get_args(annotation) or (str, Any))[1]
        return {str(k): _convert(element, v, f"{name}.{k}") for k, v in value.items()}
    if origin is typing.Literal:
        accepted = typing.get_args(annotation)
        require(
            value in accepted,
            f"{name}={value!r} is not accepted",
            hint=f"one of {', '.join(map(str, accepted))}",
        )
        return value
    if annotation is Path and isinstance(value, str | Path):
        return Path(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, bool):
        _wrong_type(name, value, annotation)
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    _wrong_type(name, value, annotation)


def _convert_union(options: tuple, value: Any, name: str) -> Any:
    if value is None and type(None) in options:
        return None
    failure: ConfigError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, name)
        except ConfigError as error:
            failure = error
    raise failure or ConfigError(f"{name}={value!r} is not accepted")


def _convert_dataclass(kind: type, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    require(isinstance(value, Mapping), f"{name}={value!r} is not a group of settings")
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            _unknown(key, f"{name}.{key}", fields)
    return kind(**{key: _convert(hints[key], item, f"{name}.{key}") for key, item in value.items()})


def _wrong_type(name: str, value: Any, annotation: Any) -> typing.NoReturn:
    expected = getattr(annotation, "__name__", str(annotation))
    raise ConfigError(f"{name}={value!r} is not accepted", hint=f"expected a value of type {expected}")
