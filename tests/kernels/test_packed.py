"""bfloat16 in 12 bits: the same numbers, and the same bits in every product, as bfloat16 as it is."""

import pytest
import torch
from torch import Tensor

from puna.kernels import native

BRAIN = torch.bfloat16


def heavy(*shape: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return torch.randn(shape) / (torch.randn(3, *shape).square().mean(0).sqrt()) * 0.02


def outliers(*shape: int) -> Tensor:
    """One huge weight in each row."""
    return torch.randn(shape).mul(0.02).scatter_(1, torch.randint(shape[1], (shape[0], 1)), 3e4)


def specials(*shape: int) -> Tensor:
    """Here and there a zero of either sign, the smallest number, infinity or NaN."""
    few = torch.tensor([0.0, -0.0, 9.2e-41, -9.2e-41, torch.inf, -torch.inf, torch.nan])
    return torch.where(torch.rand(shape) < 0.002, few[torch.randint(7, shape)], torch.randn(shape) * 0.02)


def any_bits(*shape: int) -> Tensor:
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16).view(BRAIN)


def pruned(*shape: int) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) < 0.3)


def rows_of_all_sizes(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.logspace(-30, 30, shape[0])[:, None]


WEIGHTS = {
    "normal": lambda *s: torch.randn(s) * 0.02,
    "uniform": lambda *s: torch.rand(s) - 0.5,
    "zeros": lambda *s: torch.zeros(s),
    "all equal": lambda *s: torch.full(s, -0.3),
    "denormal": lambda *s: torch.randn(s) * 1e-39,
    "heavy tails": heavy,
    "outliers": outliers,
    "specials": specials,
    "pruned": pruned,
    "rows of all sizes": rows_of_all_sizes,
    "any bits": any_bits,
}
SHAPES = [(64, 64), (100, 97), (1, 1), (65, 3), (130, 1300)]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def both(team: native.Team, weight: Tensor) -> list[native.Matrix]:
    return [native.Matrix("bfloat16", *weight.shape, packed=packed).floats(team, weight) for packed in (False, True)]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rows_and_products_have_the_bits_of_bfloat16(team, kind):
    torch.manual_seed(0)
    for shape in SHAPES:
        weight = WEIGHTS[kind](*shape).to(BRAIN)
        plain, packed = both(team, weight)
        for made in (plain, packed):
            assert torch.equal(bits(made.rows_of(torch.arange(shape[0]))), weight.view(torch.int16).int() << 16)
        x = torch.randn(37, shape[1])
        for count in (1, 2, 5, 6, 7, 37):  # alone, a tile, several
            assert torch.equal(bits(packed.multiply(team, x[:count])), bits(plain.multiply(team, x[:count])))


def test_every_number_survives(team):
    """All 65,536 of them, 16 in each of many rows of common weights, so that they are packed and not left alone."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 4096) * 0.02).to(BRAIN).view(torch.int16).repeat(64, 1)
    columns = torch.arange(16) * 256 + torch.arange(4096)[:, None] % 256
    weight.scatter_(1, columns, torch.arange(-(1 << 15), 1 << 15).short()[torch.randperm(1 << 16)].view(4096, 16))
    plain, packed = both(team, weight.view(BRAIN))
    assert packed.bytes < 0.78 * plain.bytes
    assert torch.equal(packed.rows_of(torch.arange(4096)).view(torch.int32), weight.int() << 16)


@pytest.mark.parametrize(
    "kind, share",
    [("normal", 0.7515), ("uniform", 0.752), ("pruned", 0.752), ("heavy tails", 0.755), ("outliers", 0.754)],
)
def test_weights_as_models_have_them_take_three_quarters(team, kind, share):
    torch.manual_seed(0)
    plain, packed = both(team, WEIGHTS[kind](256, 1024).to(BRAIN))
    assert 0.75 < packed.bytes / plain.bytes < share


def test_what_cannot_be_packed_takes_a_line_more_for_64_rows(team):
    plain, packed = both(team, any_bits(256, 1024))
    assert plain.bytes - 64 + 4 * 64 == packed.bytes


def test_a_matrix_is_packed_where_it_can_be(team):
    """64 rows that cannot be do not keep the next from it."""
    torch.manual_seed(0)
    plain, packed = both(team, torch.cat([any_bits(64, 512), (torch.randn(64, 512) * 0.02).to(BRAIN)]))
    assert 0.875 < packed.bytes / plain.bytes < 0.88


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BRAIN])
def test_pieces_of_any_type_are_packed_as_the_whole(team, dtype):
    weight = (torch.randn(200, 130) * 0.02).to(dtype)
    whole = native.Matrix("bfloat16", 200, 130, packed=True).floats(team, weight)
    pieces = native.Matrix("bfloat16", 200, 130, packed=True)
    for first in (0, 64, 192):
        pieces.floats(team, weight[first : {0: 64, 64: 192, 192: 200}[first]], first)
    for made in (whole, pieces):
        assert torch.equal(made.rows_of(torch.arange(200)), weight.to(BRAIN).float())
