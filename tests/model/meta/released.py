"""Every released family as a small model: true head counts, ratios, rotary base and width rule; narrow and shallow.

`split` cuts a model as the releases are cut. It is written from the description of the format and shares nothing with
the package's own writer, so that the two check each other.
"""

import json
from pathlib import Path

import torch

from puna.model.llama import Llama, attend_with
from puna.model.sizes import LlamaConfig, RopeScaling

L1 = {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
L2 = {"multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
BIG = {"n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}
L3 = {"n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0}
STRETCHED = {"use_scaled_rope": True}
SMALL = {"n_kv_heads": 8, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 500000.0, **STRETCHED}
VOCAB = 96

# name: (query heads, cut head width, the rest of params.json, numbers of files to try, the released one among them)
FAMILIES = {
    "llama-1-7b": (32, 4, L1, [1, 2, 4, 8]),
    "llama-1-13b": (40, 4, L1, [1, 2, 4, 8]),
    "llama-1-33b": (52, 2, L1, [1, 2, 4]),
    "llama-1-65b": (64, 2, {**L1, "norm_eps": 1e-5}, [1, 2, 4, 8]),
    "llama-2-7b": (32, 4, L2, [1, 2, 4, 8]),
    "llama-2-70b": (64, 2, {**BIG, "vocab_size": -1}, [1, 2, 4, 8]),
    "llama-3-8b": (32, 4, L3, [1, 2, 4, 8]),
    "llama-3-70b": (64, 2, {**BIG, "rope_theta": 500000.0}, [1, 2, 4, 8]),
    "llama-3.1-8b": (32, 4, {**L3, **STRETCHED}, [1, 2, 4, 8]),
    "llama-3.1-70b": (64, 2, {**BIG, "rope_theta": 500000.0, **STRETCHED}, [1, 2, 4, 8]),
    "llama-3.1-405b": (
        128,
        2,
        {**BIG, "ffn_dim_multiplier": 1.2, "rope_theta": 500000.0, **STRETCHED},
        [1, 2, 4, 8, 16],
    ),
    "llama-3.2-1b": (32, 2, {**SMALL, "ffn_dim_multiplier": 1.5}, [1, 2, 4, 8]),
    "llama-3.2-3b": (24, 4, {**SMALL, "ffn_dim_multiplier": 1.0}, [1, 2, 4, 8]),
}
CASES = [(name, shards) for name, (_, _, _, counts) in FAMILIES.items() for shards in counts]


def params_of(name: str) -> dict:
    heads, width, rest, _ = FAMILIES[name]
    return {"dim": heads * width, "n_layers": 2, "n_heads": heads, "vocab_size": VOCAB, **rest}


def model_of(name: str) -> Llama:
    """A random model of a family, with its shape worked out by hand."""
    heads, width, rest, _ = FAMILIES[name]
    dim, multiple = heads * width, rest["multiple_of"]
    ffn = int(int(8 * dim / 3) * rest.get("ffn_dim_multiplier", 1.0))
    scaled, tied = "use_scaled_rope" in rest, name.startswith("llama-3.2")
    context = {"llama-1": 2048, "llama-2": 4096, "llama-3": 131_072 if scaled else 8192}[name[:7]]
    config = LlamaConfig(
        dim=dim, n_layers=2, n_heads=heads, n_kv_heads=rest.get("n_kv_heads", heads), head_dim=width,
        ffn_dim=(ffn + multiple - 1) // multiple * multiple, vocab_size=VOCAB, context=context, norm_eps=rest["norm_eps"],
        rope_theta=rest.get("rope_theta", 10_000.0), tied=tied,
        rope_scaling=RopeScaling(factor=32.0 if tied else 8.0) if scaled else None,
    )  # fmt: skip
    model = Llama(config).init_weights(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # norms that differ from one another, so that a mix-up shows
                weight.normal_(1.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def split(model: Llama, shards: int, llama1: bool) -> list[dict[str, torch.Tensor]]:
    """The tensors of each of the `shards` files."""
    c, parts = model.config, [{} for _ in range(shards)]
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        for i, part in enumerate(parts):
            if weight.ndim == 1:
                cut = weight
            elif kind in ("wo", "w2") or (kind == "tok_embeddings" and c.rope_theta == 10_000.0):
                width = weight.shape[1] // shards
                cut = weight[:, i * width : (i + 1) * width]
            elif kind in ("wk", "wv") and shards > c.n_kv_heads:
                head = i * c.n_kv_heads // shards
                cut = weight[head * c.head_dim : (head + 1) * c.head_dim]
            else:
                height = weight.shape[0] // shards
                cut = weight[i * height : (i + 1) * height]
            part[name] = cut.clone().contiguous()
    frequencies = torch.arange(c.head_dim // 2).float()
    for part in parts:
        part["rope.freqs"] = frequencies
        if llama1:
            part |= {f"layers.{i}.attention.inner_attention.rope.freqs": frequencies for i in range(c.n_layers)}
    return parts


def release(folder: Path, name: str, shards: int) -> Llama:
    """Write a model of the family into `folder` as it would be released; returns it."""
    model = model_of(name)
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(split(model, shards, llama1=name.startswith("llama-1"))):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params_of(name)))
    return model


@torch.no_grad()
def logits(model: Llama) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12) * 7 % VOCAB
    return model(tokens, torch.arange(12).expand(2, 12), attend_with(None))


def same_weights(a: Llama, b: Llama) -> bool:
    theirs = b.state_dict()
    ours = a.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(w, theirs[n]) for n, w in ours.items())
