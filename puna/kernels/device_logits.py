"""Logits where PyTorch has them, on a GPU: what `logits.py` does with numpy, in PyTorch's operations.

Only small results come to the CPU: chosen tokens, a few hundred candidates of a row.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def best(logits: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See `logits.best`."""
    values, indices = (logits.max(-1, keepdim=True)) if k == 1 else logits.topk(k, dim=-1)
    return tuple(part.cpu().numpy() for part in (values, indices, logits.logsumexp(-1)))


def at(logits: Tensor, indices: np.ndarray) -> np.ndarray:
    """See `logits.at`."""
    return logits.gather(1, _there(indices[:, None], logits))[:, 0].cpu().numpy()


def inverse(logits: Tensor, min_p: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """See `logits.inverse`."""
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    if min_p.any():
        p = torch.where(p >= _there(min_p, logits), p, 0.0)
    sums = p.double().cumsum(-1)
    passed = torch.searchsorted(sums, _there(uniforms, logits) * sums[:, -1:], right=True)[:, 0]
    return passed.clamp_max(logits.shape[1] - 1).cpu().numpy()


def scaled(logits: Tensor, temperature: np.ndarray) -> Tensor:
    """See `logits.scaled`."""
    return logits / _there(temperature, logits)


def with_rows(logits: Tensor, rows: Mapping[int, np.ndarray]) -> Tensor:
    """See `logits.with_rows`."""
    made = logits.clone()
    for index, values in rows.items():
        made[index] = _there(values, logits)
    return made


def _there(array: np.ndarray, logits: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(logits.device)
