"""The loss over the vocabulary, without ever holding the logits of all tokens.

    loss = sum_i weight_i * (logsumexp(h_i W^T) - (h_i W^T)[target_i])
    d loss / d logits_i = weight_i * (softmax(h_i W^T) - onehot(target_i))

With V = 128K, the logits of 8K tokens are 4 GB in float32. Here tokens pass in chunks: each chunk's logits are made,
turned into the loss and at once into the gradients of its hidden states and of W, and forgotten. The backward pass then
only scales what is stored. Products run in autocast's dtype (without autocast, in that of `hidden`), sums in float32.

On a CPU, bfloat16 logits become their own gradients in one C++ pass (`training_rows.token_losses_`); `reference` does it
with PyTorch's operators.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from puna.kernels import training_rows

CHUNK = 1024  # tokens; larger chunks leave the cache, smaller ones starve the matrix product
LOGITS = 1 << 25  # for the C++ pass, which does not mind: as many tokens as have so many logits, if that is more

Implementation = Literal["auto", "reference", "native"]
# Logits (n, V), targets (n,), weights (n,) -> the losses (n,) float32 and the weighted gradient of the logits (n, V).
LossesOf = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(
    hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor, *, impl: Implementation = "auto"
) -> Tensor:
    """The weighted sum of token losses, in nats: a float32 scalar.

    `hidden` (N, D), `output` (V, D) the output matrix, `targets` (N,) int64, `weights` (N,) float32; tokens of weight
    zero cost nothing and get no gradient. Divide by the weights' sum outside, over all ranks and micro-batches.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if impl == "auto":
        fits = hidden.dtype == torch.bfloat16 and not hidden.is_cuda and len(output) % training_rows.LANES == 0
        impl = "native" if fits and training_rows.available() else "reference"
    return _ChunkedCrossEntropy.apply(hidden, output, targets, weights, impl == "native")


def token_log_probs(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each token, (N,) float32, differentiable; holds (N, V) logits, for short sequences."""
    logits = (hidden @ output.to(hidden.dtype).t()).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor, native: bool) -> Tensor:
        chunk = max(CHUNK, LOGITS // len(output)) if native else CHUNK
        return by_chunks(ctx, hidden, output, targets, weights, _native_losses if native else _losses, chunk)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *scaled(ctx, upstream), None, None, None


def by_chunks(
    ctx, hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor, losses_of: LossesOf, chunk: int = CHUNK
) -> Tensor:
    """The forward pass of an autograd function: the weighted sum of losses, both gradients kept for `scaled`.

    `losses_of` gives each token's loss and the weighted gradient of its logits; it may write over the logits.
    """
    matrix = output.to(hidden.dtype)
    grad_hidden = torch.zeros_like(hidden)
    grad_output = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows in weights.nonzero()[:, 0].split(chunk):
        h, weight = hidden[rows], weights[rows]
        losses, gradient = losses_of(h @ matrix.t(), targets[rows], weight)
        total += (losses * weight).sum()
        grad_hidden[rows] = gradient @ matrix
        grad_output += gradient.t() @ h
    ctx.save_for_backward(grad_hidden, grad_output)
    ctx.output_dtype = output.dtype
    return total


def scaled(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The backward pass of what `by_chunks` was the forward of: the gradients of hidden states and output matrix."""
    grad_hidden, grad_output = ctx.saved_tensors
    return grad_hidden * upstream.to(grad_hidden.dtype), (grad_output * upstream).to(ctx.output_dtype)


def _losses(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each token, (N,) float32, and the weighted gradient of the logits (N, V)."""
    dtype, logits = logits.dtype, logits.float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    losses = (normaliser - logits.gather(1, targets[:, None]))[:, 0]
    gradient = logits.sub_(normaliser).exp_()  # softmax
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses, gradient.mul_(weights[:, None]).to(dtype)


def _native_losses(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same, the gradient in the memory of the logits."""
    losses = training_rows.token_losses_(logits, targets.contiguous(), weights.contiguous(), gradient=True)
    return losses, logits
