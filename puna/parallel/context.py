"""Context parallelism: a sequence cut over ranks, attention by gathering all keys and values (arXiv 2407.21783, 3.3.2).

A causal token sees all before it, so equal cuts would give the last rank nearly all the work. Instead a sequence is cut
into 2 C pieces, and rank i of C takes pieces i and 2 C - 1 - i: each pair has the same number of keys to look at.

    C = 2   tokens  0 1 | 2 3 | 4 5 | 6 7        rank 0: 0 1 6 7     rank 1: 2 3 4 5

In each layer, keys and values of all ranks are gathered (with grouped heads they are small beside the queries), and each
piece attends to the keys up to its own end. Any mask over documents works, since every rank sees all keys; a ring, which
sees them a part at a time, has to mend sums across parts. Backward, the gradients of keys and values are summed in
float32 while they are dealt back to their ranks.

A filling token (document number below 0) attends to nothing: its row of the mask is empty, and softmax would make NaN of
it. Its output is zero, and so are the gradients through it.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from puna.kernels.attention import attention
from puna.model.llama import Attend

# PyTorch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local_index(length: int, ranks: int, rank: int) -> Tensor:
    """The positions in a sequence of `length` tokens that a context rank holds, in its order; (length / ranks,)."""
    if ranks == 1:
        return torch.arange(length)
    pieces = torch.arange(length).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def attend_across(documents: Tensor, group: dist.ProcessGroup | None) -> Attend:
    """Attention of this rank's queries to the keys of all ranks in `group`, each token within its document.

    `documents` (B, T) numbers the document of every token of the whole sequence; a negative number is a filling.
    """
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    T = documents.shape[1]
    order = torch.cat([local_index(T, ranks, r) for r in range(ranks)]).argsort().to(documents.device)
    held = local_index(T, ranks, rank).to(documents.device)
    pieces = [(piece, *_mask(documents, piece)) for piece in (held.chunk(2) if ranks > 1 else [held])]

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ranks > 1:
            gathered = gather(torch.stack((k, v)), 2, group).index_select(2, order)
            k, v = gathered.unbind(0)
        done, outputs = 0, []
        for piece, mask, empty in pieces:
            end = int(piece[-1]) + 1
            out = attention(q[:, done : done + len(piece)], k[:, :end], v[:, :end], mask)
            outputs.append(out if empty is None else out.masked_fill(empty[..., None, None], 0.0))
            done += len(piece)
        return torch.cat(outputs, dim=1)

    return attend


def _mask(documents: Tensor, piece: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the tokens `piece` may see of the keys up to the piece's end, (B, 1, piece, end), and which see nothing.

    A row that sees nothing is let see everything here, so that no sum is empty; the caller discards what it gets.
    """
    keys = torch.arange(int(piece[-1]) + 1, device=documents.device)
    asking = documents[:, piece, None]
    mask = (asking == documents[:, None, : len(keys)]) & (asking >= 0) & (piece[:, None] >= keys)
    empty = ~mask.any(-1)  # (B, piece)
    if not empty.any():
        return mask[:, None], None
    return (mask | empty[..., None])[:, None], empty


def summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of all ranks' `x`, on each of them.

    They all make the same loss of it, and each rank's counts as one of `ranks` equal parts: so the gradient of one part
    comes back times `ranks`.
    """
    return x if group is None else _Sum.apply(x, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.ranks, None


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The ranks' `x` one after the other along `dim`; gradients are summed in float32 and dealt back."""
    return _Gather.apply(x, dim, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group, ctx.dtype = dim, group, x.dtype
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
        _all_gather(out, x, group=group)
        return out.movedim(0, dim)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.float().movedim(ctx.dim, 0).contiguous()
        ranks = dist.get_world_size(ctx.group)
        out = gradient.new_empty((gradient.shape[0] // ranks, *gradient.shape[1:]))
        _reduce_scatter(out, gradient, group=ctx.group)
        return out.movedim(0, ctx.dim).to(ctx.dtype), None, None
