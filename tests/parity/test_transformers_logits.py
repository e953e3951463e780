"""The exported folder is the same model to `transformers`: the same logits, the same greedy tokens."""

import dataclasses

import pytest
import torch

from puna.model.checkpoint import load_model, save_model
from puna.model.folder import load_config
from puna.model.llama import Llama, attend_with
from puna.model.sizes import LlamaConfig, RopeScaling

transformers = pytest.importorskip("transformers")

BASE = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=96, vocab_size=300, context=256, rope_theta=5e5
)
SHAPES = {
    "multi-head": BASE,
    "grouped by 2": dataclasses.replace(BASE, n_kv_heads=2),
    "one key/value head": dataclasses.replace(BASE, n_kv_heads=1),
    "tied": dataclasses.replace(BASE, n_kv_heads=2, tied=True),
    "Llama 1": dataclasses.replace(BASE, norm_eps=1e-6, rope_theta=10_000.0),
    "heads wider than the model": dataclasses.replace(BASE, head_dim=24),
    "heads narrower than the model": dataclasses.replace(BASE, head_dim=8, n_kv_heads=2),
    "Llama 3.1's scaling": dataclasses.replace(
        BASE, n_kv_heads=2, rope_scaling=RopeScaling(factor=8.0, original_context=32)
    ),
    "Llama 3.2's scaling, tied": dataclasses.replace(
        BASE, n_kv_heads=2, tied=True, rope_scaling=RopeScaling(factor=32.0, original_context=32)
    ),
}


def noisy(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model with weights large enough that an error in any part shows in the logits."""
    model = Llama(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model.eval()


def logits(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, attend_with(None))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_and_greedy_tokens_equal_those_of_transformers(name, tmp_path):
    config = SHAPES[name]
    save_model(noisy(config), None, tmp_path)
    ours = load_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert load_config(tmp_path) == config
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in theirs.parameters()) == config.parameters

    # Positions reach past the rotary scaling's original context of 32.
    tokens = torch.randint(config.vocab_size, (2, 160), generator=torch.Generator().manual_seed(2))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    assert (logits(ours, tokens) - expected).abs().max() < 1e-4

    prompt = tokens[:1, :40]
    answer = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    mine = prompt
    for _ in range(24):
        mine = torch.cat((mine, logits(ours, mine)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert mine.tolist() == answer.tolist()


def test_a_folder_that_transformers_wrote_loads_to_the_same_logits(tmp_path):
    shape = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(shape).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_model(tmp_path)
    tokens = torch.randint(300, (2, 100))
    with torch.no_grad():
        assert (logits(ours, tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert load_config(tmp_path).rope_scaling == RopeScaling(factor=8.0, original_context=32)
