"""A checkpoint straight into the kernels' form: no PyTorch model between, a few rows in hand at a time.

Whatever the format, each matrix comes as numbers or as codes with scales, in Meta's row order:

    Hugging Face, Meta       numbers, kept in bfloat16 or float32 as is asked
    our quantised folders    laid out as they are read: the file's own pages, nothing is moved; else their codes
    GGUF                     its blocks as codes (`quant/gguf.py`); F32, F16, BF16 as numbers

Numbers are converted when `dtype` differs from how they are stored; codes are computed with as they are. bfloat16 is kept
in 12 bits (`packed.h`): the same numbers and the same results from fewer bytes. An output matrix of 8-bit codes is taken in
with its halves apart, so that it can be screened (`head.h`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from puna.kernels import native
from puna.model.convert import hf_name, is_rotary, meta_order, to_meta_rows
from puna.model.detect import kind_of
from puna.model.folder import WeightFiles
from puna.model.opening import open_checkpoint
from puna.model.rope import rope_frequencies
from puna.model.sizes import LlamaConfig
from puna.model.weights import Weights
from puna.quant.forms import UNQUANTISED
from puna.quant.layout import LAYOUT
from puna.quant.stored import QuantisedFile

if TYPE_CHECKING:
    from torch import Tensor

    from puna.model.gguf import GgufFile
    from puna.model.gguf.blocks import BlockType
    from puna.model.llama import Llama
    from puna.quant.groups import Packed

_MODULES = (
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
_AS_THEY_ARE = {"Q4_0": 4, "Q8_0": 8}  # bits
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "U8": "uint8"}
_PIECE_BYTES = 4 << 20
_PACKED_ROWS = 64  # are packed together


@dataclass(frozen=True)
class Numbers:
    """How a matrix of numbers is kept: bfloat16 or float32, and whether bfloat16 is packed, where that pays.

    Plain C++ unpacks byte by byte, which costs more than reading less saves.
    """

    dtype: str
    packed: bool = True

    def matrix(self, rows: int, columns: int) -> native.Matrix:
        if self.dtype != "bfloat16":
            return native.Matrix("float32", rows, columns)
        return native.Matrix("bfloat16", rows, columns, packed=self.packed and native.chosen() != native.PLAIN)


class Source(Protocol):
    """Where weights come from, by Meta's names."""

    config: LlamaConfig
    numbers: Numbers
    codes: bool  # whether matrices are mostly codes

    def vector(self, name: str) -> "np.ndarray | Tensor":
        """A norm's weights."""
        ...

    def matrix(self, name: str, team: native.Borrowed, *, split: bool = False) -> native.Matrix:
        """The matrix `name`; `split`: 8-bit codes with their halves apart."""
        ...


@contextmanager
def open_source(path: Path, numbers: Numbers) -> Iterator[Source]:
    """The weights of the checkpoint at `path`. Raises `ArtifactError`."""
    kind = kind_of(path)
    if kind == "quantised":
        with QuantisedFile(path) as file:
            yield _Quantised(file, numbers)
    elif kind == "gguf":
        from puna.model.gguf import GgufFile

        with GgufFile(path) as file:
            yield _Gguf(file.config, file, numbers)
    else:
        with open_checkpoint(path) as opened:
            form = _Folder if isinstance(opened.weights, WeightFiles) else _Numbers
            yield form(opened.config, opened.weights, numbers)


def read_network(source: Source, threads: int) -> native.Network:
    """All of a model's weights, taken in."""
    c = source.config
    sizes = (c.n_layers, c.dim, c.ffn_dim, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size)
    network = native.Network(sizes, c.norm_eps, rope_frequencies(c), threads)
    for index in range(c.n_layers):
        layer = f"layers.{index}."
        matrices = [source.matrix(f"{layer}{module}.weight", network.team) for module in _MODULES]
        norms = [source.vector(f"{layer}{norm}.weight") for norm in ("attention_norm", "ffn_norm")]
        network.layer(index, matrices, *norms)
    embedding = source.matrix("tok_embeddings.weight", network.team, split=c.tied)
    output = embedding if c.tied else source.matrix("output.weight", network.team, split=True)
    network.ends(embedding, output, source.vector("norm.weight"))
    return network


def in_memory(model: "Llama", packed: bool = True) -> Source:
    """The weights of a model, which stay where they are."""
    return _Modules(model, packed)


class _Numbers:
    """A folder of Meta's: its rows are spread over shards, and come in pieces."""

    codes = False

    def __init__(self, config: LlamaConfig, weights: Weights, numbers: Numbers):
        self.config, self.numbers, self._weights = config, numbers, weights

    def vector(self, name: str) -> "np.ndarray | Tensor":
        return self._weights.read(hf_name(name)).float()

    def matrix(self, name: str, team: native.Borrowed, *, split: bool = False) -> native.Matrix:
        made = self.numbers.matrix(*self._weights.shape(hf_name(name)))
        turned = self.config.head_dim if is_rotary(name) else 1
        for start, rows in self._weights.pieces(hf_name(name), math.lcm(turned, _PACKED_ROWS)):
            made.floats(team, to_meta_rows(rows, turned) if turned > 1 else rows, start)
        return made


