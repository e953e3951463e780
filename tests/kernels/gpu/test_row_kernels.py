"""The small kernels of a layer against their references, and those against the model's own modules."""

import pytest
import torch

from puna.errors import ConfigError
from puna.kernels.rms_norm import rms_norm
from puna.kernels.rotary_cache import rotary_cache
from puna.kernels.swiglu import swiglu
from puna.model.llama import rope_rotation, rotate
from puna.model.sizes import LlamaConfig


@pytest.mark.parametrize("adds", [False, True])
def test_norm_with_and_without_addition(device, adds):
    x, residual = torch.randn(3, 200, device=device), torch.randn(3, 200, device=device)
    weight = torch.rand(200, device=device)
    fused = rms_norm(x, weight, 1e-5, residual if adds else None, impl="triton")
    plain = rms_norm(x, weight, 1e-5, residual if adds else None, impl="reference")
    torch.testing.assert_close(fused, plain)
    assert torch.equal(plain[1], x + residual if adds else x)


def test_swiglu(device):
    gate_up = 3 * torch.randn(4, 2 * 1100, device=device)
    torch.testing.assert_close(swiglu(gate_up, impl="triton"), swiglu(gate_up, impl="reference"))


def rotary_case(device):
    H, K, E, blocks = 4, 2, 24, 3
    config = LlamaConfig(dim=96, n_layers=1, n_heads=H, n_kv_heads=K, head_dim=E, ffn_dim=8, vocab_size=8, context=64)
    positions = torch.tensor([[0, 7, 40, 3]])
    rotation = rope_rotation(config, positions)[0, :, 0]
    qkv = torch.randn(4, (H + 2 * K) * E)
    slots = torch.tensor([5, 47, 0, 33], dtype=torch.int32)
    pools = [torch.zeros(blocks, 16, K, E) for _ in "kv"]
    given = (qkv, rotation.real.contiguous(), rotation.imag.contiguous(), slots, *pools)
    return positions, rope_rotation(config, positions), H, K, E, [t.to(device) for t in given]


def test_the_reference_turns_pairs_as_the_model_does_and_writes_where_it_is_told():
    _, rotation, H, K, E, given = rotary_case("cpu")
    q = rotary_cache(*given, impl="reference")
    heads = given[0].view(1, 4, -1, E)
    torch.testing.assert_close(q, rotate(heads[:, :, :H], rotation)[0])
    keys, values = (pool.view(-1, K, E) for pool in given[4:])
    at = given[3].long()
    torch.testing.assert_close(keys[at], rotate(heads[:, :, H : H + K], rotation)[0])
    assert torch.equal(values[at], heads[0, :, H + K :])
    untouched = torch.ones(48, dtype=torch.bool)
    untouched[at] = False
    assert not keys[untouched].any() and not values[untouched].any()


def test_rotary_positions_and_the_cache_writes(device):
    *_, fused = rotary_case(device)
    plain = [t.clone() for t in fused]
    torch.testing.assert_close(rotary_cache(*fused, impl="triton"), rotary_cache(*plain, impl="reference"))
    for a, b in zip(fused, plain):
        torch.testing.assert_close(a, b)


def test_a_kernel_that_is_asked_for_by_name_and_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="the Triton kernel cannot run"):
        swiglu(torch.randn(1, 4), impl="triton")
