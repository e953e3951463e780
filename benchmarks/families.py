"""The released Llamas as `transformers` models, small enough to compare with: random weights, true structure.

Each row of `RELEASED` is what that release's own `config.json` says, written down apart from `puna.model.sizes` so that the
two check each other. `reference` builds `transformers.LlamaForCausalLM` from it with fewer layers, a narrower feed-forward
part and a vocabulary of little more than bytes; heads, their ratio and width, the model's width, rotary base and stretch, epsilon and tied
embeddings stay, unless a narrower head is asked for.

Three properties of the weights make what is compared sharp:

- Every number is one that bfloat16 and float16 hold exactly (eight leading bits, none below 2^-14). So one reference serves
  all formats, whatever they store, and a difference is the reader's or the model's and never a rounding of weights.
- Rows of the output matrix that do not belong to a printable ASCII character are a sixteenth as long. Greedy answers
  therefore are text with one character per token, and what an engine says tells which tokens it drew.
- Queries are three times as long as usual, so that heads look at single places and not at the mean of all: a rotation that
  is wrong shows at once, and a greedy answer wanders instead of running in a small circle.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from puna.tokenizer import Tokenizer

PRINTABLE = range(32, 127)
# The 256 bytes, and eight pairs that no text of ours has: llama.cpp wants some merges.
BYTES = Tokenizer(
    {bytes([byte]): byte for byte in range(256)} | {bytes([0, 128 + pair]): 256 + pair for pair in range(8)}
)
_SMALLEST = 2.0**-14  # float16's smallest normal number
_SHARP = 3.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """One release: the shape fields of its `config.json`, and how Meta stored it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    ffn: int
    vocabulary: int = 128_256
    context: int = 131_072
    theta: float = 500_000.0
    eps: float = 1e-5
    stretch: float | None = None  # `factor` of rope_scaling
    tied: bool = False
    shards: int = 1  # Meta's number of files
    stored: str = "BF16"  # Meta's number format


def _one(hidden: int, layers: int, heads: int, ffn: int, shards: int, eps: float = 1e-6) -> Family:
    return Family(
        hidden=hidden, layers=layers, heads=heads, kv_heads=heads, ffn=ffn, vocabulary=32_000, context=2048, theta=1e4,
        eps=eps, shards=shards, stored="F16",
    )  # fmt: skip


def _two(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, shards: int) -> Family:
    return Family(
        hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn, vocabulary=32_000, context=4096,
        theta=1e4, shards=shards,
    )  # fmt: skip


_SMALL = {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn": 14336}
_LARGE = {"hidden": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn": 28672, "shards": 8}

RELEASED: dict[str, Family] = {
    "llama-1-7b": _one(4096, 32, 32, 11008, 1),
    "llama-1-13b": _one(5120, 40, 40, 13824, 2),
    "llama-1-33b": _one(6656, 60, 52, 17920, 4),
    "llama-1-65b": _one(8192, 80, 64, 22016, 8, eps=1e-5),
    "llama-2-7b": _two(4096, 32, 32, 32, 11008, 1),
    "llama-2-13b": _two(5120, 40, 40, 40, 13824, 2),
    "llama-2-70b": _two(8192, 80, 64, 8, 28672, 8),
    "llama-3-8b": Family(**_SMALL, context=8192),
    "llama-3-70b": Family(**_LARGE, context=8192),
    "llama-3.1-8b": Family(**_SMALL, stretch=8.0),
    "llama-3.1-70b": Family(**_LARGE, stretch=8.0),
    "llama-3.1-405b": Family(
        hidden=16384, layers=126, heads=128, kv_heads=8, ffn=53248, stretch=8.0, shards=8
    ),
    "llama-3.2-1b": Family(
        hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, stretch=32.0, tied=True
    ),
    "llama-3.2-3b": Family(hidden=3072, layers=28, heads=24, kv_heads=8, ffn=8192, stretch=32.0, tied=True),
    "llama-3.3-70b": Family(**_LARGE, stretch=8.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a reference has less of than its family."""

    layers: int = 2
    ffn: int = 1024
    width: int = 1 << 30  # of the model, at most: heads are made narrower until it fits
    kv_heads: int | None = None  # that many groups of heads, of the true ratio; the model's width becomes `width`

    def head_dim(self, family: Family) -> int:
        """The widest power-of-two part of a true head with which the model fits."""
        width = family.head_dim
        while self.kv_heads is None and width > 2 and width * family.heads > self.width:
            width //= 2
        return width

    def told(self, family: Family) -> str:
        """What is cut, for a reader of the table."""
        parts = [f"{self.layers} of {family.layers} layers", f"feed-forward {self.ffn:,} of {family.ffn:,}"]
        if self.head_dim(family) != family.head_dim:
            parts.append(f"heads {self.head_dim(family)} of {family.head_dim} wide")
        if self.kv_heads is not None:
            parts.append(f"{self.kv_heads} of {family.kv_heads} groups of heads, width {self.width:,}")
        return ", ".join(parts)


def settings(family: Family, cut: Cut) -> dict[str, Any]:
    """The release's `config.json`, cut."""
    head_dim, ratio = cut.head_dim(family), family.heads // family.kv_heads
    kv_heads = cut.kv_heads or family.kv_heads
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "hidden_size": family.heads * head_dim if cut.kv_heads is None else cut.width,
        "num_hidden_layers": cut.layers,
        "num_attention_heads": kv_heads * ratio,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": cut.ffn,
        "vocab_size": BYTES.vocab_size,
        "max_position_embeddings": family.context,
        "rope_theta": family.theta,
        "rope_scaling": {"rope_type": "llama3", "factor": family.stretch, **scaling} if family.stretch else None,
        "rms_norm_eps": family.eps,
        "tie_word_embeddings": family.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BYTES.bos,
        "eos_token_id": None,
        "pad_token_id": None,
    }


@torch.no_grad()
def reference(family: Family, cut: Cut, seed: int) -> LlamaForCausalLM:
    """A `transformers` model in float32 whose weights any of the formats can hold exactly; see the module's text."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings(family, cut))).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():  # a tied output appears once, as the embedding
        if weight.ndim == 1:
            weight.normal_(1.0, 0.1, generator=generator)
        else:
            sharp = _SHARP if "q_proj" in name else 1.0
            weight.normal_(0.0, sharp * weight.shape[1] ** -0.5, generator=generator)
        if name.endswith("lm_head.weight") or (family.tied and name.endswith("embed_tokens.weight")):
            _quieten(weight)
        for rows in weight.split(1024):
            rows.copy_(rows.bfloat16())
            rows.masked_fill_(rows.abs() < _SMALLEST, 0.0)
    return model


def _quieten(weight: nn.Parameter) -> None:
    """Make all rows short but those of printable characters."""
    scale = torch.full((len(weight), 1), 1 / 16)
    scale[PRINTABLE.start : PRINTABLE.stop] = 1.0
    weight.mul_(scale)
