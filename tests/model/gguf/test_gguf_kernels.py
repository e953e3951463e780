"""The C++ quantisers against the reference: the same bytes, on every instruction set that this processor has."""

import pytest
import torch

from puna.errors import ConfigError
from puna.kernels import native
from puna.model.gguf import blocks
from puna.model.gguf.quantise import encode, encode_measured

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.why_not()}")
QUANTISED = [blocks.Q8_0, blocks.Q4_0, blocks.Q4_K, blocks.Q6_K]


@pytest.fixture
def chosen_back():
    before = native.chosen()
    yield
    native.choose(before)


def worlds() -> dict[str, torch.Tensor]:
    """Weights of all shapes; 77 rows are no multiple of sixteen."""
    normal = torch.randn(77, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    with_zeros = normal.clone()
    with_zeros[:, ::3] = 0
    with_zeros[5] = 0
    return {
        "normal": normal,
        "heavy tails": normal**3,
        "positive": normal.abs(),
        "negative": -normal.abs(),
        "constant": torch.full_like(normal, -0.3),
        "zeros": with_zeros,
        "whole numbers": (normal * 100).round(),
        "subnormal scales": normal * 1e-6,
        "nothing": normal * 1e-33,
        "large": normal * 1e5,
        "one weight": torch.where(torch.arange(256) == 7, normal, 0.0),
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
    }


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_kernels_give_the_bytes_of_the_reference(kind, chosen_back):
    for name, weights in worlds().items():
        expected = encode(weights, kind, impl="reference")
        for instructions in native.instructions():
            native.choose(instructions)
            assert torch.equal(encode(weights, kind, impl="native"), expected), (name, instructions)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_reported(impl, bad):
    weights = torch.zeros(3, 256)
    weights[2, 200] = bad
    assert encode_measured(weights, blocks.Q4_K, impl=impl)[1] == float("inf")
    assert encode_measured(weights[:2] - 5, blocks.Q4_K, impl=impl)[1] == 5.0


def test_a_kind_without_kernel_is_refused_when_one_is_asked_for():
    with pytest.raises(ConfigError, match="BF16"):
        encode(torch.zeros(1, 32), blocks.BF16, impl="native")
