"""What quantisation costs, measured: both models read held-out text side by side, layer by layer.

    kl                 mean over positions of KL(p || q): the original's whole distribution against the quantised model's,
                       in nats
    top1               share of positions where both find the same token likeliest
    perplexity_ratio   of the quantised model to the original's, on the text's own tokens

Logits of both are made for a few positions at a time and never kept, so that a vocabulary of 128K costs no memory. The
intervals are bootstrapped over the rows of the sample.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.evaluation import intervals
from puna.evaluation.scores import plain
from puna.log import track
from puna.model.sizes import LlamaConfig
from puna.quant.layers import Reader, block_of, embed, normalised, output_name, positions_at_once, rotation_of, through


@torch.no_grad()
def measure(
    config: LlamaConfig, original: Reader, quantised: Reader, tokens: Tensor, vocab_size: int
) -> dict[str, Any]:
    """The measures above on `tokens` (rows, length), int64; `vocab_size` is the tokenizer's. As plain JSON."""
    reference, other = embed(original, tokens), embed(quantised, tokens)
    rotation = rotation_of(config, tokens.shape[1])
    for index in track(range(config.n_layers), "quality", unit="layers"):
        through(block_of(original, config, index), reference, rotation)
        through(block_of(quantised, config, index), other, rotation)
    reference, other = normalised(original, config, reference), normalised(quantised, config, other)
    first, second = original(output_name(config))[:vocab_size], quantised(output_name(config))[:vocab_size]
    rows = [_row(a @ first.T, b @ second.T, t) for a, b, t in _chunks(config, reference, other, tokens)]
    return _report(_by_row(rows, tokens), tokens)


def _chunks(config: LlamaConfig, reference: Tensor, other: Tensor, tokens: Tensor):
    """Positions that predict a token of the text, a few at a time."""
    step = positions_at_once(config)
    wanted = (x[:, :-1].reshape(-1, config.dim) for x in (reference, other))
    return zip(*(x.split(step) for x in (*wanted, tokens[:, 1:].reshape(-1))))


def _row(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """KL, agreement, and both losses at each position, (positions, 4)."""
    p, q = F.log_softmax(first, -1), F.log_softmax(second, -1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    same = (first.argmax(-1) == second.argmax(-1)).float()
    return torch.stack([kl, same, -p.gather(1, target[:, None])[:, 0], -q.gather(1, target[:, None])[:, 0]], 1).double()


def _by_row(rows: Sequence[Tensor], tokens: Tensor) -> Tensor:
    return torch.cat(list(rows)).unflatten(0, (tokens.shape[0], -1)).mean(1)  # (rows, 4)


def _report(rows: Tensor, tokens: Tensor) -> dict[str, Any]:
    kl, same, before, after = rows.unbind(1)
    change = intervals.mean((after - before).tolist())
    ratio = {name: math.exp(min(getattr(change, name), 700.0)) for name in ("value", "low", "high")}
    return plain(
        {
            "kl": intervals.mean(kl.tolist()),
            "top1": intervals.mean(same.tolist()),
            "perplexity_ratio": ratio if len(rows) > 1 else {**ratio, "low": None, "high": None},
            "perplexity": {"original": math.exp(float(before.mean())), "quantised": math.exp(float(after.mean()))},
            "tokens": tokens.numel(),
        }
    )


def in_words(quality: dict[str, Any]) -> str:
    """One line for a person."""
    kl, top1, ratio = quality["kl"], quality["top1"], quality["perplexity_ratio"]["value"]
    return (
        f"on {quality['tokens']:,} held-out tokens: perplexity x {ratio:.4f}, KL {kl['value']:.5f} nats, "
        f"same first choice {top1['value']:.2%}"
    )
