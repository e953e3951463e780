"""A state as bytes: what a rank holds at one step, as one safetensors image, and the seal that vouches for it.

The image is the same in memory and on disk, so that a state goes from one to the other by a plain copy:

    8 bytes    length of the header
    header     JSON: name -> dtype, shape, place of its bytes (the safetensors format)
    data       the tensors, one after the other

The seal is a small file beside it: step, hash of the image (xxh3, 128 bits), what the run noted; and, on its first line,
the hash of all that. Without a seal there is no image: the seal is removed before the image is written to, and comes
back, atomically, when all of it is there. A flipped bit anywhere, in the image or in the seal, is found.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from puna.artifacts import write_atomic

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(kw_only=True)
class Snapshot:
    """What one rank has to keep of a step: its tensors and a record of plain JSON values.

    `cut` names the tensors that are pieces of larger ones: name -> (shape of the whole, where the piece begins).
    """

    step: int
    generation: int = 0  # how many times the run was rolled back: a later generation supersedes later steps
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)
    cut: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, int]:
        """What orders states: the newest is the largest."""
        return self.generation, self.step


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What is known of an image, or of a part of a state on disk."""

    step: int
    generation: int
    size: int  # bytes of the image
    hash: str  # of the image
    record: dict[str, Any]
    part: int = 0
    parts: int = 1
    verified: bool = False  # the replicas of this part were compared and are equal

    @property
    def key(self) -> tuple[int, int]:
        """What orders states: the newest is the largest."""
        return self.generation, self.step

    def write(self, path: Path) -> None:
        """Put the seal at `path`, atomically."""
        text = json.dumps(self.__dict__, sort_keys=True)
        write_atomic(path, f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}\n")

    @classmethod
    def read(cls, path: Path) -> "Seal":
        """The seal at `path`. Raises `ValueError` if it is damaged, `OSError` if it cannot be read."""
        digest, _, text = path.read_bytes().partition(b"\n")
        if not text.endswith(b"\n") or xxhash.xxh3_128_hexdigest(text[:-1]).encode() != digest:
            raise ValueError(f"{path.name} does not match its own hash")
        return cls(**json.loads(text))


def header(snapshot: Snapshot) -> bytes:
    """The image's first bytes: the length, and the table of its tensors, padded to a multiple of 64 bytes."""
    cut = {name: [list(shape), list(start)] for name, (shape, start) in snapshot.cut.items()}
    table: dict[str, Any] = {"__metadata__": {"cut": json.dumps(cut)}}
    place = 0
    for name, tensor in snapshot.tensors.items():
        end = place + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def size(snapshot: Snapshot) -> int:
    """Bytes of the image."""
    return len(header(snapshot)) + sum(t.numel() * t.element_size() for t in snapshot.tensors.values())


def write(snapshot: Snapshot, memory: Tensor) -> None:
    """Lay the image into `memory` (uint8, at least `size` bytes)."""
    head = header(snapshot)
    memory[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
    place = len(head)
    for tensor in snapshot.tensors.values():
        end = place + tensor.numel() * tensor.element_size()
        memory[place:end].copy_(_bytes(tensor))
        place = end


def hash_of(snapshot: Snapshot) -> str:
    """The hash that the image of `snapshot` would have, without making it."""
    digest = xxhash.xxh3_128(header(snapshot))
    for tensor in snapshot.tensors.values():
        digest.update(memoryview(_bytes(tensor.detach().cpu()).numpy()))
    return digest.hexdigest()


def hash_memory(memory: Tensor) -> str:
    """The hash of an image that lies in memory."""
    return xxhash.xxh3_128_hexdigest(memoryview(memory.numpy()))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensors(memory: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an image in memory; they share its bytes. The image must have been checked against its seal."""
    length = int.from_bytes(bytes(memory[:8].tolist()), "little")
    table = json.loads(bytes(memory[8 : 8 + length].numpy()))
    kinds = {name: dtype for dtype, name in _NAMES.items()}
    for name, entry in table.items():
        if name != "__metadata__":
            start, end = (8 + length + place for place in entry["data_offsets"])
            yield name, _typed(memory[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])


def cut_of(memory: Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which tensors of an image are pieces, as in `Snapshot.cut`."""
    length = int.from_bytes(bytes(memory[:8].tolist()), "little")
    table = json.loads(bytes(memory[8 : 8 + length].numpy()))
    cut = json.loads(table["__metadata__"]["cut"])
    return {name: (tuple(shape), tuple(start)) for name, (shape, start) in cut.items()}


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    if raw.data_ptr() % dtype.itemsize:  # an odd tensor before this one: views need alignment
        raw = raw.clone()
    return raw.view(dtype)


def mapped(path: Path, length: int | None = None) -> Tensor:
    """The file at `path` as uint8 memory: for reading, or, with a `length`, for writing to a file of that size."""
    if length is None:
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    with path.open("ab") as file:
        file.truncate(length)
        os.posix_fallocate(file.fileno(), 0, length)  # a full disk is an error here, and a dead process later
    return torch.from_file(str(path), shared=True, size=length, dtype=torch.uint8)
