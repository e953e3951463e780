"""How the fuzzer breaks a file: bytes flipped, cut, repeated and removed, numbers made extreme, values of JSON absurd."""

import random
import re
import struct

WORDS = (0, 1, 2, 3, 9, 31, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ("0", "-1", "1.5", "1e400", "-1e400", "NaN", "Infinity", "null", "true", "[]", "{}", '""', "9" * 30, "9" * 4400, '"\\ud800"',
         "1000000000", "1000000000000", '"../../x"', "[[[[[[]]]]]]", "0.0", '"a"', "18446744073709551615")  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data`, broken in one to three ways."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_WAYS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        made[_place(made, rng)] = rng.randrange(256)
    return bytes(made)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = _place(data, rng)
    piece = data[start : start + rng.randrange(1, 64)]
    at = rng.choice((start, _place(data, rng)))
    return data[:at] + piece * rng.choice((1, 1, 1, 100)) + data[at:]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start = _place(data, rng)
    return data[:start] + data[start + rng.randrange(1, 32) :]


def _extreme(data: bytes, rng: random.Random) -> bytes:
    form, at = rng.choice(("<Q", "<I", "<H", "<f", "<d")), _place(data, rng)
    if form in ("<f", "<d"):
        word = struct.pack(form, rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"))))
    else:
        word = struct.pack(form, rng.choice(WORDS) % (1 << 8 * struct.calcsize(form)))
    return data[:at] + word + data[at + len(word) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Another value in place of a number, or of a text, in JSON."""
    where = [
        m.span()
        for m in re.finditer(rb'(?<=[:\[, ])-?\d+(\.\d+)?|(?<=[:\[,] )"[^"]*"|(?<=[:\[,])"[^"]*"', data[: 1 << 15])
    ]
    if not where:
        return _extreme(data, rng)
    start, stop = rng.choice(where)
    made = data[:start] + rng.choice(TEXTS).encode() + data[stop:]
    return _lengthened(data, made)


def _key(data: bytes, rng: random.Random) -> bytes:
    """A key of JSON twice, or another's."""
    keys = [m.span() for m in re.finditer(rb'"[^"]*"(?=\s*:)', data[: 1 << 15])]
    if len(keys) < 2:
        return _remove(data, rng)
    (start, stop), (other, end) = rng.sample(keys, 2)
    return _lengthened(data, data[:start] + data[other:end] + data[stop:])


def _lengthened(before: bytes, after: bytes) -> bytes:
    """The length before a safetensors header, set right again: else nothing behind it is looked at."""
    if before[8:10] == b'{"' and len(before) > 8:
        length = int.from_bytes(before[:8], "little") + len(after) - len(before)
        return max(0, length).to_bytes(8, "little") + after[8:]
    return after


def _place(data: bytes, rng: random.Random) -> int:
    """Mostly in the beginning, where the headers are, or at the end, where zip has its directory."""
    size = max(1, len(data))
    return min(size - 1, rng.choice((rng.randrange(size), rng.randrange(min(size, 400)), rng.randrange(min(size, 4000)),
                                     size - 1 - rng.randrange(min(size, 2000)))))  # fmt: skip


_WAYS = (_flip, _flip, _cut, _repeat, _remove, _extreme, _extreme, _number, _number, _number, _key)
