"""Decoders against the `gguf` package's, and what the encoders lose."""

import numpy as np
import pytest
import torch

from puna.model.gguf import blocks
from puna.model.gguf.blocks import BLOCKS
from puna.model.gguf.quantise import encode

gguf = pytest.importorskip("gguf")
KINDS = {kind.name: kind for kind in BLOCKS.values()}
QUANTISED = [blocks.Q8_0, blocks.Q4_0, blocks.Q4_K, blocks.Q6_K]


def theirs(raw: np.ndarray, kind: blocks.BlockType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(raw.copy(), gguf.GGMLQuantizationType(kind.code))).reshape(-1)


def assert_same_bits(raw: np.ndarray, kind: blocks.BlockType) -> None:
    ours, peers = kind.decode(torch.from_numpy(raw)).float().numpy().reshape(-1), theirs(raw, kind)
    same = ours.view(np.uint32) == peers.view(np.uint32)
    assert (same | (np.isnan(ours) & np.isnan(peers))).all()  # a NaN is a NaN, whatever its spare bits


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_any_bytes_decode_to_the_peers_bits(name):
    kind = KINDS[name]
    raw = np.random.default_rng(kind.code).integers(0, 256, (3000, kind.bytes), dtype=np.uint8)
    assert_same_bits(raw, kind)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_extreme_bytes_decode_to_the_peers_bits(name):
    """Every block of one repeated byte or pair of bytes: infinite, not-a-number, subnormal and largest scales."""
    kind = KINDS[name]
    pairs = [(a, b) for a in range(256) for b in (0x00, 0x01, 0x7B, 0x7C, 0x7E, 0x80, 0xFC, 0xFF)]
    raw = np.array([[pair[i % 2] for i in range(kind.bytes)] for pair in pairs], dtype=np.uint8)
    assert_same_bits(raw, kind)


def test_block_sizes_and_codes_are_the_peers():
    for kind in BLOCKS.values():
        theirs = gguf.GGMLQuantizationType[kind.name]
        assert (theirs.value, gguf.GGML_QUANT_SIZES[theirs]) == (kind.code, (kind.weights, kind.bytes))
    for code, name in blocks.OTHER_TYPES.items():
        assert gguf.GGMLQuantizationType[name].value == code


def error(weights: torch.Tensor, told: torch.Tensor) -> float:
    return ((told.view_as(weights) - weights).square().mean() / weights.square().mean()).sqrt().item()


# Measured on normal weights: 0.0053, 0.0810, 0.0716, 0.0174.
@pytest.mark.parametrize(
    "kind, most", list(zip(QUANTISED, [0.0055, 0.083, 0.074, 0.018])), ids=lambda v: getattr(v, "name", v)
)
def test_what_quantising_loses(kind, most):
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    assert error(weights, kind.decode(encode(weights, kind))) < most


@pytest.mark.parametrize("kind", [blocks.Q8_0, blocks.Q4_0], ids=lambda k: k.name)
@pytest.mark.parametrize("shape", ["normal", "heavy tails"])
def test_our_quantisers_lose_no_more_than_the_peers(kind, shape):
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    weights = weights**3 if shape == "heavy tails" else weights
    peers = gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType(kind.code))
    assert error(weights, kind.decode(encode(weights, kind))) <= error(weights, torch.from_numpy(theirs(peers, kind)))


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_constant_and_empty_rows_are_told_almost_exactly(kind):
    for value in (0.0, 1.0, -1.0, 0.02, -700.0):
        weights = torch.full((2, 256), value)
        assert torch.allclose(kind.decode(encode(weights, kind)).view_as(weights), weights, rtol=4e-3, atol=2e-6)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_encoding_what_was_decoded_loses_next_to_nothing_more(kind):
    weights = torch.randn(16, 256, generator=torch.Generator().manual_seed(2))
    once = kind.decode(encode(weights, kind)).view_as(weights)
    assert error(once, kind.decode(encode(once, kind))) < 0.02


def test_plain_types_keep_their_bits():
    weights = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    for kind, dtype in ((blocks.F32, torch.float32), (blocks.F16, torch.float16), (blocks.BF16, torch.bfloat16)):
        assert torch.equal(kind.decode(encode(weights, kind)).view(4, 32), weights.to(dtype))
