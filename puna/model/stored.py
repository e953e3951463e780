"""Weights that are still on disk: a model to be written in another format without being in memory.

Writers take a model or a `StoredModel` and ask `weights_of` for its weights, by Meta's names and in Meta's order of rows. Of a
model these are its parameters. Of a checkpoint each is read when it is its turn, a few megabytes at a time.
"""

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from puna.errors import PunaError
from puna.model.convert import hf_name, is_rotary, to_meta_rows
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig


class Readable(Protocol):
    """Weights by Hugging Face's names and in their order: `WeightFiles`, `MetaFiles` or `GgufFile`, open."""

    def pieces(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]: ...

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None: ...


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor: its shape, and its rows piece by piece, from the first to the last, each time `pieces` is called."""

    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The tensor in memory. One that is there already, in that type, is given as it is.

        Raises `PunaError` where there is no memory for it.
        """
        pieces = self.pieces()
        first = next(pieces)
        if first.shape == self.shape:
            return first.to("cpu", dtype)
        made, start = _room(self.shape, dtype), 0
        while first is not None:
            made[start : start + len(first)] = first
            start += len(first)
            first = next(pieces, None)
        return made


@dataclass(frozen=True)
class StoredModel:
    """An open checkpoint as something to be written. Raises `ArtifactError` unless exactly the model's tensors are there."""

    config: LlamaConfig
    files: Readable
    dtype: torch.dtype  # in which it is to be written if the writer has no opinion

    def __post_init__(self) -> None:
        self.files.expect({hf_name(name): shape for name, shape in self.config.shapes().items()})

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The rows of the tensor that Meta calls `name`."""
        head_dim = self.config.head_dim if is_rotary(name) else 1
        for _, piece in self.files.pieces(hf_name(name), head_dim):
            yield to_meta_rows(piece, head_dim) if is_rotary(name) else piece


def weights_of(model: Llama | StoredModel) -> dict[str, Weight]:
    """The weights by Meta's names; a tied output appears once, as the embedding."""
    if isinstance(model, StoredModel):
        return {n: Weight(s, lambda n=n: model.pieces(n)) for n, s in model.config.shapes().items()}
    parameters = ((name, weight.detach()) for name, weight in model.named_parameters())
    return {name: Weight(tuple(weight.shape), lambda w=weight: iter([w])) for name, weight in parameters}


def give_back_at_once() -> None:
    """From now on, memory of 128 KB or more goes back to the system when it is freed, and leaves no hole in the heap.

    So it is at first; but glibc raises its limit when such a block is freed, and then pieces of a megabyte that come and
    go, among tensors that stay, leave holes of a third of a model (M_MMAP_THRESHOLD in mallopt(3)). Elsewhere this does
    nothing.
    """
    mmap_threshold = -3
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(mmap_threshold, 128 << 10)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in pages of its own.

    In the heap, tensors that stay would stand between the pieces that come and go, which leaves holes: up to a third of a
    model that is gathered for one file. Raises `PunaError` where there is no memory for it.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
    except (OSError, MemoryError, OverflowError):
        hint = "convert on a larger machine"
        raise PunaError(f"there is no memory for a tensor of {size / 1e9:,.1f} GB", hint=hint) from None
