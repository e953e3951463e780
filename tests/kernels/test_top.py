"""The likeliest tokens: the C++ kernel beside PyTorch."""

import pytest
import torch

from puna.kernels import native
from puna.kernels.top import likeliest


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
@pytest.mark.parametrize("V, k", [(128256, 256), (700, 256), (256, 256)])
def test_both_ways_give_the_same_probabilities(V, k):
    logits = torch.randn(5, V) * 4
    logits[2, 7] = -torch.inf  # a forbidden token
    best, ids = likeliest(logits, k, impl="native")
    expected, same = likeliest(logits, k, impl="reference")
    assert torch.allclose(best, expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(logits.gather(1, ids), logits.gather(1, same))


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_one_row_that_holds_everything():
    logits = torch.full((1, 64), -torch.inf)
    logits[0, 5] = 3.0
    best, ids = likeliest(logits, 4, impl="native")
    assert ids[0, 0] == 5 and best[0].tolist() == [1.0, 0.0, 0.0, 0.0]
