"""The model's matrices, kept as integers.

A `QuantLinear` or `QuantEmbedding` stands where the model has an `nn.Linear` or `nn.Embedding`. Weights are expanded to
the activations' type when they are used, one matrix at a time, and forgotten: memory stays that of the integers. An
embedding expands the rows it looks up, no more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.quant.groups import Packed, dequantise_matrix


class QuantMatrix(nn.Module):
    """A packed matrix; `dtype` is what it is expanded to."""

    def __init__(self, packed: Packed, dtype: torch.dtype):
        super().__init__()
        self.form, self.dtype = (packed.columns, packed.bits, packed.group_size), dtype
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("offsets", packed.offsets)

    def widen(self) -> None:
        """Hold codes of 6 bits as codes of 8, for kernels that only know those and 4."""
        wide = self.packed().widened()
        self.form, self.codes = (wide.columns, wide.bits, wide.group_size), wide.codes

    def packed(self, rows: Tensor | slice = slice(None)) -> Packed:
        """`rows` (all by default) as codes."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return Packed(self.codes[rows], self.scales[rows], *self.form, offsets)

    def expanded(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The weights of `rows` (all by default) as numbers."""
        return dequantise_matrix(self.packed(rows), self.dtype)


class QuantLinear(nn.Module):
    """x W^T for a quantised W."""

    def __init__(self, matrix: QuantMatrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.expanded())


class QuantEmbedding(nn.Module):
    """Rows of a quantised matrix."""

    def __init__(self, matrix: QuantMatrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix.expanded(tokens.reshape(-1)).unflatten(0, tokens.shape)
