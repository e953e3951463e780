"""Protocol buffers on the wire: as much of the format as reading and writing a SentencePiece model needs.

A message is a sequence of fields, and each says how long it is, so that a reader can skip what it does not know:

    0a 05 ...          key 0x0a = field 1, wire type 2; 5 bytes follow: text, bytes, or a message in the message
    15 00 00 80 bf     key 0x15 = field 2, wire type 5; four bytes: a float, here -1.0
    18 03              key 0x18 = field 3, wire type 0; a variable-length integer, here 3

A key is `number << 3 | wire type`. A variable-length integer has seven bits in each byte, the lowest first, and the
high bit says that more follow; ten bytes hold the 64 bits that are allowed. Nothing is copied before its claimed length
was checked against what is left, so a lie about a length costs nothing.
"""

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

MOST_FIELDS = (1 << 19) + 100  # of one message: a vocabulary has one for each piece


class Wire(IntEnum):
    """How a field's value is stored. Groups (3 and 4), which nothing has written for years, are not read."""

    INTEGER = 0
    EIGHT_BYTES = 1
    BYTES = 2
    FOUR_BYTES = 5


class WireError(ValueError):
    """The bytes are no message; the text says why and at which byte."""


def read_message(data: memoryview, schema: Mapping[int, tuple[str, Wire]]) -> dict[str, list[Any]]:
    """The fields of `schema` (number -> name, wire type) in `data`: name -> values, in order; others are skipped.

    Integers come as int, `FOUR_BYTES` as the float they hold, `BYTES` as a view into `data`. Raises `WireError` for
    anything that is no message, and for a field of `schema` that has another wire type.
    """
    found: dict[str, list[Any]] = {name: [] for name, _ in schema.values()}
    for number, wire, value in _fields(data):
        if number in schema:
            name, expected = schema[number]
            if wire != expected:
                raise WireError(f"field {number} ({name}) has wire type {wire}, not {int(expected)}")
            found[name].append(struct.unpack("<f", value)[0] if wire == Wire.FOUR_BYTES else value)
    return found


def write_field(number: int, value: int | float | bytes | str) -> bytes:
    """A field on the wire: an integer of at least 0, a float in four bytes, text, or the bytes of a message."""
    if isinstance(value, float):
        return _written(number << 3 | Wire.FOUR_BYTES) + struct.pack("<f", value)
    if isinstance(value, int):
        return _written(number << 3 | Wire.INTEGER) + _written(value)
    data = value.encode() if isinstance(value, str) else value
    return _written(number << 3 | Wire.BYTES) + _written(len(data)) + data


def _written(value: int) -> bytes:
    """`value` as a variable-length integer."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    at, count = 0, 0
    while at < len(data):
        start = at
        key, at = _integer(data, at)
        number, wire = key >> 3, key & 7
        if wire == Wire.INTEGER:
            value, at = _integer(data, at)
        else:
            if wire == Wire.BYTES:
                length, at = _integer(data, at)
            elif wire in (Wire.EIGHT_BYTES, Wire.FOUR_BYTES):
                length = 8 if wire == Wire.EIGHT_BYTES else 4
            else:
                raise WireError(f"byte {start} begins a field of the unknown wire type {wire}")
            if length > len(data) - at:
                raise WireError(f"field {number} at byte {start} claims {length:,} bytes, {len(data) - at:,} are left")
            value, at = data[at : at + length], at + length
        count += 1
        if number == 0 or count > MOST_FIELDS:
            fault = f"more than {MOST_FIELDS:,} fields" if number else f"field number 0 at byte {start}"
            raise WireError(f"the message has {fault}")
        yield number, wire, value


def _integer(data: memoryview, at: int) -> tuple[int, int]:
    """The variable-length integer at byte `at`, and the place after it."""
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value & (1 << 64) - 1, at + place + 1
    raise WireError(f"the integer at byte {at} has no end")
