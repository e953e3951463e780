"""PyTorch's types for the forms in which a safetensors file has its numbers."""

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_of(data: np.ndarray, form: str) -> Tensor:
    """The numbers in these bytes (n,) uint8, which stay where they are."""
    if not len(data):
        return torch.empty(0, dtype=DTYPES[form])
    return torch.frombuffer(data, dtype=DTYPES[form])
