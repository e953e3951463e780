"""One file of `torch.save`, its tensors readable a few rows at a time.

    consolidated.00.pth  =  archive (archive.py)  +  index (unpickle.py)

    tensor 'layers.0.attention.wq.weight'  ->  storage '7', offset 0, shape (4096, 4096), strides (4096, 1)
    row r of it                            ->  bytes (offset + r * 4096) * 2 ... of the entry x/data/7

Opening reads the directory and the index, a few hundred kilobytes; numbers are read when asked for. A row must lie in
one piece, as it does in every released file; rows may lie apart, as in a matrix cut out of a wider one.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from puna.errors import ArtifactError
from puna.model.meta.archive import StoredZip
from puna.model.meta.unpickle import MOST_BYTES, TensorRef, read_tensors

_INDEX = "data.pkl"
_HINT = "the file is damaged or was not copied completely: fetch it again"
FREQUENCIES = "rope.freqs"  # the end of names whose tensors are never read: they can be computed, and layers share them
_SAME_TWICE = {"tok_embeddings.weight", "output.weight"}  # a tied model's file may hold one matrix under both names


class TorchFile:
    """The tensors of one file, by name. Use as a context.

    Raises `ArtifactError` where the file is damaged, hostile, or not of `torch.save`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._archive = StoredZip(path)
        try:
            self._folder = self._find_folder()
            self._check_byte_order()
            self.tensors: Mapping[str, TensorRef] = read_tensors(
                self._archive.read(self._folder + _INDEX, MOST_BYTES), path
            )
            self._check_storages()
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor (all of a vector's elements count as rows), in memory of its own."""
        ref = self.tensors[name]
        length, *rest = ref.shape or (1,)
        step, *inner = ref.stride or (1,)
        if not _is_dense(rest, inner):
            hint = "save it again with .contiguous()"
            raise ArtifactError(f"{self.path}: the rows of {name!r} do not lie in one piece", hint=hint)
        stop = length if stop is None else min(stop, length)
        row = math.prod(rest)
        count = max(0, stop - start)
        if count == 0 or row == 0:
            return torch.empty((count, *rest), dtype=ref.storage.dtype)
        span = (count - 1) * step + row  # elements from the first that is wanted to the last
        taken = torch.empty(span, dtype=ref.storage.dtype)
        offset = (ref.offset + start * step) * ref.storage.dtype.itemsize
        self._archive.read_into(self._entry(ref), offset, memoryview(taken.view(torch.uint8).numpy()))
        rows = taken.as_strided((count, *rest), (step, *inner))
        return rows if ref.shape else rows[0]

    def checksum(self, name: str) -> int | None:
        """The CRC that the archive states for a tensor that fills its storage; None if there is none."""
        ref = self.tensors[name]
        entry = self._archive.entries[self._entry(ref)]
        return entry.crc if entry.crc and ref.bytes == entry.size else None

    def _entry(self, ref: TensorRef) -> str:
        return f"{self._folder}data/{ref.storage.key}"

    def _find_folder(self) -> str:
        names = [n for n in self._archive.entries if n.count("/") == 1 and n.endswith("/" + _INDEX)]
        if len(names) != 1:
            raise ArtifactError(f"{self.path} is a zip archive, but not one of torch.save: no {_INDEX}", hint=_HINT)
        return names[0].removesuffix(_INDEX)

    def _check_byte_order(self) -> None:
        name = self._folder + "byteorder"
        if name in self._archive.entries and self._archive.read(name, 16) != b"little":
            hint = "save it again on a little-endian machine"
            raise ArtifactError(f"{self.path} does not say that its numbers are little-endian", hint=hint)

    def _check_storages(self) -> None:
        """Every storage is an entry of just its size, and no place in it is claimed by two tensors' worth of numbers."""
        claimed: dict[str, int] = {}
        counted: set[TensorRef] = set()
        for name, ref in self.tensors.items():
            entry = self._archive.entries.get(self._entry(ref))
            size = ref.storage.count * ref.storage.dtype.itemsize
            if entry is None or entry.size != size:
                there = "is not in the archive" if entry is None else f"has {entry.size:,} bytes there"
                asked = size if size < 1 << 64 else "over 2^64"
                what = f"the storage of {name[:80]!r}, {asked} bytes by the pickle, {there}"
                raise ArtifactError(f"{self.path}: {what}", hint=_HINT)
            if name.endswith(FREQUENCIES) or (name in _SAME_TWICE and ref in counted):
                continue
            if name in _SAME_TWICE:
                counted.add(ref)
            claimed[ref.storage.key] = claimed.get(ref.storage.key, 0) + ref.bytes
            if claimed[ref.storage.key] > size:
                what = f"tensors share the numbers of one storage, {name[:80]!r} is one of them"
                raise ArtifactError(f"{self.path}: {what}", hint="a Llama has no shared weights but a tied embedding")


def _is_dense(shape: list[int], stride: list[int]) -> bool:
    """Whether the elements of one row lie one after the other."""
    wanted = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length > 1 and step != wanted:
            return False
        wanted *= length
    return True
