"""The GGUF container: one file with typed settings and tensors, for llama.cpp and everything built on it.

    "GGUF"  u32 version (2 or 3)  u64 tensors  u64 settings
    settings    string key | u32 type | value                                     general.architecture = "llama" ...
    tensors     string name | u32 n | u64 * n sizes, the fastest first | u32 block type | u64 offset
    padding     up to a multiple of general.alignment (32)
    data        each tensor's blocks at its offset, counted from here, padded likewise

All numbers are little-endian. A string is its length as u64, then UTF-8. An array is its elements' type, their count
as u64, and the elements. A tensor of sizes (columns, rows) is a matrix of `rows` rows here, as in PyTorch; each row is
a whole number of blocks (`blocks.py`).

The reader takes every count and offset for a claim: it is held against the size of the file before memory is asked
for, so that a broken or malicious file costs an error message. The header is fetched in chunks as far as it goes,
lists of strings (a vocabulary is 400,000 of them) stay bytes until somebody iterates over them, and tensors are fetched
by rows, with plain reads: a file that shrinks while it is mapped would end the process.
"""

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from puna.artifacts import open_regular, replacing
from puna.errors import ArtifactError, shown
from puna.model.gguf.blocks import BLOCKS, OTHER_TYPES, BlockType

MAGIC = b"GGUF"
ALIGNMENT = 32  # bytes, where the file does not say otherwise
_VERSIONS = (2, 3)
_MOST_HEADER_BYTES = 200_000_000  # the largest vocabularies need a tenth
_MOST_ENTRIES = 100_000  # tensors, and settings; a Llama 3.1 405B has 1,138 tensors
_MOST_KEY_BYTES = 65_535
_MOST_DIMENSIONS = 4
_CHUNK = 1 << 20
_HINT = "the file is damaged or was not copied completely: fetch it again, or convert the model again"

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}

