"""The C++ kernels, called through ctypes: one shared library with plain functions, no Python or PyTorch inside it.

    Team        threads that work together
    Matrix      a weight matrix as the kernels read it (matrix.h): float32, bfloat16, or codes of 8, 6 or 4 bits
    Cache       blocks of keys and values: float32, bfloat16 or 8-bit codes
    Network     a Llama of such matrices: `forward` is one call for all its layers

Whether there is a library, and which instructions it uses, is `library.py`'s.

Arrays are numpy's or PyTorch's, and what comes back is of the same make; PyTorch is not imported for it. (numpy has no
bfloat16: such numbers come as PyTorch's, or are read from a file.)
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from puna.kernels.native.library import (  # the names of one module, whose half is there
    PLAIN,
    address,
    available,
    call,
    choose,
    chosen,
    dtype_name,
    instructions,
    layout,
    why_not,
)

if TYPE_CHECKING:
    from torch import Tensor

    from puna.kernels.native.library import Array

__all__ = [
    "BLOCK_TOKENS", "PARTS", "PLAIN", "Borrowed", "Cache", "Matrix", "Network", "Stored", "Team", "address", "available",
    "call", "choose", "chosen", "dtype_name", "encode", "gate", "instructions", "layout", "rms_norm", "rotate", "top", "why_not",
]  # fmt: skip

BLOCK_TOKENS = 16
PARTS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
_KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "int6": 4, "split": 5}
_SOURCES = {"float32": 0, "bfloat16": 1, "float16": 2}


def _whole(array: Array) -> Array:
    """The same numbers without gaps."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array.detach().contiguous()


def _floats(array: Array) -> Array:
    """The numbers as float32, without gaps."""
    return _whole(array.astype(np.float32, copy=False) if isinstance(array, np.ndarray) else array.detach().float())


def _new(like: Array, *shape: int, dtype: str = "float32") -> Array:
    """Room of the same make as `like`."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype))


class _Owned:
    """Something that lives in the library, freed with the Python object."""

    _free = ""

    def __init__(self, pointer: int | None, what: str):
        if not pointer:
            raise MemoryError(f"no memory for {what}")
        self.pointer = pointer

    def __del__(self) -> None:
        if pointer := getattr(self, "pointer", None):
            call(self._free, pointer)
            self.pointer = None


class Team(_Owned):
    """`threads` threads, the caller's among them."""

    _free = "puna_team_free"

    def __init__(self, threads: int):
        super().__init__(call("puna_team", threads), "threads")


@dataclass(frozen=True)
class Stored:
    """A matrix's rows in an open file, read by the team's threads themselves: no copy of it in between.

    Row r of the matrix is row `order`[r] in the file; None is the file's own order.
    """

    file: int  # a descriptor, open for reading
    begin: int  # bytes before row 0
    shape: tuple[int, int]
    dtype: str
    order: np.ndarray | None = None  # (rows,) int64


