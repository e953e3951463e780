"""Logits of which only the largest matter: the reference of `native/head.h`, in plain PyTorch.

An output matrix of 8-bit codes is read in two steps. The upper four bits of a code say it but for its place among
sixteen codes, of which 7.5 more than the lowest is the middle (8 is taken, a whole number):

    upper(code)  =  16 floor(code / 16) + 8

All rows are multiplied by these. Then the rows are taken in blocks of 16 neighbours, and the `refined` blocks whose
largest logit is largest are multiplied by the codes themselves. So the likeliest tokens have the logits that the whole
matrix gives, and to the others there is an error of the size of 4-bit weights': for normal ones a tenth of the logits'
deviation.

The largest of all is among those unless its error is as large as it is behind. All rows are read again if the first that
was not is behind by no more than twice the largest error seen.
"""

import torch
from torch import Tensor

BLOCK, REFINED = 16, 128  # rows of a block; blocks


def upper(codes: Tensor) -> Tensor:
    """What the upper halves of `codes` (int8) stand for, int8."""
    return (codes >> 4 << 4) + 8


def screened_logits(x: Tensor, codes: Tensor, scales: Tensor, group: int, refined: int = REFINED) -> Tensor:
    """`x` (N, columns) float32 times the matrix of `codes` (V, columns) int8 with `scales` (V, groups): (N, V)."""
    spread = scales.float().repeat_interleave(group, 1)[:, : codes.shape[1]]
    rough = x @ (upper(codes).float() * spread).T
    V = len(codes)
    padded = torch.nn.functional.pad(rough, (0, -V % BLOCK), value=-torch.inf)
    largest = padded.unflatten(1, (-1, BLOCK)).amax(-1)
    best = largest.topk(min(refined, largest.shape[1])).indices
    chosen = torch.zeros_like(largest, dtype=torch.bool).scatter_(1, best, True)
    rest = largest.masked_fill(chosen, -torch.inf).amax(-1)
    chosen = chosen.repeat_interleave(BLOCK, 1)[:, :V]
    whole = x @ (codes.float() * spread).T
    ahead = whole.masked_fill(~chosen, -torch.inf).amax(-1) - rest
    error = (whole - rough).abs().masked_fill(~chosen, 0).amax(-1)
    return torch.where(chosen | (ahead <= 2 * error)[:, None], whole, rough)
