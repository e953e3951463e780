"""The matrix products and the attention of a training step on a CPU, in bfloat16 with sums in float32.

PyTorch's products (oneDNN) lay a weight out anew in every call, and its batched ones, which attention is made of, reach
less than half of what the processor can do and compute the half above the diagonal too. Ours read weights that were laid
out once per update (`Weight`), sum gradients in float32 right where they are kept, and pass through attention in blocks
whose scores never leave the cache: C++ in `native/products.h` and `native/training_attention.h`.

They are taken where the processor multiplies bfloat16 pairs and has no matrix unit for them (Intel's AMX, which oneDNN
uses); elsewhere the same functions are PyTorch's products. `tests/kernels/test_training_products.py` compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from puna.kernels import native
from puna.kernels import training_rows as rows

Implementation = Literal["reference", "native"]


def chosen() -> Implementation:
    """The faster way on this machine."""
    return "native" if rows.available() and native.chosen().endswith("BF16") and not _matrix_unit() else "reference"


@cache
def _matrix_unit() -> bool:
    return torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Weight:
    """A matrix (O, I) in bfloat16 that stands in for float32 masters, stacked: as it lies, or laid out for either use."""

    shape: tuple[int, int]
    plain: Tensor | None
    across: Tensor | None  # for x W^T
    along: Tensor | None  # for d W

    @classmethod
    def like(cls, masters: Sequence[Tensor], impl: Implementation) -> "Weight":
        """Room for `masters` (., I), one below the other; sizes are multiples of 16."""
        shape = (sum(len(m) for m in masters), masters[0].shape[1])
        made = [torch.empty(shape, dtype=torch.bfloat16) for _ in range(1 if impl == "reference" else 2)]
        return cls(shape, *made, None, None) if impl == "reference" else cls(shape, None, *made)

    @torch.no_grad()
    def refresh(self, masters: Sequence[Tensor]) -> "Weight":
        """Take the masters' values."""
        first = 0
        for master in masters:
            if self.plain is not None:
                self.plain[first : first + len(master)].copy_(master)
            else:
                master = master.detach().contiguous()
                rows.run("pack", master, first, len(master), *self.shape, self.across, self.along)
            first += len(master)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x W^T: (N, O) from (N, I)."""
        return x @ self.plain.t() if self.plain is not None else _product(x, self.across, self.shape[0])

    def backward(self, d: Tensor) -> Tensor:
        """d W: (N, I) from (N, O)."""
        return d @ self.plain if self.plain is not None else _product(d, self.along, self.shape[1])

    # A product and what is done to its rows next, while they are in the cache: as `training_rows` has it.

    def swiglu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate_up = x W^T (N, 2 F), and silu(gate) * up (N, F)."""
        if self.plain is not None:
            made = self.forward(x)
            return made, rows.swiglu(made)
        (N, D), F = x.shape, self.shape[0] // 2
        gate_up, gated = torch.empty(N, 2 * F, dtype=x.dtype), torch.empty(N, F, dtype=x.dtype)
        rows.run("product_swiglu", N, D, F, x, self.across, gate_up, gated)
        return gate_up, gated

    def swiglu_back_(self, d: Tensor, gate_up: Tensor) -> Tensor:
        """In place: `gate_up` becomes its gradient, for the gradient `d` of gated W^T."""
        if self.plain is not None:
            return rows.swiglu_back_(gate_up, self.backward(d))
        rows.run("product_swiglu_back", len(d), *self.shape, d, self.along, gate_up)
        return gate_up

    def norm(self, x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """`training_rows.norm` of `stream` + x W^T."""
        if self.plain is not None:
            return rows.norm(stream, self.forward(x), weight, eps)
        total, factors = torch.empty_like(stream), torch.empty(len(x))
        normed = torch.empty(stream.shape, dtype=x.dtype)
        size = (*x.shape, self.shape[0])
        rows.run("product_norm", *size, x, self.across, stream, weight, eps, total, normed, factors)
        return total, normed, factors

    def norm_back(
        self, d: Tensor, total: Tensor, weight: Tensor, factors: Tensor, dx: Tensor, dweight: Tensor
    ) -> Tensor:
        """`training_rows.norm_back` of d W."""
        if self.plain is not None:
            return rows.norm_back(self.backward(d), total, weight, factors, dx, dweight)
        rounded = torch.empty(total.shape, dtype=d.dtype)
        size = (len(d), *self.shape)
        rows.run("product_norm_back", *size, d, self.along, total, weight, factors, dx, rounded, dweight)
        return rounded


def _product(x: Tensor, packed: Tensor, columns: int) -> Tensor:
    y = torch.empty(len(x), columns, dtype=torch.bfloat16)
    rows.run("product", len(x), x.shape[1], columns, x, packed, y)
    return y


def outer(d: Tensor, x: Tensor, impl: Implementation, out: Tensor | None = None) -> Tensor:
    """d^T x: (O, I) float32 from (N, O) and (N, I), added to `out` if that is given."""
    if impl == "reference":
        made = d.t() @ x
        return made.float() if out is None else out.add_(made)
    adds = out is not None
    if out is None:
        out = torch.empty(d.shape[1], x.shape[1])
    rows.run("outer", len(x), *out.shape, d, x, int(adds), out)
    return out


@dataclass(frozen=True)
class Heads:
    """What attention is done among: B sequences of T tokens, H query heads sharing K key/value heads, of width E."""

    shape: tuple[int, int, int, int, int]  # B, T, H, K, E
    table: Tensor  # `training_rows.turns`
    positions: Tensor  # (B, T) int64
    starts: Tensor  # (B, T) int64: where in its row the document of each token begins


def attend(qkv: Tensor, heads: Heads, impl: Implementation) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What attention reads, (B T, H E), from `qkv` (B T, (H + 2 K) E) not yet turned, and what `attend_back` needs."""
    B, T, H, K, E = heads.shape
    if impl == "native":
        read, logs = torch.empty(B * T, H * E, dtype=torch.bfloat16), torch.empty(B, H, T)
        rows.run("attend", *heads.shape, qkv, *_places(heads), E**-0.5, read, logs, None, None)
        return read, (qkv, read, logs)
    q, k, v = rows.split(qkv, heads.shape, heads.table, heads.positions)
    scores = torch.bmm(q.view(B * K, -1, E), k.view(B * K, T, E).transpose(1, 2))
    weights = rows.softmax_(scores.view(B, H, T, T), heads.starts)
    read = torch.bmm(weights.view(B * K, -1, T), v.view(B * K, T, E)).view(B, H, T, E)
    return rows.heads_last(read), (q, k, v, weights)


def attend_back(d: Tensor, kept: tuple[Tensor, ...], heads: Heads, impl: Implementation) -> Tensor:
    """The gradient of qkv from that of what was read."""
    B, T, H, K, E = heads.shape
    if impl == "native":
        qkv, read, logs = kept
        dqkv = torch.empty_like(qkv)
        rows.run("attend", *heads.shape, qkv, *_places(heads), E**-0.5, read, logs, d, dqkv)
        return dqkv
    q, k, v, weights = kept
    d = rows.heads_first(d, (B, H, T, E)).view(B * K, -1, E)
    dv = torch.bmm(weights.view(B * K, -1, T).transpose(1, 2), d)
    scores = torch.bmm(d, v.view(B * K, T, E).transpose(1, 2)).view(B, H, T, T)
    scores = rows.softmax_back_(weights, scores, heads.starts).view(B * K, -1, T)
    dq, dk = torch.bmm(scores, k.view(B * K, T, E)), torch.bmm(scores.transpose(1, 2), q.view(B * K, -1, E))
    shaped = (dq.view(B, H, T, E), dk.view(B, K, T, E), dv.view(B, K, T, E))
    return rows.join(*shaped, heads.table, heads.positions)


def _places(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    return heads.table, heads.positions, heads.starts
