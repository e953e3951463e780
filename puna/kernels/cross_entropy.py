"""The loss over the vocabulary, without ever holding the logits of all tokens.

    loss = sum_i weight_i * (logsumexp(h_i W^T) - (h_i W^T)[target_i])
    d loss / d logits_i = weight_i * (softmax(h_i W^T) - onehot(target_i))

With V = 128K, the logits of 8K tokens are 4 GB in float32. Here tokens pass in chunks: each chunk's logits are made,
turned into the loss and at once into the gradients of its hidden states and of W, and forgotten. The backward pass then
only scales what is stored. Products run in autocast's dtype (without autocast, in that of `hidden`), sums in float32.
"""

import torch
from torch import Tensor

CHUNK = 1024  # tokens; larger chunks leave the cache, smaller ones starve the matrix product


def cross_entropy(hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of token losses, in nats: a float32 scalar.

    `hidden` (N, D), `output` (V, D) the output matrix, `targets` (N,) int64, `weights` (N,) float32; tokens of weight
    zero cost nothing and get no gradient. Divide by the weights' sum outside, over all ranks and micro-batches.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _ChunkedCrossEntropy.apply(hidden, output, targets, weights)


def token_log_probs(hidden: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each token, (N,) float32, differentiable; holds (N, V) logits, for short sequences."""
    logits = (hidden @ output.to(hidden.dtype).t()).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        counted = weights.nonzero()[:, 0]
        matrix = output.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden)
        grad_output = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in counted.split(CHUNK):
            h, target, weight = hidden[rows], targets[rows], weights[rows]
            logits = (h @ matrix.t()).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += ((normaliser - logits.gather(1, target[:, None]))[:, 0] * weight).sum()
            gradient = logits.sub_(normaliser).exp_()  # softmax
            gradient[torch.arange(len(rows), device=rows.device), target] -= 1
            gradient = gradient.mul_(weight[:, None]).to(hidden.dtype)
            grad_hidden[rows] = gradient @ matrix
            grad_output += gradient.t() @ h
        ctx.save_for_backward(grad_hidden, grad_output)
        ctx.output_dtype = output.dtype
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_hidden, grad_output = ctx.saved_tensors
        return grad_hidden * upstream.to(grad_hidden.dtype), (grad_output * upstream).to(ctx.output_dtype), None, None
