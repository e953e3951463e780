import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.model.llama import (
    Llama,
    attend_with,
    document_mask,
    rope_frequencies,
    rope_rotation,
    rotate,
    scale_frequencies,
)
from puna.model.sizes import SIZES, LlamaConfig, RopeScaling

CONFIG = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=60, context=64)


def logits(model: Llama, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, attend_with(mask))


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(CONFIG).init_weights(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)  # logits far from uniform, yet not so large that float32's noise reaches the bounds below
    return model


def test_no_token_sees_a_later_one(model):
    tokens = torch.randint(60, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 7) % 60
    a, b = logits(model, tokens), logits(model, changed)
    assert torch.allclose(a[:, :12], b[:, :12], atol=1e-5)
    assert not torch.allclose(a[:, 12:], b[:, 12:], atol=1e-2)


def test_a_document_in_a_packed_row_gets_the_logits_it_gets_alone(model):
    lengths = [5, 9, 1, 7]
    documents = [torch.randint(60, (1, n)) for n in lengths]
    packed = torch.cat(documents, dim=1)
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        together = model(packed, positions, attend_with(document_mask(numbers)))
    alone = torch.cat([logits(model, d) for d in documents], dim=1)
    assert torch.allclose(together, alone, atol=1e-4)


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_the_document_mask_is_true_exactly_for_earlier_tokens_of_the_same_document(rows):
    mask = document_mask(torch.tensor(rows))
    for b, row in enumerate(rows):
        for i in range(6):
            for j in range(6):
                assert bool(mask[b, 0, i, j]) == (j <= i and row[i] == row[j])


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b"])
def test_rotary_scaling_keeps_fast_pairs_slows_slow_ones_by_the_factor_and_stays_ordered(name):
    config = SIZES[name]
    scaling = config.rope_scaling
    plain = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    scaled = rope_frequencies(config)
    wavelengths = 2 * math.pi / plain
    fast = wavelengths < scaling.original_context / scaling.high_freq_factor
    slow = wavelengths > scaling.original_context / scaling.low_freq_factor
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.allclose(scaled[slow], plain[slow] / scaling.factor)
    between = ~fast & ~slow
    assert between.any()
    assert (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / scaling.factor).all()
    assert (scaled.diff() < 0).all()


def test_rotary_scaling_by_one_changes_nothing():
    frequencies = torch.logspace(0, -6, 40)
    assert torch.allclose(scale_frequencies(frequencies, RopeScaling(factor=1.0)), frequencies)


@given(st.integers(0, 100_000), st.integers(0, 5_000), st.integers(0, 5_000))
def test_a_score_between_rotated_heads_depends_on_their_distance_alone(shift, i, j):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def score(a: int, b: int) -> float:
        at = [rope_rotation(CONFIG, torch.tensor([[p]])) for p in (a, b)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=0.02)
    assert float(rotate(q, rope_rotation(CONFIG, torch.tensor([[i]]))).norm()) == pytest.approx(
        float(q.norm()), rel=1e-4
    )


def test_weights_depend_on_the_seed_alone():
    a, b, c = (Llama(CONFIG).init_weights(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["layers.0.attention.wq.weight"], c["layers.0.attention.wq.weight"])
