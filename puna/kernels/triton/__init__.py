"""The kernels for NVIDIA GPUs, written in Triton.

Each module here is the fast form of the op of the same name one folder up, which has its reference and says what it
computes. They are imported when they are first used: Triton comes with PyTorch's CUDA builds on Linux, and elsewhere the
references compute. With `TRITON_INTERPRET=1` set before Triton is imported its interpreter runs them on a CPU, slowly:
that is how the tests run them where there is no GPU.
"""

import importlib.util
import os
from typing import Literal

from torch import Tensor

from puna.config import require

Implementation = Literal["auto", "reference", "triton"]


def why_not(at: Tensor) -> str | None:
    """Why no Triton kernel can compute with `at`; None if one can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not at.is_cuda and not interpreting():
        return f"the tensors are on {at.device}"
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def chosen(impl: Implementation, at: Tensor) -> bool:
    """Whether the Triton kernel computes; "auto" takes it on a GPU. Raises `ConfigError` if it was asked for in vain."""
    if impl == "reference" or (impl == "auto" and not at.is_cuda):
        return False
    why = why_not(at)
    require(why is None or impl == "auto", f"the Triton kernel cannot run: {why}", hint="impl='reference'")
    return why is None
