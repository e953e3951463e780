"""Verification: equal models are equal, and a fault is found where it is."""

from dataclasses import replace

import pytest
import torch

from puna.errors import ArtifactError
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.model.verify import VerifyConfig, compare

SHAPE = LlamaConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=60, context=64)
ASKED = VerifyConfig(tokens=24)


def made(shape: LlamaConfig = SHAPE) -> Llama:
    return Llama(shape).init_weights(3)


def test_a_model_computes_the_same_as_its_copy():
    found = compare(made(), made(), ASKED)
    assert found.same and found.first_divergence is None
    assert found.largest_logit_difference == 0 and found.same_choice == 1 and len(found.layers) == 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tok_embeddings.weight", "embedding"),
        ("layers.0.attention.wq.weight", "layer 1"),
        ("layers.2.feed_forward.w2.weight", "layer 3"),
        ("norm.weight", "logits"),
        ("output.weight", "logits"),
    ],
)
def test_a_changed_tensor_is_found_where_it_acts(name, expected):
    changed = made()
    with torch.no_grad():
        weight = changed.get_parameter(name)
        weight.copy_(weight.flip(0) * 1.5)
    found = compare(made(), changed, ASKED)
    assert not found.same and found.first_divergence == expected


def test_rounding_is_no_fault_when_the_tolerance_says_so():
    rounded = made()
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16().float())
    assert not compare(made(), rounded, replace(ASKED, tolerance=1e-6)).same
    assert compare(made(), rounded, replace(ASKED, tolerance=5e-2)).same


def test_another_rotary_base_is_noted_and_seen():
    found = compare(made(), made(replace(SHAPE, rope_theta=500_000.0)), ASKED)
    assert found.first_divergence == "layer 1" and "rope_theta" in found.notes[0]


def test_models_of_different_shapes_are_refused_by_name():
    with pytest.raises(ArtifactError, match="ffn_dim: 48 and 64"):
        compare(made(), made(replace(SHAPE, ffn_dim=64)), ASKED)
