"""Weights to disk: the safetensors format (`tensorfile.py`), written one tensor after the other."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from puna.artifacts import replacing
from puna.model.dtypes import NAMES

_LINE = 64  # bytes

# A tensor to be written: its type and shape are known now, its values are made when it is their turn.
Pending = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]


def write_tensors(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically; equal tensors and metadata give equal bytes.

    Tensors of whole lines of 64 bytes come first, so that all of them begin at one, then wider types, so that every tensor
    is aligned to its type, and names in order.
    """
    order, text = _header({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}, metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            dtype, shape, make = tensors[name]
            values = make().detach().to("cpu", dtype).contiguous()
            if tuple(values.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {tuple(values.shape)}, {tuple(shape)} was announced")
            file.write(memoryview(values.reshape(-1).view(torch.uint8).numpy()))


def file_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    """The size of the file that `write_tensors` makes of tensors of these types and shapes."""
    _, text = _header(tensors, metadata)
    return 8 + len(text) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())


def _header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[list[str], bytes]:
    """The order of the tensors, and the header."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    order = sorted(tensors, key=lambda name: (sizes[name] % _LINE != 0, -tensors[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        end = offset + sizes[name]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return order, text + b" " * (-(8 + len(text)) % _LINE)


def pending(tensor: Tensor, dtype: torch.dtype | None = None) -> Pending:
    """A tensor that is there already, to be written as `dtype` (its own by default)."""
    return dtype or tensor.dtype, tuple(tensor.shape), lambda: tensor
