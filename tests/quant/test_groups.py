import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.quant.forms import packed_shapes
from puna.quant.groups import dequantise_matrix, pack4, pack6, quantise_matrix, unpack4, unpack6


def normal(rows: int = 64, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def error(weight: torch.Tensor, bits: int, group: int) -> float:
    again = dequantise_matrix(quantise_matrix(weight, bits, group))
    return float((weight - again).norm() / weight.norm())


@given(st.lists(st.lists(st.integers(-8, 7), min_size=7, max_size=7), min_size=1, max_size=5))
def test_packing_two_codes_to_a_byte_loses_nothing(codes):
    codes = torch.tensor(codes, dtype=torch.int8)
    packed = pack4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (len(codes), 4)
    assert torch.equal(unpack4(packed)[:, :7], codes)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_packing_sixteen_codes_to_twelve_bytes_loses_nothing(columns, seed):
    codes = torch.randint(-32, 32, (3, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack6(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-columns // 16) * 12)
    assert torch.equal(unpack6(packed)[:, :columns], codes)


@pytest.mark.parametrize(
    ("bits", "group", "most"),
    [(8, 32, 0.006), (8, 128, 0.008), (6, 32, 0.021), (6, 64, 0.024), (4, 32, 0.084), (4, 64, 0.093), (4, 128, 0.1)],
)
def test_the_error_on_normal_weights_is_that_of_the_format(bits, group, most):
    assert error(normal(), bits, group) < most


@pytest.mark.parametrize(
    ("bits", "group", "share"), [(4, 32, 0.9), (4, 64, 0.9), (6, 32, 0.91), (8, 32, 0.88), (8, 64, 0.93)]
)
def test_the_searched_scale_beats_the_largest_weights(bits, group, share):
    weight = normal()
    groups = weight.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / ((1 << (bits - 1)) - 1)
    plain = ((groups / scale).round() * scale).flatten(1)
    assert error(weight, bits, group) < share * float((weight - plain).norm() / weight.norm())


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 3, 256)])
def test_a_row_keeps_its_projection_on_itself(offset, importance):
    weight = normal()
    again = dequantise_matrix(quantise_matrix(weight, 4, 32, offset=offset, importance=importance))
    weighted = weight if importance is None else weight * importance
    share = (weighted * again).sum(1) / (weighted * weight).sum(1)
    assert (share - 1).abs().max() < 3e-4  # what float16 rounds off the scales; least squares alone are 3e-3 short


@pytest.mark.parametrize(("bits", "largest"), [(4, 2.5e-7), (6, 8.5e-7), (8, 3.5e-6)])
def test_weights_are_not_lost_where_float16_rounds_some_scales_to_zero(bits, largest):
    weight = torch.linspace(-largest, largest, 64).repeat(2, 1)
    assert (dequantise_matrix(quantise_matrix(weight, bits, 32)) - weight).norm() < 0.3 * weight.norm()


@given(
    st.integers(1, 5), st.integers(1, 90), st.sampled_from([4, 6, 8]), st.sampled_from([1, 5, 32, 64]),
    st.floats(1e-3, 1e3), st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_weight_of_every_shape_and_size_comes_back_within_a_step_or_is_clipped_a_little(
    rows, columns, bits, group, size, seed
):
    weight = normal(rows, columns, seed) * size
    packed = quantise_matrix(weight, bits, group)
    codes, scales = packed_shapes(rows, columns, bits, group)
    assert (tuple(packed.codes.shape), tuple(packed.scales.shape)) == (codes, scales)
    again = dequantise_matrix(packed)
    assert again.shape == weight.shape
    steps = packed.scales.float().abs().repeat_interleave(group, 1)[:, :columns]
    finest = 128 * 2.0**-25  # what float16 cannot say of a scale below its normal numbers, times the largest code
    assert ((again - weight).abs() <= 1.6 * steps + finest).all()


def test_zeros_stay_zeros_and_numbers_of_the_grid_stay_as_they_are():
    assert torch.equal(dequantise_matrix(quantise_matrix(torch.zeros(3, 64), 4, 32)), torch.zeros(3, 64))
    grid = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0)) * 0.125
    grid[:, ::32] = -1.0  # each group has its longest code
    assert torch.equal(dequantise_matrix(quantise_matrix(grid, 4, 32)), grid)
    assert torch.equal(dequantise_matrix(quantise_matrix(-grid, 4, 32)), -grid)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 3e7])
def test_weights_that_no_scale_can_hold_are_an_error(wrong):
    weight = normal(4, 64)
    weight[2, 3] = wrong
    with pytest.raises(DataError):
        quantise_matrix(weight, 4, 32)


def test_four_bits_in_groups_of_32_take_four_and_a_half():
    weight = normal()
    assert 8 * quantise_matrix(weight, 4, 32).bytes / weight.numel() == 4.5
    assert 8 * quantise_matrix(weight, 8, 32).bytes / weight.numel() == 8.5
    assert 8 * quantise_matrix(weight, 4, 128).bytes / weight.numel() == 4.125


@pytest.mark.parametrize("bits", [4, 8])
def test_offsets_help_where_weights_lie_on_one_side(bits):
    weight = normal().abs() + 0.05
    plain, shifted = (
        float((weight - dequantise_matrix(quantise_matrix(weight, bits, 64, offset=o))).norm()) for o in (False, True)
    )
    assert shifted < 0.6 * plain


@given(
    st.integers(1, 5), st.integers(1, 90), st.sampled_from([4, 6, 8]), st.sampled_from([5, 32, 64]), st.integers(0, 100)
)
@settings(max_examples=40, deadline=None)
def test_with_offsets_every_weight_comes_back_within_some_steps(rows, columns, bits, group, seed):
    weight = normal(rows, columns, seed)
    packed = quantise_matrix(weight, bits, group, offset=True)
    assert packed.offsets.shape == packed.scales.shape and packed.offsets.dtype == torch.float16
    again = dequantise_matrix(packed)
    steps = packed.scales.float().abs().repeat_interleave(group, 1)[:, :columns]
    assert again.shape == weight.shape
    assert ((again - weight).abs() <= 3 * steps + 1e-4).all()  # the narrowed range clips its ends a little


def test_importance_moves_the_error_to_the_columns_that_do_not_matter():
    weight, importance = normal(), torch.ones(256)
    importance[::7] = 100
    for offset in (False, True):
        plain, weighted = (
            (weight - dequantise_matrix(quantise_matrix(weight, 4, 64, offset=offset, importance=i))).square()
            for i in (None, importance)
        )
        assert (weighted * importance).sum() < 0.9 * (plain * importance).sum()
        assert weighted.sum() > plain.sum()
