"""Sizes by the family's rules: a Llama 3 of any number of parameters, with its learning rate and batch.

What the published table of sizes (`model.sizes`) has in common, from 1B to 405B, is kept for sizes below it:

    width / layers      102 to 130; narrower models are relatively deeper: 128 * sqrt(width / 2048) below 2,048
    head                128, 64 for 1B; below a width of 512 it is 32 or 16, so that there are several
    key/value heads     8 at most, and a divisor of the heads
    feed-forward        3.5 * width (1B 4, 3B 2.7, 405B 3.25), a multiple of 16 or more

Learning rate and batch follow the size as OLMo's ladder has them (0.0047 * (N / 108M)^(-1/3) / 2, and 2048 * 160 * (N /
108M)^(2/3) tokens, N without embeddings). A run beyond 20 tokens per parameter takes larger batches, with the square root
of its tokens (Zhang et al., arXiv 2410.21676: the batch that is worth its size grows with the data, about as D^0.47). Where
a run would have too few steps the batch is made smaller, and AdamW's rate with its square root; Muon's steps are as long
whatever the batch. Porian et al. (arXiv 2406.19146) show what it costs not to: a rate that suits one size moves the exponent.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from puna.model.sizes import LlamaConfig, RopeScaling

_LEAST_STEPS = 1000  # with 232 of AdamW's, 90K weights lost 2.83 nats where 1,043 smaller ones lose 2.41 (docs/log.md)
_TOKENS_PER_PARAMETER = 20.0  # up to here the ladder's batch
_HIGHEST_RATE = 0.012  # the ladder's rule was made for 60M to 1B; a few hundred thousand weights are still stable here
# Steps between widths: whole heads, and from 2,048 on eight of them at a time, so that eight key/value heads divide them.
_WIDTHS = [*range(16, 128, 16), *range(128, 512, 32), *range(512, 2048, 128), *range(2048, 3072, 512)]
_WIDTHS += range(3072, 32768, 1024)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A size's weights, in the three ways of counting. `matrices` are multiplied for each token: FLOPs come from them."""

    all: int
    matrices: int
    body: int


def counted(config: LlamaConfig) -> Counted:
    """How many parameters a size has, by each way of counting; the output head is a matrix whether or not it is tied."""
    head = config.vocab_size * config.dim
    body = config.parameters - head * (1 if config.tied else 2)
    norms = (2 * config.n_layers + 1) * config.dim
    return Counted(all=config.parameters, matrices=body - norms + head, body=body)


def of_width(dim: int, *, vocab_size: int, context: int, tied: bool = False) -> LlamaConfig:
    """The family's member of a width (a multiple of 16)."""
    head = 128 if dim >= 3072 else 64 if dim >= 512 else 32 if dim >= 128 else 16
    heads = max(1, dim // head)
    kv = max(k for k in range(1, min(8, max(1, heads // 2)) + 1) if heads % k == 0)
    multiple = 256 if dim >= 2048 else 16
    layers = max(2, round(dim / (128 * min(1.0, math.sqrt(dim / 2048)))))
    return LlamaConfig(
        dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv, head_dim=head,
        ffn_dim=multiple * math.ceil(3.5 * dim / multiple), vocab_size=vocab_size, context=context,
        rope_theta=500_000.0, rope_scaling=RopeScaling(original_context=8192) if context > 8192 else None, tied=tied,
    )  # fmt: skip


def of_size(matrices: float, *, vocab_size: int, context: int, tied: bool = False) -> LlamaConfig:
    """The member whose matrices hold about this many weights: width by the rules, then layers moved by a few to fit."""
    members = (of_width(w, vocab_size=vocab_size, context=context, tied=tied) for w in _WIDTHS)
    near = sorted(members, key=lambda c: abs(math.log(counted(c).matrices / matrices)))[:3]
    varied = [
        replace(c, n_layers=layers)
        for c in near
        for layers in range(max(2, round(0.8 * c.n_layers)), max(c.n_layers + 1, round(1.25 * c.n_layers)) + 1)
    ]
    return min([*near, *varied], key=lambda c: abs(math.log(counted(c).matrices / matrices)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one run is trained: what changes with size and length."""

    learning_rate: float
    batch_tokens: int
    steps: int
    warmup_steps: int


def recipe_for(
    config: LlamaConfig, tokens: float, sequence_length: int, *, optimizer: Literal["adamw", "muon"] = "adamw"
) -> Recipe:
    """Learning rate, batch and steps for a size and its tokens. The batch is a whole number of sequences."""
    body, matrices = counted(config).body, counted(config).matrices
    longer = max(1.0, tokens / (_TOKENS_PER_PARAMETER * matrices))
    wanted = 2048 * 160 * (body / 108e6) ** (2 / 3) * math.sqrt(longer)
    batch = min(wanted, tokens / _LEAST_STEPS)
    rows = max(1, round(batch / sequence_length))
    batch = rows * sequence_length
    rate = min(_HIGHEST_RATE, 0.5 * 0.0047 * (body / 108e6) ** (-1 / 3))
    if optimizer == "adamw":
        rate *= math.sqrt(min(1.0, batch / wanted))
    steps = max(2, round(tokens / batch))
    return Recipe(learning_rate=rate, batch_tokens=batch, steps=steps, warmup_steps=max(1, min(steps // 10, 100)))
