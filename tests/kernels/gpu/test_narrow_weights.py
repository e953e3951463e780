"""Products with narrow weights: the Triton kernels against their references, which are held against `puna.quant`."""

import pytest
import torch

from puna.kernels.fp8_linear import fp8_linear, quantise_rows
from puna.kernels.linear import linear
from puna.kernels.quant_linear import expand, quant_linear
from puna.quant.groups import dequantise_matrix, quantise_matrix


def some(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor, within: float = 2e-3) -> None:
    """Equal but for rounding, on the scale of the largest."""
    assert a.shape == b.shape and a.dtype == b.dtype
    error = (a.float() - b.float()).abs().max() / b.float().abs().max()
    assert error < within, f"relative error {error:.2e}"


@pytest.mark.parametrize("bits, group, columns", [(8, 32, 96), (4, 32, 96), (4, 32, 77), (8, 64, 50), (4, 128, 256)])
def test_the_reference_reads_the_integers_as_the_quantiser_wrote_them(bits, group, columns):
    packed = quantise_matrix(some(5, columns), bits, group)
    assert torch.equal(expand(packed.codes, packed.scales, None, group, columns), dequantise_matrix(packed))
    x = some(3, columns, seed=1)
    close(quant_linear(x, packed.codes, packed.scales, None, group), x @ dequantise_matrix(packed).T, 1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 130])
@pytest.mark.parametrize("bits, group, offsets", [(8, 32, False), (4, 32, True), (4, 64, False), (8, 128, True)])
def test_few_and_many_tokens_meet_integers(device, bits, group, offsets, tokens):
    packed = quantise_matrix(some(70, 384), bits, group)
    beside = 0.1 * some(*packed.scales.shape, seed=2).half() if offsets else None
    parts = [t if t is None else t.to(device) for t in (packed.codes, packed.scales, beside)]
    x = some(tokens, 384, seed=1, dtype=torch.float16).to(device)
    close(
        quant_linear(x, *parts, group, impl="triton"),
        quant_linear(x, *parts, group, impl="reference"),
    )


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_meet_fp8_weights(device, tokens):
    codes, scales = (t.to(device) for t in quantise_rows(some(70, 256)))
    x = some(tokens, 256, seed=1, dtype=torch.float16).to(device)
    close(fp8_linear(x, codes, scales, impl="triton"), fp8_linear(x, codes, scales, impl="reference"))


def test_fp8_weights_are_near_what_they_stand_for():
    weight = some(16, 256) * torch.logspace(-4, 4, 16)[:, None]  # rows of very different size
    codes, scales = quantise_rows(weight)
    error = (codes.float() * scales - weight).norm(dim=1) / weight.norm(dim=1)
    assert error.max() < 0.04


def test_one_token_meets_plain_weights(device):
    weight, x = some(70, 384, dtype=torch.float16).to(device), some(1, 384, seed=1, dtype=torch.float16).to(device)
    close(linear(x, weight, impl="triton"), linear(x, weight, impl="reference"))


def test_a_shape_that_no_kernel_takes_is_refused_by_name_and_computed_by_default(device):
    packed = quantise_matrix(some(6, 50).to(device), 8, 32)
    x = some(2, 50).to(device)
    with pytest.raises(ValueError, match="50 columns in groups of 32"):
        quant_linear(x, packed.codes, packed.scales, None, 32, impl="triton")
    assert quant_linear(x, packed.codes, packed.scales, None, 32).shape == (2, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, columns", [(6144, 4096), (4096, 14336), (128256, 4096)])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_shapes_of_an_8b_model(bits, tokens, rows, columns):
    generator = torch.Generator("cuda").manual_seed(0)
    wide = columns if bits == 8 else columns // 2
    kind = torch.int8 if bits == 8 else torch.uint8
    codes = torch.randint(0, 256, (rows, wide), device="cuda", generator=generator, dtype=torch.uint8).view(kind)
    scales = (torch.rand(rows, columns // 32, device="cuda", generator=generator) * 0.01).half()
    x = torch.randn(tokens, columns, device="cuda", generator=generator).bfloat16()
    close(
        quant_linear(x, codes, scales, None, 32),
        quant_linear(x, codes, scales, None, 32, impl="reference"),
        1e-2,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def test_fp8_at_the_shape_of_an_8b_model(tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    codes, scales = quantise_rows(torch.randn(4096, 14336, device="cuda", generator=generator))
    x = torch.randn(tokens, 14336, device="cuda", generator=generator).bfloat16()
    # Many tokens are rounded to 8 bits as well.
    close(fp8_linear(x, codes, scales), fp8_linear(x, codes, scales, impl="reference"), 1e-2 if tokens <= 64 else 5e-2)
