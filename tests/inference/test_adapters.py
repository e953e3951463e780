"""LoRA adapters by name: each request as if its adapter were merged into the weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import random_model
from worlds import WIDE, engine_of, said

from puna.chat import Request, Sampling
from puna.errors import ArtifactError, ConfigError
from puna.model.convert import to_hf_rows

MATRICES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.o_proj": "attention.wo",
    "mlp.down_proj": "feed_forward.w2",
}
LONG = Sampling(max_tokens=30, ignore_end=True)


def write_adapter(path, seed: int, *, change=None, drop: str = "", **settings):
    """A random adapter in peft's form, and the model with it merged."""
    model, rank = random_model(WIDE), 3
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(WIDE.n_layers):
        for theirs, ours in MATRICES.items():
            weight = model.get_submodule(f"layers.{layer}.{ours}").weight
            a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            weight.data += 6 / rank * b @ a
            stem = f"base_model.model.model.layers.{layer}.{theirs}"
            tensors[f"{stem}.lora_A.weight"] = a
            rows = to_hf_rows(b, WIDE.head_dim) if ours[-1] in "qk" else b
            tensors[f"{stem}.lora_B.weight"] = rows.contiguous()
    tensors = {name: t for name, t in tensors.items() if not drop or drop not in name} | (change or {})
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 6, **settings}))
    return model


def test_requests_with_different_adapters_share_a_batch_and_get_what_the_merged_models_say(tokenizer, tmp_path):
    merged = {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    engine = engine_of("torch", tokenizer)
    for name in merged:
        engine.load_adapter(name, tmp_path / name)
    requests = [Request(prompt="the sea " * n, sampling=LONG, adapter=a) for n in (1, 4) for a in (None, "one", "two")]
    answers = engine.generate(requests)
    merged[None] = random_model(WIDE)
    for request, answer in zip(requests, answers):
        plain = Request(prompt=request.prompt, sampling=LONG)
        [expected] = engine_of("torch", tokenizer, model=merged[request.adapter]).generate([plain])
        assert answer.text == expected.text
    assert len({a.text for a in answers}) == 6


def test_what_one_adapter_read_is_not_used_by_another(tokenizer, tmp_path):
    write_adapter(tmp_path / "one", 0)
    engine = engine_of("invariant", tokenizer)
    engine.load_adapter("one", tmp_path / "one")
    requests = [Request(prompt="x" * 50, sampling=LONG, adapter=a) for a in (None, "one", None, "one")]
    answers = [engine.generate([r])[0] for r in requests]
    assert [a.cached_tokens for a in answers] == [0, 0, 48, 48]
    assert said(answers[0]) == said(answers[2]) and said(answers[1]) == said(answers[3])
    assert answers[0].text != answers[1].text


def test_an_unknown_adapter_is_refused(tokenizer, tmp_path):
    engine = engine_of("torch", tokenizer)
    with pytest.raises(ConfigError, match="no adapter 'tone'"):
        engine.stream(Request(prompt="x", adapter="tone"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"r": 0}, "r=0"),
        ({"drop": "0.self_attn.q_proj.lora_B"}, "missing"),
        ({"change": {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32)}}, "lm_head"),
        ({"change": {"base_model.model.model.norm.weight": torch.zeros(32)}}, "no LoRA matrix"),
        ({"change": {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.zeros(3, 7)}}, "32 x 7"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tokenizer, tmp_path, settings, message):
    write_adapter(tmp_path / "one", 0, **settings)
    with pytest.raises(ArtifactError, match=message):
        engine_of("torch", tokenizer).load_adapter("one", tmp_path / "one")