class Matrix(_Owned):
    """Weights (rows, columns) of one kind: "float32", "bfloat16", "int8", "int6" or "int4"; integers with a group's size.

    `floats` or `codes` fill it, whole or piece by piece. A bfloat16 one may be `packed`: the same numbers, and the same
    bits in every product, in three quarters of the memory (packed.h); its pieces begin at multiples of 64 rows.
    "split" is int8 whose upper and lower halves lie apart, so that an output matrix can be screened by the upper ones
    (head.h); it has no offsets.

    `laid` is a descriptor and a place in that file where integers lie as they would in memory (`quant/layout.py`): the
    matrix is then those pages, if the place is a multiple of 64, read when they are needed, and nothing fills it.
    """

    _free = "puna_matrix_free"

    def __init__(
        self,
        kind: str,
        rows: int,
        columns: int,
        group: int = 0,
        offsets: bool = False,
        packed: bool = False,
        laid: tuple[int, int] | None = None,
    ):
        assert kind == "bfloat16" or not packed
        self.kind, self.rows, self.columns, self.group, self.packed = kind, rows, columns, group, packed
        if laid is None:
            pointer = call("puna_matrix", _KINDS[kind], int(offsets), int(packed), rows, columns, group)
        else:
            assert group % 16 == 0
            pointer = call("puna_matrix_laid", _KINDS[kind], int(offsets), rows, columns, group, *laid)
        super().__init__(pointer, f"a matrix of {rows:,} x {columns:,}")

    @property
    def bytes(self) -> int:
        return call("puna_matrix_bytes", self.pointer)

    @property
    def upper_bytes(self) -> int:
        """Of what screening reads of it: of a split matrix the upper halves and all scales, else everything."""
        lower = (
            -(-self.rows // 64) * 64 * -(-self.columns // self.group) * self.group // 2 if self.kind == "split" else 0
        )
        return self.bytes - lower

    def floats(self, team: Team | Borrowed, weight: Array | Stored, first: int = 0) -> Matrix:
        """Take `weight` (n, columns), of any float type, as rows `first`, …; converted if need be."""
        if not isinstance(weight, Stored) and dtype_name(weight.dtype) not in _SOURCES:
            weight = _floats(weight)
        return self._fill("floats", team, weight, self.columns, first, _SOURCES[dtype_name(weight.dtype)])

    def codes(
        self,
        team: Team | Borrowed,
        codes: Array | Stored,
        scales: Array | Stored,
        offsets: Array | Stored | None = None,
        first: int = 0,
    ) -> Matrix:
        """Take quantised rows: signed codes (n, columns) int8, two to a byte (n, columns / 2) uint8, or 16 in 12 bytes
        (n, columns * 12 / 16) uint8, as `quant.groups` packs them; scales and offsets (n, groups) float16."""
        halves, sixteens = -(-self.columns // 2), -(-self.columns // 16)
        width = {"int6": 12 * sixteens, "int4": halves}.get(self.kind, self.columns)
        self._fill("codes", team, codes, width, first)
        groups = -(-self.columns // self.group)
        for kind, numbers in enumerate((scales, offsets)):
            if numbers is not None:
                assert dtype_name(numbers.dtype) == "float16"
                self._fill("scales", team, numbers, groups, first, kind)
        return self

    def blocks(self, team: Team | Borrowed, data: Array | Stored, first: int = 0) -> Matrix:
        """Take rows of GGUF's Q4_0 or Q8_0 blocks as they lie in the file, (n, bytes of a row) uint8."""
        assert self.group == 32
        return self._fill("blocks", team, data, self.columns // 32 * (18 if self.kind == "int4" else 34), first)

    def _fill(
        self, what: str, team: Team | Borrowed, data: Array | Stored, width: int, first: int, *more: int
    ) -> Matrix:
        rows, columns = data.shape
        assert columns == width and first % (64 if self.packed else 16) == 0 and first + rows <= self.rows
        order = None
        if isinstance(data, Stored):
            source = (None, data.file, data.begin)
            order = data.order
        else:
            data = _whole(data)
            source = (address(data), 0, 0)
        ordered = () if what == "blocks" else (address(order, "int64"),)
        if not call(f"puna_matrix_{what}", team.pointer, self.pointer, first, rows, *source, *ordered, *more):
            raise OSError("the file ended while its weights were read")
        return self

    def multiply(self, team: Team | Borrowed, x: Array) -> Array:
        """x W^T, (n, rows) float32, for x (n, columns) float32."""
        x, y = _whole(x), _new(x, len(x), self.rows)
        call("puna_multiply", team.pointer, self.pointer, address(x, "float32"), len(x), address(y))
        return y

    def rows_of(self, indices: Array) -> Array:
        """The rows `indices` (n,) int64 as numbers, (n, columns) float32."""
        out = _new(indices, len(indices), self.columns)
        call("puna_embed", self.pointer, address(_whole(indices), "int64"), len(indices), address(out))
        return out


class Cache(_Owned):
    """Keys and values of `layers` layers in blocks of 16 positions; memory is taken when a block is first written."""

    _free = "puna_cache_free"

    def __init__(self, kind: str, layers: int, blocks: int, heads: int, width: int):
        self.layers, self.blocks, self.heads, self.width = layers, blocks, heads, width
        pointer = call("puna_cache", _KINDS[kind], layers, blocks, heads, width)
        super().__init__(pointer, f"a cache of {blocks:,} blocks")

    @property
    def block_bytes(self) -> int:
        return call("puna_cache_block_bytes", self.pointer)

    def copy(self, source: int, target: int) -> None:
        call("puna_cache_copy", self.pointer, source, target)

    def forget(self) -> None:
        """Give all memory back to the system; what was in it is gone."""
        call("puna_cache_forget", self.pointer)

    def write(self, layer: int, blocks: Array, start: int, k: Array, v: Array) -> None:
        """Keys and values (n, heads, width) float32 of the positions from `start` of a sequence with these blocks."""
        k, v = _whole(k), _whole(v)
        at = (address(k, "float32"), address(v, "float32"))
        call("puna_cache_write", self.pointer, layer, address(blocks, "int32"), start, len(k), *at)

    def attend(self, team: Team | Borrowed, layer: int, blocks: Array, start: int, q: Array) -> Array:
        """What queries (n, H, width) float32 at positions `start`, … read, of the positions up to their own."""
        q, out = _whole(q), _new(q, *q.shape)
        heads = q.shape[1]
        at = (address(blocks, "int32"), start, len(q), heads, address(q, "float32"), address(out))
        call("puna_attend", team.pointer, self.pointer, layer, *at)
        return out


class Borrowed:
    """The team of a network."""

    def __init__(self, pointer: int):
        self.pointer = pointer


class Network(_Owned):
    """A Llama's shape and its matrices. `layer` and `ends` fill it, then `forward` may be called.

    `sizes`: layers, dim, feed-forward, heads, key/value heads, head width, vocabulary. `frequencies` (head width / 2).
    """

    _free = "puna_model_free"

    def __init__(self, sizes: Sequence[int], eps: float, frequencies: Array, threads: int):
        self.sizes = tuple(sizes)
        frequencies = _floats(frequencies)
        super().__init__(call("puna_model", (c_int64 * 7)(*sizes), eps, address(frequencies), threads), "a model")
        self.team = Borrowed(call("puna_model_team", self.pointer))
        self._kept: list[object] = []  # the matrices, which the library only points to

    def layer(self, index: int, matrices: Sequence[Matrix], norm1: Array, norm2: Array) -> None:
        """Layer `index`: its matrices in the order of `PARTS`, its norms' weights float32."""
        self._kept += matrices
        parts = (c_void_p * len(PARTS))(*(m.pointer for m in matrices))
        norms = [_floats(norm) for norm in (norm1, norm2)]
        call("puna_model_layer", self.pointer, index, parts, *map(address, norms))

    def ends(self, embedding: Matrix, output: Matrix, norm: Array) -> None:
        """The embedding, the output matrix (the same object where they are tied) and the last norm."""
        self._kept += [embedding, output]
        looked_up = 0 if embedding is output else embedding.bytes
        self._unread = looked_up + output.bytes - output.upper_bytes
        norm = _floats(norm)
        call("puna_model_ends", self.pointer, embedding.pointer, output.pointer, address(norm))

    @property
    def bytes(self) -> int:
        """Of all matrices."""
        return sum(m.bytes for m in {id(m): m for m in self._kept if isinstance(m, Matrix)}.values())

    @property
    def read_bytes(self) -> int:
        """Of the matrices that a screened token is multiplied by: of a split output matrix the upper halves (the blocks that
        are read again are not counted), of an embedding of its own, which gives a row, nothing."""
        return self.bytes - self._unread

    def adapter(self) -> int:
        """A new low-rank adapter that changes nothing yet; returns its number."""
        return call("puna_model_adapter", self.pointer)

    def adapt(self, adapter: int, layer: int, part: str, down: Array, up: Array) -> None:
        """Add up (outputs, rank) times down (rank, inputs) to a matrix of a layer for who asks for the adapter."""
        down, up = _floats(down), _floats(up)
        sizes = (len(down), down.shape[1], len(up))
        call("puna_model_adapt", self.pointer, adapter, layer, PARTS.index(part), *sizes, address(down), address(up))

    def forward(
        self,
        cache: Cache,
        tokens: np.ndarray,
        spans: np.ndarray,
        blocks: np.ndarray,
        *,
        hidden: bool = False,
    ) -> np.ndarray:
        """Read new tokens of some sequences; the logits (or last states) after each span's last `wanted` tokens.

        `tokens` (n,) int32 of all spans, one after the other. `spans` (6, s) int64: how many tokens, how many are in
        the cache before, wanted, adapter or -1, where its blocks begin in `blocks` (m,) int32, and whether it is enough
        that the largest logits are exact.
        """
        width = self.sizes[1] if hidden else self.sizes[6]
        out = np.empty((int(spans[2].sum()), width), np.float32)
        rows = [address(row, "int64") for row in spans]
        at = (*rows, address(blocks, "int32"), address(tokens, "int32"), address(out), int(hidden))
        call("puna_forward", self.pointer, cache.pointer, spans.shape[1], *at)
        return out


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight for rows of x (n, columns), float32."""
    x, weight, y = _whole(x), _whole(weight), _new(x, *x.shape)
    call("puna_rms_norm", address(x), address(weight), eps, x.shape[1], len(x), address(y))
    return y


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs (2i, 2i+1) of heads x (n, E) by (cos, sin) in turns (n, E)."""
    x, turns = x.clone().contiguous(), turns.contiguous()
    call("puna_rotate", address(x), address(turns), x.shape[1], len(x))
    return x


def gate(y: Tensor, x: Tensor) -> Tensor:
    """silu(y) * x; both hold a multiple of 16 numbers."""
    y, x = y.clone().contiguous(), x.contiguous()
    call("puna_gate", address(y), address(x), y.numel())
    return y


def encode(team: Team | Borrowed, weights: Tensor, code: int, width: int, size: int) -> tuple[Tensor, float]:
    """Blocks of GGUF's type `code`, uint8 (blocks, `size`), of `width` weights each, and the size of the largest weight.

    That is infinite where a weight is not finite. `weights` are of a float type that a matrix takes.
    """
    weights = _whole(weights)
    blocks = _new(weights, weights.numel() // width, size, dtype="uint8")
    source = _SOURCES[dtype_name(weights.dtype)]
    return blocks, call("puna_encode", team.pointer, code, address(weights), source, len(blocks), address(blocks))


def top(team: Team | Borrowed, logits: Array, k: int) -> tuple[Array, Array, Array]:
    """The k largest of each row of logits (n, V) float32, descending, their indices (int32), and logsumexp of the row."""
    logits = _whole(logits)
    n, V = logits.shape
    values, indices, sums = _new(logits, n, k), _new(logits, n, k, dtype="int32"), _new(logits, n)
    at = (address(logits, "float32"), n, V, k, address(values), address(indices), address(sums))
    call("puna_top", team.pointer, *at)
    return values, indices, sums
