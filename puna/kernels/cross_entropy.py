"""The loss over the vocabulary, without ever holding the logits of all tokens.

    loss = sum_i weight_i * (logsumexp(h_i W^T) - (h_i W^T)[target_i])
    d loss / d logits_i = weight_i * (softmax(h_i W^T) - onehot(target_i))

With V = 128K, the logits of 8K tokens are 4 GB in float32. Here tokens pass in chunks: each chunk's logits are made,
turned into the loss and at once into the gradients of its hidden states and of W, and forgotten. The backward pass then
only scales what is stored. Products run in autocast's dtype (without autocast, in that of `hidden`), sums in float32.

On a CPU, bfloat16 logits become their own gradients in one C++ pass (`training_rows.token_losses_`), between products
of our own where those are faster (`training_products`); `reference` does it with PyTorch's operators.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from puna.kernels import training_products, training_rows
from puna.kernels.training_products import Weight, outer

CHUNK = 1024  # tokens; larger chunks leave the cache, smaller ones starve the matrix product
LOGITS = 1 << 24  # for the C++ pass: as many tokens as have so many logits (32 MB),
FEWEST = 256  # but not fewer than this

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
        if not native:
            return by_chunks(ctx, hidden, output, targets, weights, _losses)
        impl = training_products.chosen() if output.shape[1] % training_rows.LANES == 0 else "reference"
        chunk = max(FEWEST, LOGITS // len(output))
        return by_chunks(ctx, hidden, output, targets, weights, _native_losses, chunk, impl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        return *scaled(ctx, upstream), None, None, None


def by_chunks(
    ctx,
    hidden: Tensor,
    output: Tensor,
    targets: Tensor,
    weights: Tensor,
    losses_of: LossesOf,
    chunk: int = CHUNK,
    impl: training_products.Implementation = "reference",
) -> Tensor:
    """The forward pass of an autograd function: the weighted sum of losses, both gradients kept for `scaled`.

    `losses_of` gives each token's loss and the weighted gradient of its logits; it may write over the logits. `impl` says
    whose the products are.
    """
    if impl == "native":
        matrix = Weight.like([output], impl).refresh([output])
    else:
        matrix = Weight(tuple(output.shape), output.to(hidden.dtype), None, None)
    grad_hidden, grad_output = torch.zeros_like(hidden), None
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows in weights.nonzero()[:, 0].split(chunk):
        h, weight = hidden[rows], weights[rows]
        losses, gradient = losses_of(matrix.forward(h), targets[rows], weight)
        total += (losses * weight).sum()
        grad_hidden[rows] = matrix.backward(gradient)
        grad_output = outer(gradient, h, impl, grad_output)
    if grad_output is None:  # nothing counts
        grad_output = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    ctx.gradients, ctx.output_dtype = (grad_hidden, grad_output), output.dtype
    return total


def scaled(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The backward pass of what `by_chunks` was the forward of: the gradients of hidden states and output matrix."""
    (grad_hidden, grad_output), ctx.gradients = ctx.gradients, None  # scaled in place, so there is no second time
    return grad_hidden.mul_(upstream.to(grad_hidden.dtype)), grad_output.mul_(upstream).to(ctx.output_dtype)


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
