"""Weights on disk: the safetensors format, read a piece at a time.

    8 bytes, little-endian    n, the length of the header
    n bytes of JSON           {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..., "__metadata__": {..}}
    the tensors               row-major bytes, without gaps, offsets counted from here

The format's own library maps a whole file into memory or asks for all tensors at once. Here a reader fetches rows, or
maps a tensor that is wanted as it is, and a writer (`tensorwriter.py`) takes one tensor after the other, so that loading
or saving a model needs the model's memory and not twice that; and a short or scribbled file is a message to the user
instead of a crash. No code is ever executed. Headers need no PyTorch, and neither does who reads tensors by `place`.

As the format's own library does, the reader wants the tensors to cover the rest of the file: one that lies on another,
a gap, or bytes after the last are faults. So a header can never claim more memory than the file is long.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.artifacts import open_regular
from puna.errors import ArtifactError, shown

if TYPE_CHECKING:
    from torch import Tensor

# The forms in which numbers can be stored, and the bytes of one; PyTorch's types for them are in `dtypes.py`.
FORMS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_MOST_HEADER_BYTES = 8 << 20  # the format allows 100 MB; the 405B model in one file needs 0.2
_MOST_DIMENSIONS = 8
_MOST_NUMBER = (1 << 63) - 1
_HINT = "the file is damaged or was not copied completely: fetch it again, or run its stage again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: `begin` counts bytes from the file's start."""

    form: str
    shape: tuple[int, ...]
    begin: int

    @property
    def item_bytes(self) -> int:
        return FORMS[self.form]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.item_bytes

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


class TensorFile:
    """One safetensors file, open for reading. Use as a context.

    Raises `ArtifactError` where the content is not what the header promises.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pages: mmap.mmap | None = None  # the whole file, once a tensor is mapped
        self._file = open_regular(path)
        try:
            self.entries, self.metadata = _read_header(path, self._file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> "Tensor":
        """Rows `start` to `stop` of a tensor, in memory of its own."""
        from puna.model.dtypes import tensor_of

        entry = self.entries[name]
        rows = (entry.shape[0] if stop is None else min(stop, entry.shape[0])) - start if entry.shape else 0
        shape = (rows, *entry.shape[1:]) if entry.shape else ()
        data = self._bytes(entry.begin + start * entry.row_bytes, math.prod(shape) * entry.item_bytes)
        return tensor_of(data, entry.form).view(shape)

    def numbers(self, name: str) -> np.ndarray:
        """A whole tensor of floats as float32, without PyTorch."""
        entry = self.entries[name]
        data = self._bytes(entry.begin, entry.bytes)
        if entry.form == "BF16":
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
        return data.view(_FLOATS[entry.form]).astype(np.float32, copy=False).reshape(entry.shape)

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes lie, for who reads them itself: a file descriptor and the first byte."""
        return self._file.fileno(), self.entries[name].begin

    def mapped(self, name: str) -> "Tensor | None":
        """A whole tensor as the file's own pages: read when they are touched, copied when they are written to.

        It outlives this object. None where the bytes do not lie as the processor wants them, or cannot be mapped.
        """
        entry = self.entries[name]
        if entry.begin % entry.item_bytes or not entry.bytes:
            return None
        if self._pages is None:
            try:
                self._pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):
                return None
        from puna.model.dtypes import tensor_of

        pages = np.frombuffer(self._pages, dtype=np.uint8, count=entry.bytes, offset=entry.begin)
        return tensor_of(pages, entry.form).view(entry.shape)

    def _bytes(self, begin: int, count: int) -> np.ndarray:
        taken = np.empty(count, dtype=np.uint8)
        if count:
            self._file.seek(begin)
            if self._file.readinto(taken) != count:
                raise ArtifactError(f"{self.path} ended while it was read", hint=_HINT)
        return taken


def _read_header(path: Path, file) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise ArtifactError(f"{path} is not a safetensors file, or was cut off in its header", hint=_HINT)
    if length > _MOST_HEADER_BYTES:
        what = f"{path} claims a header of {length:,} bytes; at most {_MOST_HEADER_BYTES:,} are read"
        raise ArtifactError(what, hint=_HINT)
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=unique_keys)
        metadata = header.pop("__metadata__", {})
        if any(not isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds what is no text")
        entries = {name: _entry(path, name, record, 8 + length) for name, record in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"the header of {path} cannot be read: {str(error)[:200]}", hint=_HINT) from None
    _check_places(path, entries, 8 + length, size)
    return entries, metadata


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads`: raises `ValueError` where a key comes twice, for readers differ in which they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(n for i, n in enumerate(names) if n in names[:i]))} is given twice")
    return found


def _check_places(path: Path, entries: Mapping[str, TensorEntry], data: int, size: int) -> None:
    """One after the other, the tensors must fill the file from `data` on."""
    end, before = data, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].bytes)):
        if entry.begin != end:
            between = f"after {shown(before)}" if before else "after the header"
            fault = (
                f"overlaps {shown(before)}" if entry.begin < end else f"leaves {entry.begin - end:,} bytes {between}"
            )
            raise ArtifactError(f"{path}: tensor {shown(name)} {fault}", hint=_HINT)
        end, before = entry.begin + entry.bytes, name
    if end > size:
        raise ArtifactError(f"{path} is cut off: it has {size:,} bytes, its tensors need {end:,}", hint=_HINT)
    if end < size:
        raise ArtifactError(f"{path} has {size - end:,} bytes after its last tensor", hint=_HINT)


def _entry(path: Path, name: str, record: Mapping, data: int) -> TensorEntry:
    if record["dtype"] not in FORMS:
        hint = f"convert it first; read here: {', '.join(FORMS)}"
        raise ArtifactError(f"{path}: tensor {shown(name)} is of type {shown(record['dtype'])}", hint=hint)
    shape, (begin, end) = record["shape"], record["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_size, [*shape, begin, end])):
        what = f"has the shape {shown(shape)} and the bytes {shown(begin)} to {shown(end)}"
        raise ArtifactError(f"{path}: tensor {shown(name)} {what}", hint=_HINT)
    entry = TensorEntry(record["dtype"], tuple(shape), data + begin)
    fits = _is_size(math.prod(n or 1 for n in shape) * entry.item_bytes)
    if end - begin != entry.bytes or not fits:
        raise ArtifactError(f"{path}: tensor {shown(name)} has a shape and a length that disagree", hint=_HINT)
    return entry


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number <= _MOST_NUMBER


def row_pieces(entry: TensorEntry, multiple: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover a tensor, each of about `piece_bytes` and a multiple of `multiple` rows long."""
    rows = max(1, piece_bytes // max(1, entry.row_bytes * multiple)) * multiple
    total = entry.shape[0] if entry.shape else 0
    for start in range(0, total, rows):
        yield start, min(start + rows, total)
