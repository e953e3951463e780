"""The kernels of a training step on a CPU that are no matrix products, over all rows at once: C++ in `native/training.h`.

PyTorch's operators read and write a whole matrix for each step of a formula; here a formula is one pass. Numbers that
matrix products read are bfloat16, the residual stream and all sums are float32. Work is shared out over the threads of
PyTorch's own OpenMP runtime. N rows of tokens, D width, F feed-forward width, H query heads, K key/value heads, E head
width. The formulas are those of the model (`puna/model/llama.py`); `tests/kernels` compares each with PyTorch's own.

All of D, F, E, V and T must be multiples of 16.
"""

import torch
from torch import Tensor

from puna.kernels import native

LANES = 16


def available() -> bool:
    """Whether the C++ library is here."""
    return native.available()


def run(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call kernel `name` on this many threads; tensors go as addresses, and must be contiguous."""
    given = [native.address(a) if isinstance(a, Tensor) else a for a in arguments]
    native.call(f"puna_train_{name}", torch.get_num_threads(), *given)


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total, normed, factors): total = x + delta (N, D) float32, normed = RMSNorm of it bfloat16, factors = 1 / rms (N,).

    `x` float32, `delta` bfloat16 or None, and then total is `x` itself.
    """
    N, D = x.shape
    total = x if delta is None else torch.empty_like(x)
    normed, factors = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(N)
    run("norm", N, D, x, delta, weight, eps, total, normed, factors)
    return total, normed, factors


def norm_back(d: Tensor, total: Tensor, weight: Tensor, factors: Tensor, dx: Tensor, dweight: Tensor) -> Tensor:
    """Add the gradient through `norm` of `d` (N, D) bfloat16 to `dx` (N, D) float32 and `dweight` (D,) float32.

    Returns the new `dx` in bfloat16.
    """
    N, D = d.shape
    rounded = torch.empty_like(d)
    run("norm_back", N, D, d, total, weight, factors, dx, rounded, dweight)
    return rounded


def turns(frequencies: Tensor, positions: int) -> Tensor:
    """What `split` turns heads by: (positions, 2 E) float32, cosines and then sines with the signs of a rotation."""
    angles = torch.arange(positions)[:, None] * frequencies
    sines = torch.stack((-angles.sin(), angles.sin()), -1).flatten(1)
    return torch.cat((angles.cos().repeat_interleave(2, 1), sines), 1).contiguous()


def split(qkv: Tensor, shape: tuple[int, int, int, int, int], table: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """q (B, H, T, E), turned and divided by sqrt(E), k (B, K, T, E), turned, and v, from `qkv` (B T, (H + 2 K) E).

    `shape` is B, T, H, K, E; `positions` (B, T) int64.
    """
    B, T, H, K, E = shape
    q, k, v = (torch.empty(B, heads, T, E, dtype=torch.bfloat16) for heads in (H, K, K))
    run("split", *shape, qkv, table, positions, E**-0.5, q, k, v)
    return q, k, v


def join(q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """The gradient of `split`: from those of q, k and v that of qkv (B T, (H + 2 K) E)."""
    B, H, T, E = q.shape
    K = k.shape[1]
    qkv = torch.empty(B * T, (H + 2 * K) * E, dtype=torch.bfloat16)
    run("join", B, T, H, K, E, q, k, v, table, positions, E**-0.5, qkv)
    return qkv


def heads_last(x: Tensor) -> Tensor:
    """(B, H, T, E) as (B T, H E)."""
    B, H, T, E = x.shape
    y = torch.empty(B * T, H * E, dtype=x.dtype)
    run("heads", B, T, H, E, x, 0, y)
    return y


def heads_first(y: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """(B T, H E) as `shape`, (B, H, T, E)."""
    B, H, T, E = shape
    x = torch.empty(shape, dtype=y.dtype)
    run("heads", B, T, H, E, y, 1, x)
    return x


def softmax_(scores: Tensor, starts: Tensor) -> Tensor:
    """In place: softmax of `scores` (B, H, T, T) bfloat16 over the places [starts[b, t], t] of each row, else zero."""
    B, H, T, S = scores.shape
    run("softmax", B, H, T, S, 0, starts, scores, None)
    return scores


def softmax_back_(weights: Tensor, d: Tensor, starts: Tensor) -> Tensor:
    """In place: `d`, the gradient of what `softmax_` made (`weights`), becomes that of the scores."""
    B, H, T, S = weights.shape
    run("softmax", B, H, T, S, 0, starts, weights, d)
    return d


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (N, F), from (N, 2 F)."""
    N, F = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(N, F, dtype=torch.bfloat16)
    run("swiglu", N, F, gate_up, out)
    return out


def swiglu_back_(gate_up: Tensor, d: Tensor) -> Tensor:
    """In place: `gate_up` becomes its gradient, for the gradient `d` (N, F) of `swiglu`."""
    run("swiglu_back", len(d), d.shape[1], gate_up, d)
    return gate_up


def token_losses_(logits: Tensor, targets: Tensor, weights: Tensor, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[target] (N,) float32, for `logits` (N, V) bfloat16.

    With `gradient`, `logits` become weight * (softmax(logits) - onehot(target)), in place.
    """
    losses = torch.empty(len(logits))
    run("loss", *logits.shape, logits, targets, weights, int(gradient), losses)
    return losses
