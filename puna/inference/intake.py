"""A checkpoint straight into the kernels' form: no PyTorch model between, a few megabytes in hand at a time.

Whatever the format, each matrix comes as numbers or as codes with scales, in Meta's row order:

    Hugging Face, Meta       numbers, kept in bfloat16 or float32 as is asked
    our quantised folders    their codes
    GGUF                     its blocks as codes (`quant/gguf.py`); F32, F16, BF16 as numbers

Numbers are converted when `dtype` differs from how they are stored; codes are computed with as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from puna.kernels import native
from puna.model.convert import hf_name, is_rotary, to_meta_rows
from puna.model.detect import kind_of
from puna.model.gguf import GgufFile
from puna.model.gguf.blocks import BLOCKS, BlockType
from puna.model.llama import Llama, rope_frequencies
from puna.model.opening import open_checkpoint
from puna.model.sizes import LlamaConfig
from puna.model.weights import Weights
from puna.quant.gguf import packed_from_gguf
from puna.quant.groups import Packed, dequantise_matrix
from puna.quant.load import QuantisedFile
from puna.quant.modules import QuantEmbedding, QuantLinear

_MODULES = (
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
_BLOCK_TYPES = {kind.name: kind for kind in BLOCKS.values()}
_PIECE_BYTES = 4 << 20


class Source(Protocol):
    """Where weights come from, by Meta's names."""

    config: LlamaConfig
    dtype: torch.dtype  # what numbers come as
    codes: bool  # whether matrices are mostly codes

    def vector(self, name: str) -> Tensor:
        """A norm's weights."""
        ...

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix: ...


@contextmanager
def open_source(path: Path, dtype: torch.dtype) -> Iterator[Source]:
    """The weights of the checkpoint at `path`; those that are numbers come as `dtype`. Raises `ArtifactError`."""
    kind = kind_of(path)
    if kind == "quantised":
        with QuantisedFile(path) as file:
            yield _Quantised(file, dtype)
    elif kind == "gguf":
        with GgufFile(path) as file:
            yield _Gguf(file, dtype)
    else:
        with open_checkpoint(path) as opened:
            yield _Numbers(opened.config, opened.weights, dtype)


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
    embedding = source.matrix("tok_embeddings.weight", network.team)
    output = embedding if c.tied else source.matrix("output.weight", network.team)
    network.ends(embedding, output, source.vector("norm.weight"))
    return network


def in_memory(model: Llama) -> Source:
    """The weights of a model, which stay where they are."""
    return _Modules(model)


class _Numbers:
    """A folder of Hugging Face's or Meta's, or what of a GGUF file is not quantised."""

    codes = False

    def __init__(self, config: LlamaConfig, weights: Weights, dtype: torch.dtype):
        self.config, self.dtype, self._weights = config, dtype, weights

    def vector(self, name: str) -> Tensor:
        return self._weights.read(hf_name(name)).float()

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix:
        made = native.Matrix(_kind(self.dtype), *self._weights.shape(hf_name(name)))
        turned = self.config.head_dim if is_rotary(name) else 1
        for start, rows in self._weights.pieces(hf_name(name), turned):
            made.floats(team, to_meta_rows(rows, turned) if turned > 1 else rows, start)
        return made


class _Gguf(_Numbers):
    """A GGUF file: rows are in Meta's order already."""

    def __init__(self, file: GgufFile, dtype: torch.dtype):
        super().__init__(file.config, file, dtype)
        self.codes = self._type("layers.0.feed_forward.w1.weight").parts is not None

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix:
        kind = self._type(name)
        if kind.parts is None:
            return super().matrix(name, team)
        rows, columns = self._weights.shape(hf_name(name))
        as_they_are = {"Q4_0": "int4", "Q8_0": "int8"}.get(kind.name)
        made = native.Matrix(as_they_are, rows, columns, 32) if as_they_are else None
        for start, raw in self._raw(name, rows, columns // kind.weights * kind.bytes):
            if as_they_are:
                made.blocks(team, raw, start)
                continue
            packed = packed_from_gguf(kind, raw)
            made = made or _empty(packed, rows)
            made.codes(team, packed.codes, packed.scales, packed.offsets, start)
        return made

    def _raw(self, name: str, rows: int, row_bytes: int) -> Iterator[tuple[int, Tensor]]:
        step = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, rows, step):
            yield start, self._weights.packed(hf_name(name), start, min(rows, start + step))

    def _type(self, name: str) -> BlockType:
        return _BLOCK_TYPES[self._weights.form(hf_name(name))]


class _Quantised:
    """A folder that we quantised."""

    codes = True

    def __init__(self, file: QuantisedFile, dtype: torch.dtype):
        self.config, self.dtype, self._file = file.config, dtype, file

    def vector(self, name: str) -> Tensor:
        return self._file.weight(name).float()

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix:
        return _take(self._file.weight(name), team, self.dtype)


class _Modules:
    """A model in memory, its matrices numbers or codes."""

    def __init__(self, model: Llama):
        self.config, self._model = model.config, model
        self.dtype = model.norm.weight.dtype
        self.codes = isinstance(model.layers[0].feed_forward.w1, QuantLinear)

    def vector(self, name: str) -> Tensor:
        return self._model.get_parameter(name)

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix:
        module = self._model.get_submodule(name.removesuffix(".weight"))
        packed = isinstance(module, QuantLinear | QuantEmbedding)
        return _take(module.matrix.packed() if packed else module.weight, team, self.dtype)


def _take(weight: Tensor | Packed, team: native.Borrowed, dtype: torch.dtype) -> native.Matrix:
    """A matrix, numbers or codes, in native form; codes in groups that the kernels don't have become numbers."""
    if isinstance(weight, Packed):
        if weight.group_size % 16 == 0:
            made = _empty(weight, len(weight.codes))
            return made.codes(team, weight.codes, weight.scales, weight.offsets)
        weight = dequantise_matrix(weight)
    return native.Matrix(_kind(dtype), *weight.shape).floats(team, weight)


def _kind(dtype: torch.dtype) -> str:
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def _empty(like: Packed, rows: int) -> native.Matrix:
    return native.Matrix(f"int{like.bits}", rows, like.columns, like.group_size, like.offsets is not None)
