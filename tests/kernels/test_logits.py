"""What is asked of logits: the C++ kernel, numpy, and PyTorch's operations for a device give the same."""

import numpy as np
import pytest
import torch

from puna.kernels import device_logits, logits, native

native_only = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


@native_only
@pytest.mark.parametrize("V, k", [(128256, 256), (128256, 1), (700, 256), (256, 256)])
def test_all_ways_give_the_same_of_the_largest(V, k):
    rows = np.random.default_rng(0).standard_normal((5, V), dtype=np.float32) * 4
    rows[2, 7] = -np.inf  # a forbidden token
    rows[3] = rows[3].round()  # many ties: the lower index comes first
    values, indices, sums = logits.best(rows, k, impl="native")
    expected, same, logsumexp = logits.best(rows, k, impl="reference")
    assert np.array_equal(values, expected) and np.array_equal(indices, same)
    assert np.allclose(sums, logsumexp, atol=1e-5)
    values, indices, sums = device_logits.best(torch.from_numpy(rows), k)
    assert np.array_equal(values, expected) and np.array_equal(np.take_along_axis(rows, indices, 1), expected)
    assert np.allclose(sums, logsumexp, atol=1e-4)


@native_only
def test_one_row_that_holds_everything():
    rows = np.full((1, 64), -np.inf, dtype=np.float32)
    rows[0, 5] = 3.0
    for impl in ("native", "reference"):
        values, indices, sums = logits.best(rows, 4, impl=impl)
        assert indices[0, 0] == 5 and np.exp(values - sums).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_rows_are_replaced_in_a_copy():
    rows = np.zeros((3, 4), dtype=np.float32)
    for before in (rows, torch.from_numpy(rows)):
        after = logits.with_rows(before, {1: np.arange(4, dtype=np.float32)})
        assert type(after) is type(before) and not rows.any()
        assert logits.row(after, 1).tolist() == [0, 1, 2, 3] and not logits.row(after, 2).any()
