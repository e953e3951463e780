"""The likeliest tokens of a distribution, without sorting the rest.

    softmax(logits), its k largest in descending order

`reference` asks PyTorch for all probabilities and then for the largest. `native` (`native/sampling.h`) looks for the
largest logits first, and needs of the others only the sum of their exponentials.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from puna.config import require
from puna.kernels import native

Implementation = Literal["auto", "reference", "native"]


def likeliest(logits: Tensor, k: int, *, impl: Implementation = "auto") -> tuple[Tensor, Tensor]:
    """The probabilities (B, k) and the indices (B, k) int64 of the k likeliest of logits (B, V) float32.

    Raises `ConfigError` if `native` is asked for and cannot be had.
    """
    fit = logits.device.type == "cpu" and logits.dtype == torch.float32 and native.available()
    if impl == "native":
        require(fit, f"the C++ kernels cannot do this: {native.why_not() or 'float32 on a CPU is what they take'}")
    if impl == "reference" or not fit:
        values, indices = torch.softmax(logits, -1).topk(k, dim=-1)
        return values, indices
    values, indices, sums = native.top(_team(), logits, k)
    return (values - sums[:, None]).exp(), indices.long()


@cache
def _team() -> native.Team:
    return native.Team(torch.get_num_threads())
