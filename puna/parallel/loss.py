"""The loss when the output matrix is cut along the vocabulary: no rank holds the logits of all tokens, nor of all words.

Each of `ranks` ranks has V / ranks rows of the output matrix. Per chunk of tokens, each computes its part of the logits; the
largest logit, the sum of exponentials and the target's logit are put together by two small reductions, after which
each rank has its part of the softmax, hence of the gradients (`kernels/cross_entropy.py` is the case of one rank).
The gradient of the hidden states is a partial sum, left to the caller to add up over the ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from puna.kernels.cross_entropy import by_chunks, scaled


def vocabulary_parallel_cross_entropy(
    hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """The weighted sum of token losses in nats, the same float32 scalar on every rank.

    `hidden` (N, D) on every rank the same, `output` (V / ranks, D) this rank's rows, `targets` (N,), `weights` (N,).
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _CrossEntropy.apply(hidden, output, targets, weights, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor, group) -> Tensor:
        first = dist.get_rank(group) * len(output)

        def losses_of(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            loss, gradient = _softmax_part(logits.float(), target - first, group)
            return loss, gradient.mul_(weight[:, None]).to(logits.dtype)

        return by_chunks(ctx, hidden, output, targets, weights, losses_of)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *scaled(ctx, upstream), None, None, None


def vocabulary_parallel_log_probs(hidden: Tensor, output: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log p(target) of each token, (N,) float32, the same on every rank; arguments are as above.

    Holds this rank's part of the logits in float32, (N, V / ranks): for short sequences.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _LogProbs.apply(hidden, output, targets, group)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, output: Tensor, targets: Tensor, group) -> Tensor:
        matrix = output.to(hidden.dtype)
        losses, gradient = _softmax_part(
            (hidden @ matrix.t()).float(), targets - dist.get_rank(group) * len(output), group
        )
        ctx.save_for_backward(hidden, matrix, gradient)
        ctx.output_dtype = output.dtype
        return -losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        hidden, matrix, gradient = ctx.saved_tensors
        logits = (gradient * -upstream[:, None]).to(hidden.dtype)
        return logits @ matrix, (logits.t() @ hidden).to(ctx.output_dtype), None, None


def _softmax_part(logits: Tensor, target: Tensor, group) -> tuple[Tensor, Tensor]:
    """Loss per token, (n,), and this rank's part of its gradient by the logits, written over them.

    `target` counts from this rank's first word; those of other ranks are out of range.
    """
    highest = logits.amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    mine = (target >= 0) & (target < logits.shape[1])
    at = target.clamp(0, logits.shape[1] - 1)[:, None]
    logit = logits.gather(1, at)[:, 0]
    exponentials = logits.sub_(highest[:, None]).exp_()
    sums = torch.stack((exponentials.sum(-1), torch.where(mine, logit, 0.0)))
    dist.all_reduce(sums, group=group)
    loss = sums[0].log() + highest - sums[1]
    gradient = exponentials.div_(sums[0][:, None])
    gradient.scatter_add_(1, at, -mine.float()[:, None])
    return loss, gradient
