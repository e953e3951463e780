"""A request body, read strictly: every field is checked when it is taken, and none may be left over.

Handlers take what they know (`fields.number("temperature", 0.0, 2.0)`), then call `done`. So a wrong type, a value out
of range and a misspelt name are each answered with OpenAI's error object, naming the field; nothing is coerced and
nothing is ignored in silence.
"""

import difflib
import json
import math
from typing import Any, NoReturn


class ApiError(Exception):
    """An answer that is an error: HTTP `status` and OpenAI's `{"error": {message, type, param, code}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON that a client of OpenAI's API understands."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refuse(message: str, param: str | None = None, code: str | None = None) -> NoReturn:
    """Answer 400: the client must change its request."""
    raise ApiError(400, message, param=param, code=code)


def parse_json(body: bytes) -> Any:
    """The JSON value in `body`. NaN, infinities and nesting beyond the parser's depth are refused like any bad JSON."""

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body, parse_constant=no_constant)
        if b"\\u" in body:  # an escaped half of a surrogate pair parses, but is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        refuse(f"the body is not valid JSON: {error}", code="invalid_json")
    return value


class Fields:
    """An object of the body. A taken field is gone; a JSON null counts as absent, as OpenAI's clients mean it."""

    def __init__(self, value: Any, path: str = ""):
        if not isinstance(value, dict):
            refuse(f"{path or 'the body'} must be an object, not {json_type(value)}", path or None)
        self._left = {name: item for name, item in value.items() if item is not None}
        self._path = f"{path}." if path else ""
        self._taken: set[str] = set()

    def name(self, field: str) -> str:
        """The field's full name as errors show it, e.g. `messages[2].content`."""
        return self._path + field

    def take(self, field: str, default: Any = None) -> Any:
        """The value as it is, unchecked."""
        self._taken.add(field)
        return self._left.pop(field, default)

    def text(self, field: str, default: str | None = None) -> str:
        """A string; without a default it is required."""
        value = self.take(field, default)
        if value is None:
            refuse(f"{self.name(field)} is required", self.name(field), "missing_required_parameter")
        return self._typed(field, value, str, "a string")

    def array(self, field: str, *, longest: int) -> list[Any]:
        """An array of at most `longest` items; absent is empty."""
        value = self._typed(field, self.take(field, []), list, "an array")
        if len(value) > longest:
            refuse(f"{self.name(field)} has {len(value)} items; at most {longest} are accepted", self.name(field))
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        """A boolean."""
        return self._typed(field, self.take(field, default), bool, "true or false")

    def number(self, field: str, low: float, high: float) -> float | None:
        """A number within [low, high], or None if absent."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(f"{self.name(field)} must be a number, not {json_type(value)}", self.name(field), "invalid_type")
        self._within(field, value, low, high)
        return float(value)

    def integer(self, field: str, low: int, high: int) -> int | None:
        """A whole number within [low, high], or None if absent."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(f"{self.name(field)} must be an integer, not {json_type(value)}", self.name(field), "invalid_type")
        self._within(field, value, low, high)
        return value

    def ignore(self, *fields: str) -> None:
        """Fields that say something to OpenAI's own service and change nothing here."""
        for field in fields:
            self.take(field)

    def unsupported(self, field: str, *neutral: Any, instead: str = "") -> None:
        """A field of OpenAI's API that this server does not have, accepted only where it asks for nothing."""
        value = self.take(field)
        if value is not None and value not in neutral:
            advice = f"; {instead}" if instead else ""
            refuse(f"{self.name(field)} is not supported{advice}", self.name(field), "unsupported_parameter")

    def done(self) -> None:
        """Refuse what is left."""
        for field in self._left:
            near = difflib.get_close_matches(field, self._taken, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else ""
            refuse(f"unknown parameter {self.name(field)!r}{advice}", self.name(field), "unknown_parameter")

    def _typed(self, field: str, value: Any, kind: type, what: str) -> Any:
        if not isinstance(value, kind):
            refuse(f"{self.name(field)} must be {what}, not {json_type(value)}", self.name(field), "invalid_type")
        return value

    def _within(self, field: str, value: float, low: float, high: float) -> None:
        if not (low <= value <= high):
            top = f" and at most {high}" if math.isfinite(high) else ""
            refuse(f"{self.name(field)}={value} must be at least {low}{top}", self.name(field), "invalid_value")


def json_type(value: Any) -> str:
    """What JSON calls the type of a parsed value."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")