class _Folder(_Numbers):
    """A folder of Hugging Face's: each matrix is one run of bytes."""

    _weights: WeightFiles

    def vector(self, name: str) -> np.ndarray:
        return self._weights.numbers(hf_name(name))

    def matrix(self, name: str, team: native.Borrowed, *, split: bool = False) -> native.Matrix:
        stored = _stored(self._weights, name, hf_name(name), self.config)
        if stored.dtype not in ("float32", "bfloat16", "float16"):
            return super().matrix(name, team)
        return self.numbers.matrix(*stored.shape).floats(team, stored)


class _Gguf(_Numbers):
    """A GGUF file: rows are in Meta's order already."""

    _weights: "GgufFile"

    def __init__(self, config: LlamaConfig, weights: "GgufFile", numbers: Numbers):
        super().__init__(config, weights, numbers)
        self.codes = self._type("layers.0.feed_forward.w1.weight").parts is not None

    def matrix(self, name: str, team: native.Borrowed, *, split: bool = False) -> native.Matrix:
        kind = self._type(name)
        rows, columns = self._weights.shape(hf_name(name))
        row_bytes = columns // kind.weights * kind.bytes
        if kind.parts is None:
            stored = native.Stored(*self._weights.place(hf_name(name)), (rows, columns), native.dtype_name(kind.plain))
            return self.numbers.matrix(rows, columns).floats(team, stored)
        if kind.name in _AS_THEY_ARE:
            blocks = native.Stored(*self._weights.place(hf_name(name)), (rows, row_bytes), "uint8")
            return native.Matrix(_codes(_AS_THEY_ARE[kind.name], split), rows, columns, 32).blocks(team, blocks)
        from puna.quant.gguf import packed_from_gguf

        made = None
        step = max(16, _PIECE_BYTES // row_bytes // 16 * 16)
        for start in range(0, rows, step):
            packed = packed_from_gguf(kind, self._weights.packed(hf_name(name), start, min(rows, start + step)))
            made = made or _empty(packed, rows, split)
            made.codes(team, packed.codes, packed.scales, packed.offsets, start)
        return made

    def _type(self, name: str) -> "BlockType":
        return self._weights.kind(hf_name(name))


class _Quantised:
    """A folder that we quantised."""

    codes = True

    def __init__(self, file: QuantisedFile, numbers: Numbers):
        self.config, self.numbers, self._file = file.config, numbers, file

    def vector(self, name: str) -> np.ndarray:
        return self._file.files.numbers(hf_name(name))

    def matrix(self, name: str, team: native.Borrowed, *, split: bool = False) -> native.Matrix:
        rows, columns = self.config.shapes()[name]
        if (laid := self._file.laid(name)) is not None:
            if native.layout() != LAYOUT:
                return _take(self._file.weight(name), team, self.numbers, split)
            form, place = self._file.quant.form_of(name), self._file.files.place(laid)
            kind = _codes(form.bits, self._file.split(name))
            return native.Matrix(kind, rows, columns, form.group_size, form.offset, laid=place)
        form, parts = self._file.parts(name)
        if form.bits == UNQUANTISED or form.group_size % 16:
            return _take(self._file.weight(name), team, self.numbers, split)
        stored = [_stored(self._file.files, name, part, self.config) for part in parts]
        made = native.Matrix(_codes(form.bits, split, form.offset), rows, columns, form.group_size, len(parts) > 2)
        return made.codes(team, *stored)


def _stored(files: WeightFiles, name: str, part: str, config: LlamaConfig) -> native.Stored:
    """Where a tensor of the matrix `name` lies in a folder that has Hugging Face's row order."""
    shape = files.shape(part)
    order = meta_order(shape[0], config.head_dim) if is_rotary(name) else None
    return native.Stored(*files.place(part), shape, _NAMES.get(files.form(part), ""), order)


class _Modules:
    """A model in memory, its matrices numbers or codes."""

    def __init__(self, model: "Llama", packed: bool):
        from puna.quant.modules import QuantLinear

        self.config, self._model = model.config, model
        self.numbers = Numbers(native.dtype_name(model.norm.weight.dtype), packed)
        self.codes = isinstance(model.layers[0].feed_forward.w1, QuantLinear)

    def vector(self, name: str) -> "Tensor":
        return self._model.get_parameter(name)

    def matrix(self, name: str, team: native.Borrowed, *, split: bool = False) -> native.Matrix:
        from puna.quant.modules import QuantEmbedding, QuantLinear

        module = self._model.get_submodule(name.removesuffix(".weight"))
        packed = isinstance(module, QuantLinear | QuantEmbedding)
        return _take(module.matrix.packed() if packed else module.weight, team, self.numbers, split)


def _take(weight: "Tensor | Packed", team: native.Borrowed, numbers: Numbers, split: bool) -> native.Matrix:
    """A matrix, numbers or codes, in native form; codes in groups that the kernels don't have become numbers."""
    from puna.quant.groups import Packed, dequantise_matrix

    if isinstance(weight, Packed):
        if weight.group_size % 16 == 0:
            made = _empty(weight, len(weight.codes), split)
            return made.codes(team, weight.codes, weight.scales, weight.offsets)
        weight = dequantise_matrix(weight)
    return numbers.matrix(*weight.shape).floats(team, weight)


def _codes(bits: int, split: bool, offsets: bool = False) -> str:
    return "split" if split and bits == 8 and not offsets else f"int{bits}"


def _empty(like: "Packed", rows: int, split: bool) -> native.Matrix:
    offsets = like.offsets is not None
    return native.Matrix(_codes(like.bits, split, offsets), rows, like.columns, like.group_size, offsets)
