"""A matrix as the kernels read it: the same matrix, in the same room."""

import itertools

import pytest
import torch

import puna.quant.layout
from puna.model.convert import hf_name
from puna.model.sizes import SIZES
from puna.quant import QuantConfig
from puna.quant.forms import Form
from puna.quant.groups import pack
from puna.quant.layout import is_laid, laid_shape, lay, stored_bytes, unlay
from puna.quant.parts import weights_file_bytes

FORMS = [
    (Form(bits, group, offset), split)
    for bits, group, offset, split in itertools.product((4, 6, 8), (16, 32, 48, 64, 128), (False, True), (False, True))
    if not split or (bits == 8 and not offset)
]


@pytest.mark.parametrize("shape", [(64, 128), (37, 40), (150, 72)], ids=str)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_what_is_laid_out_can_be_had_back(monkeypatch, shape, bits):
    monkeypatch.setattr(puna.quant.layout, "_ROWS_AT_ONCE", 128)
    generator = torch.Generator().manual_seed(0)
    for form, split in [(form, split) for form, split in FORMS if form.bits == bits]:
        packed = any_packed(shape, form, generator)
        laid = lay(packed, split=split)
        assert laid.shape == laid_shape(shape, form) and laid.dtype == torch.uint8
        again = unlay(laid, shape, form, split=split)
        assert again.columns == packed.columns
        assert all(torch.equal(a, b) for a, b in zip(packed.tensors, again.tensors, strict=True)), (form, split)


def any_packed(shape: tuple[int, int], form: Form, generator: torch.Generator):
    """Random codes, scales and offsets."""
    half = 1 << (form.bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    groups = (shape[0], -(-shape[1] // form.group_size))
    scales, offsets = (torch.randn(groups, generator=generator).half() for _ in range(2))
    return pack(codes, scales, offsets if form.offset else None, form.bits, form.group_size)


@pytest.mark.parametrize("form", [Form(4, 32), Form(4, 128), Form(6, 32), Form(8, 64), Form(4, 64, True)], ids=str)
def test_every_matrix_of_a_published_size_is_laid_out_in_the_bytes_of_its_codes_and_scales(form):
    for shape in {shape for config in SIZES.values() for shape in config.shapes().values()}:
        assert is_laid(shape, form) == (len(shape) == 2)
        assert stored_bytes(shape, form) == form.bytes(shape)


def test_a_few_added_tokens_cost_next_to_nothing_and_what_would_be_mostly_filling_is_not_laid_out():
    added, form = (128_257, 2048), Form(8, 32)
    assert is_laid(added, form) and form.bytes(added) < stored_bytes(added, form) < 1.001 * form.bytes(added)
    for shape, other in (((300, 48), Form(4, 32)), ((64, 512), Form(4, 24)), ((64, 512), Form(16))):
        assert not is_laid(shape, other) and stored_bytes(shape, other) == other.bytes(shape)


@pytest.mark.parametrize("bits, most", [(4, 5.0e9), (8, 8.5e9)])
def test_an_8b_fits_the_size_that_is_promised(bits, most):
    config = SIZES["llama-3.1-8b"]
    quant = QuantConfig(bits=bits, group_size=64 if bits == 4 else 128)
    forms = {hf_name(name): quant.form_of(name) for name in config.shapes()}
    assert weights_file_bytes(config, forms) < most - 20e6  # its tokenizer is among the files
