"""The head start: a model that was never trained repeats what it has just read, whatever the tokens are."""

import pytest
import torch

from puna.errors import ConfigError
from puna.model.headstart import give_head_start
from puna.model.llama import Llama, attend_with
from puna.model.sizes import LlamaConfig, RopeScaling

CONFIG = LlamaConfig(
    dim=192, n_layers=4, n_heads=3, n_kv_heads=1, head_dim=64, ffn_dim=256, vocab_size=1000, context=512,
    rope_theta=500_000.0, rope_scaling=RopeScaling(original_context=256), tied=True,
)  # fmt: skip


def made(config: LlamaConfig, seed: int = 0) -> Llama:
    model = Llama(config).init_weights(seed)
    give_head_start(model, seed)
    return model


@torch.no_grad()
def copied(model: Llama, length: int = 24, rows: int = 64) -> float:
    """How often the next token of a sequence that comes a second time is the likeliest one."""
    generator = torch.Generator().manual_seed(5)
    once = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    tokens = torch.cat([once, once], 1)
    logits = model(tokens, torch.arange(2 * length).expand_as(tokens), attend_with(None))
    return (logits[:, length:-1].argmax(-1) == tokens[:, length + 1 :]).float().mean().item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 3},
        {"tied": False},
        {"rope_scaling": None, "rope_theta": 10_000.0},
        {"dim": 256, "n_heads": 4},
    ],
)
def test_it_copies_before_any_training(changes):
    config = LlamaConfig(**{**CONFIG.__dict__, **changes})
    assert copied(made(config)) > 0.6
    assert copied(Llama(config).init_weights(0)) < 0.05


def test_the_weights_are_a_function_of_the_seed():
    first, again, other = made(CONFIG), made(CONFIG), made(CONFIG, seed=1)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
    assert not torch.equal(first.tok_embeddings.weight, other.tok_embeddings.weight)


def test_what_comes_later_is_not_looked_at():
    model, tokens = made(CONFIG), torch.randint(1000, (1, 20), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 7) % 1000
    positions = torch.arange(20)[None]
    with torch.no_grad():
        before, after = (model(t, positions, attend_with(None))[:, :12] for t in (tokens, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("changes", [{"n_layers": 1}, {"head_dim": 4}, {"dim": 64, "head_dim": 64}])
def test_a_shape_without_room_is_refused(changes):
    with pytest.raises(ConfigError, match="no room for a head start"):
        made(LlamaConfig(**{**CONFIG.__dict__, **changes}))
