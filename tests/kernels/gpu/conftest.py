"""The Triton kernels run on the GPU if there is one, else in Triton's interpreter; without Triton the tests skip."""

import pytest
import torch

from puna.kernels import triton as ours


@pytest.fixture
def device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    why = ours.why_not(torch.empty(0))
    if why is not None:
        pytest.skip(why)
    _mend_interpreter()
    return "cpu"


def _mend_interpreter() -> None:
    """NumPy 2.4 refuses int(array of one element), with which Triton 3.6's interpreter reads the bounds of a loop."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_mended", False):
        return
    patch = interpreter._patch_lang_tensor

    def mended(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor, interpreter._mended = mended, True