# A setting's value: bool, int, float or str; for a list of numbers a numpy array, for a list of strings `Strings`.
Value = Any


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` as PyTorch has it, `begin` in bytes from the file's start."""

    kind: BlockType
    shape: tuple[int, ...]
    begin: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of all of it where there is only one."""
        return self.bytes // self.rows

    @property
    def rows(self) -> int:
        """How many parts can be read apart."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.kind.weights * self.kind.bytes


class Strings:
    """A list of strings, still encoded. Iterating raises `ArtifactError` at one that is not UTF-8."""

    def __init__(self, path: Path, key: str, data: bytes, count: int):
        self._path, self._key, self._data, self._count = path, key, data, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        data, at = self._data, 0
        for number in range(self._count):
            end = at + 8 + int.from_bytes(data[at : at + 8], "little")
            try:
                yield data[at + 8 : end].decode()
            except UnicodeDecodeError:
                message = f"{self._path}: string {number} of {shown(self._key)} is not UTF-8"
                raise ArtifactError(message, hint=_HINT) from None
            at = end


class Container:
    """A GGUF file, open for reading, whatever model it holds. Use as a context.

    `metadata` has the settings by key, `tensors` a `TensorInfo` for each name. Raises `ArtifactError` where the content
    is not what the file's counts and offsets promise.
    """

    def __init__(self, path: Path):
        self.path = path = Path(path)
        if not os.path.lexists(path):
            raise ArtifactError(f"{path} does not exist", hint="give a .gguf file")
        self._file = open_regular(path)
        try:
            cursor = _Cursor(path, self._file)
            self.version, tensors, settings = _read_start(cursor)
            self.metadata: dict[str, Value] = _read_settings(cursor, settings)
            self.tensors: dict[str, TensorInfo] = _read_tensors(cursor, tensors, _alignment(cursor, self.metadata))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor: float32 from quantised blocks, else the stored type.

        A tensor of one dimension is one row.
        """
        info = self.tensors[name]
        raw = self.raw(name, start, stop)
        values = info.kind.decode(raw.view(-1, info.kind.bytes))
        return values.reshape(len(raw), *info.shape[1:]) if len(info.shape) > 1 else values.reshape(info.shape)

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes lie: a file descriptor, open as long as this is, and the first byte."""
        return self._file.fileno(), self.tensors[name].begin

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor as they are packed, uint8 (rows, bytes)."""
        info = self.tensors[name]
        stop = info.rows if stop is None else min(stop, info.rows)
        raw = torch.empty(stop - start, info.row_bytes, dtype=torch.uint8)
        self._file.seek(info.begin + start * info.row_bytes)
        if raw.numel() and self._file.readinto(memoryview(raw.view(-1).numpy())) != raw.numel():
            raise ArtifactError(f"{self.path} ended while it was read", hint=_HINT)
        return raw


class _Cursor:
    """The header's bytes, fetched as they are asked for, and never beyond the file or the limit."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self._data = bytearray()

    def fail(self, fault: str) -> NoReturn:
        raise ArtifactError(f"{self.path}: {fault}", hint=_HINT)

    def require(self, count: int, what: str) -> None:
        """Have `count` more bytes in memory."""
        end = self.at + count
        if end > self.size:
            self.fail(f"it is cut off or damaged: {what} would end at byte {end:,} of {self.size:,}")
        if end > _MOST_HEADER_BYTES:
            self.fail(f"{what} would end at byte {end:,}; a header has at most {_MOST_HEADER_BYTES:,}")
        while len(self._data) < end:
            more = self._file.read(max(_CHUNK, end - len(self._data)))
            if not more:
                self.fail("it ended while it was read")
            self._data += more

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        self.at += count
        return bytes(self._data[self.at - count : self.at])

    def number(self, format: str, what: str) -> int:
        return struct.unpack("<" + format, self.take(struct.calcsize("<" + format), what))[0]

    def string(self, what: str, most: int | None = None) -> str:
        length = self.number("Q", what)
        if most is not None and length > most:
            self.fail(f"{what} is {length:,} bytes long, at most {most:,} are allowed")
        text = self.take(length, what)
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def strings(self, count: int, what: str) -> bytes:
        """The bytes of `count` strings with their lengths. The loop runs 400,000 times in an 8B's header."""
        begin = at = self.at
        self._claim(count, 8, what)
        data, length = self._data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > len(data):
                self.at = at
                self.require(8, what)
            at += 8 + length(data, at)[0]
        self.at = begin
        return self.take(at - begin, what)

    def numbers(self, count: int, format: str, what: str) -> np.ndarray:
        dtype = np.dtype("<" + format)
        self._claim(count, dtype.itemsize, what)
        data = np.frombuffer(self.take(count * dtype.itemsize, what), "u1" if format == "?" else dtype)
        if format == "?" and count and data.max() > 1:
            self.fail(f"{what} has a truth value that is neither 0 nor 1")
        return data.astype(bool) if format == "?" else data

    def _claim(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.size - self.at:
            self.fail(f"{what} claims {count:,} elements, the file has {self.size - self.at:,} more bytes")


def _read_start(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.take(4, "the magic number") if cursor.size >= 4 else b""
    if magic != MAGIC:
        raise ArtifactError(f"{cursor.path} is not a GGUF file: it begins with {magic!r}", hint="give a .gguf file")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "is big-endian" if swapped else f"has GGUF version {version}"
        hint = "GGUF versions 2 and 3, little-endian, can be read; convert the model again with a current converter"
        raise ArtifactError(f"{cursor.path} {what}", hint=hint)
    tensors, settings = cursor.number("Q", "the count of tensors"), cursor.number("Q", "the count of settings")
    for count, what in ((tensors, "tensors"), (settings, "settings")):
        if count > _MOST_ENTRIES:
            cursor.fail(f"it claims {count:,} {what}, at most {_MOST_ENTRIES:,} are allowed")
    return version, tensors, settings


def _read_settings(cursor: _Cursor, count: int) -> dict[str, Value]:
    settings: dict[str, Value] = {}
    for number in range(count):
        key = cursor.string(f"the key of setting {number}", _MOST_KEY_BYTES)
        if key in settings:
            cursor.fail(f"setting {shown(key)} is given twice")
        settings[key] = _read_value(cursor, key)
    return settings


def _read_value(cursor: _Cursor, key: str) -> Value:
    what = f"setting {shown(key)}"
    kind = cursor.number("I", what)
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        kind, count = cursor.number("I", what), cursor.number("Q", what)
        if kind == _STRING:
            return Strings(cursor.path, key, cursor.strings(count, what), count)
        if kind in _NUMBERS:
            return cursor.numbers(count, _NUMBERS[kind], what)
        cursor.fail(f"{what} is a list of " + ("lists" if kind == _ARRAY else f"values of the unknown type {kind}"))
    if kind not in _NUMBERS:
        cursor.fail(f"{what} has the unknown type {kind}")
    return cursor.numbers(1, _NUMBERS[kind], what)[0].item()


def _alignment(cursor: _Cursor, settings: Mapping[str, Value]) -> int:
    alignment = settings.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r}, not a power of two")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    found: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
    for number in range(count):
        name = cursor.string(f"the name of tensor {number}", _MOST_KEY_BYTES)
        if name in found:
            cursor.fail(f"tensor {shown(name)} is given twice")
        found[name] = _read_info(cursor, f"tensor {shown(name)}")
    data = -(-cursor.at // alignment) * alignment
    tensors = {name: TensorInfo(kind, shape, data + offset) for name, (kind, shape, offset) in found.items()}
    _check_places(cursor, tensors, data, alignment)
    return tensors


def _read_info(cursor: _Cursor, what: str) -> tuple[BlockType, tuple[int, ...], int]:
    dimensions = cursor.number("I", what)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        cursor.fail(f"{what} has {dimensions} dimensions, 1 to {_MOST_DIMENSIONS} are possible")
    shape = tuple(cursor.number("Q", what) for _ in range(dimensions))[::-1]
    code, offset = cursor.number("I", what), cursor.number("Q", what)
    if code not in BLOCKS:
        kind = OTHER_TYPES.get(code, f"number {code}")
        hint = f"read here: {', '.join(k.name for k in BLOCKS.values())}; take the model in one of these"
        raise ArtifactError(f"{cursor.path}: {what} is of the type {kind}", hint=hint)
    kind = BLOCKS[code]
    if min(shape) < 1 or shape[-1] % kind.weights:
        cursor.fail(f"{what} has shape {list(shape)}; rows of {kind.name} are multiples of {kind.weights}")
    return kind, shape, offset


def _check_places(cursor: _Cursor, tensors: Mapping[str, TensorInfo], data: int, alignment: int) -> None:
    """Tensors must lie in the file, aligned, and not one upon another."""
    end, before = data, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].begin):
        if (info.begin - data) % alignment:
            cursor.fail(f"tensor {shown(name)} is not aligned to {alignment} bytes")
        if info.begin < end:
            cursor.fail(f"the tensors {shown(before)} and {shown(name)} overlap")
        end, before = info.begin + info.bytes, name
        if end > cursor.size:
            cursor.fail(f"it is cut off: it has {cursor.size:,} bytes, tensor {shown(name)} ends at {end:,}")


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: type and shape are known now, its blocks are made when it is their turn."""

    kind: BlockType
    shape: tuple[int, ...]
    blocks: Iterable[Tensor]  # pieces, uint8 (blocks, bytes of one); a generator, so that they are made one by one

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.kind.weights * self.kind.bytes


def write_container(path: Path, settings: Mapping[str, object], tensors: Mapping[str, Pending]) -> None:
    """Write a GGUF file, version 3, atomically, one piece of a tensor in memory at a time.

    A setting is a bool, an int (written as u32), a float (f32), a string, or a sequence of one of these (ints as i32).
    """
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(settings))]
    header += [_string(key) + _typed(value) for key, value in settings.items()]
    offset = 0
    for name, tensor in tensors.items():
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header.append(_string(name) + sizes + struct.pack("<IQ", tensor.kind.code, offset))
        offset += tensor.bytes + -tensor.bytes % ALIGNMENT
    text = b"".join(header)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(text + bytes(-len(text) % ALIGNMENT))
        for name, tensor in tensors.items():
            written = sum(file.write(memoryview(piece.contiguous().view(-1).numpy())) for piece in tensor.blocks)
            if written != tensor.bytes:
                raise ValueError(f"{name} has {written:,} bytes, {tensor.bytes:,} were announced")
            file.write(bytes(-written % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: object) -> bytes:
    """A setting's type and value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, Sequence):
        return struct.pack("<I", _ARRAY) + _list(value)
    code, format = (_BOOL, "?") if isinstance(value, bool) else (4, "I") if isinstance(value, int) else (6, "f")
    return struct.pack("<I" + format, code, value)


def _list(values: Sequence) -> bytes:
    if all(isinstance(v, str) for v in values):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))
    code, dtype = (5, "<i4") if all(isinstance(v, int) for v in values) else (6, "<f4")
    return struct.pack("<IQ", code, len(values)) + np.asarray(values, dtype).tobytes()
