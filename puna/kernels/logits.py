"""What is asked of a step's logits (B, V) float32, without sorting them and without moving them.

    best         the k largest of each row, their indices, and log(sum(exp(row)))
    at           single ones
    inverse      where the running sum of a row's distribution passes a share of it: a draw from all of it
    scaled       logits / temperature
    row          one row, to look at or to change
    with_rows    the logits with some rows in place of theirs

Logits are a numpy array, as the CPU's runners give them, or a PyTorch tensor that stays on its GPU, where the same is done by
`device_logits.py`. Small results are numpy arrays either way, so that who asks has one way to go on.

`best` is a C++ kernel (`native/sampling.h`): it looks for the largest logits with a running threshold, and needs of the
others only the sum of their exponentials. `reference` is numpy. Among equals the lower index comes first.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Literal, Union

import numpy as np

from puna.config import require
from puna.kernels import native
from puna.kernels.threads import threads

if TYPE_CHECKING:
    from torch import Tensor

Logits = Union[np.ndarray, "Tensor"]
Implementation = Literal["auto", "reference", "native"]


def best(logits: Logits, k: int, *, impl: Implementation = "auto") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest (B, k) float32, descending, their indices (B, k) int64, and logsumexp of each row (B,) float32.

    Raises `ConfigError` if `native` is asked for and cannot be had.
    """
    if not isinstance(logits, np.ndarray):
        return _device().best(logits, k)
    if impl == "native":
        require(native.available(), f"the C++ kernels cannot do this: {native.why_not()}")
    if impl == "reference" or not native.available():
        return _best(logits, k)
    values, indices, sums = native.top(_team(threads()), logits, k)
    return values, indices.astype(np.int64), sums


def at(logits: Logits, indices: np.ndarray) -> np.ndarray:
    """The logit at `indices` (B,) of each row, (B,) float32."""
    if not isinstance(logits, np.ndarray):
        return _device().at(logits, indices)
    return np.take_along_axis(logits, indices[:, None], 1)[:, 0]


def inverse(logits: Logits, min_p: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Draw from softmax of each row by `uniforms` (B, 1) in [0, 1): (B,) int64.

    Only from what has at least the share `min_p` (B, 1) of the likeliest one's probability.
    """
    if not isinstance(logits, np.ndarray):
        return _device().inverse(logits, min_p, uniforms)
    p = np.exp(logits - logits.max(-1, keepdims=True))  # of the likeliest: 1
    p = np.where(p >= min_p, p, np.float32(0)) if min_p.any() else p
    return pick(p, uniforms)


def pick(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """The index of each row (B, N) at which the running sum first passes `uniforms` (B, 1) of the row's total."""
    sums = weights.cumsum(-1, dtype=np.float64)
    passed = [row.searchsorted(u * row[-1], side="right") for row, u in zip(sums, uniforms[:, 0])]
    return np.minimum(np.array(passed, dtype=np.int64), weights.shape[1] - 1)


def scaled(logits: Logits, temperature: np.ndarray) -> Logits:
    """Each row divided by its temperature (B, 1)."""
    return logits / temperature if isinstance(logits, np.ndarray) else _device().scaled(logits, temperature)


def row(logits: Logits, index: int) -> np.ndarray:
    """One row, (V,) float32; not to be written to."""
    return logits[index] if isinstance(logits, np.ndarray) else logits[index].cpu().numpy()


def with_rows(logits: Logits, rows: Mapping[int, np.ndarray]) -> Logits:
    """`logits` with these rows in place of theirs; a copy."""
    if not isinstance(logits, np.ndarray):
        return _device().with_rows(logits, rows)
    made = logits.copy()
    for index, values in rows.items():
        made[index] = values
    return made


def _best(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    indices = np.stack([_largest(values, k) for values in logits])
    values = np.take_along_axis(logits, indices, 1)
    sums = np.exp(logits - values[:, :1]).sum(-1, dtype=np.float64)
    return values, indices, values[:, 0] + np.log(sums).astype(np.float32)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k largest."""
    least = np.partition(values, len(values) - k)[len(values) - k]
    few = np.flatnonzero(values >= least)
    return few[np.argsort(-values[few], kind="stable")][:k]


@cache
def _team(count: int) -> native.Team:
    return native.Team(count)


def _device():
    from puna.kernels import device_logits

    return device_logits
