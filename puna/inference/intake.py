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
from puna.model.gguf.blocks import BLOCKS
from puna.model.llama import rope_frequencies
from puna.model.opening import open_checkpoint
from puna.model.sizes import LlamaConfig
from puna.quant.gguf import packed_from_gguf
from puna.quant.groups import Packed
from puna.quant.load import QuantisedFile

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
_PIECE_BYTES = 16 << 20


class Source(Protocol):
    """Where weights come from, by Meta's names."""

    config: LlamaConfig

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


class _Numbers:
    """A folder of Hugging Face's or Meta's, or what of a GGUF file is not quantised."""

    def __init__(self, config: LlamaConfig, weights, dtype: torch.dtype):
        self.config, self._weights, self._dtype = config, weights, dtype

    def vector(self, name: str) -> Tensor:
        return self._weights.read(hf_name(name)).float()

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix:
        kind = "bfloat16" if self._dtype == torch.bfloat16 else "float32"
        made = native.Matrix(kind, *self._weights.shape(hf_name(name)))
        turned = self.config.head_dim if is_rotary(name) else 1
        for start, rows in self._weights.pieces(hf_name(name), turned):
            made.floats(team, to_meta_rows(rows, turned) if turned > 1 else rows, start)
        return made


class _Gguf(_Numbers):
    """A GGUF file: rows are in Meta's order already."""

    def __init__(self, file: GgufFile, dtype: torch.dtype):
        super().__init__(file.config, file, dtype)
        self._file = file

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix:
        theirs = hf_name(name)
        kind = _BLOCK_TYPES[self._file.form(theirs)]
        if kind.parts is None:
            return super().matrix(name, team)
        rows, columns = self._file.shape(theirs)
        whole = kind.name in ("Q4_0", "Q8_0")
        step = max(1, (_PIECE_BYTES if whole else _PIECE_BYTES // 8) // (columns // kind.weights * kind.bytes))
        made = native.Matrix("int4" if kind.name == "Q4_0" else "int8", rows, columns, 32) if whole else None
        for start in range(0, rows, step):
            raw = self._file.packed(theirs, start, min(rows, start + step))
            if whole:
                made.blocks(team, raw, start)
                continue
            packed = packed_from_gguf(kind, raw)
            made = made or _empty(packed, rows)
            made.codes(team, packed.codes, packed.scales, packed.offsets, start)
        return made


class _Quantised:
    """A folder that we quantised."""

    def __init__(self, file: QuantisedFile, dtype: torch.dtype):
        self.config, self._file, self._dtype = file.config, file, dtype

    def vector(self, name: str) -> Tensor:
        return self._file.plain(name).float()

    def matrix(self, name: str, team: native.Borrowed) -> native.Matrix:
        weight = self._file.weight(name)
        return take(weight, team, self._dtype)


def take(weight: Tensor | Packed, team: native.Borrowed, dtype: torch.dtype) -> native.Matrix:
    """A matrix, numbers or codes, in native form; codes in groups that the kernels don't have become numbers."""
    if isinstance(weight, Packed):
        if weight.group_size % 16 == 0:
            made = _empty(weight, len(weight.codes))
            return made.codes(team, weight.codes, weight.scales, weight.offsets)
        weight = weight.expanded()
    kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return native.Matrix(kind, *weight.shape).floats(team, weight)


def _empty(like: Packed, rows: int) -> native.Matrix:
    return native.Matrix(f"int{like.bits}", rows, like.columns, like.group_size, like.offsets is not None)
