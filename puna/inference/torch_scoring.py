"""The likelihood of windows of text under a model in plain PyTorch: batches of similar lengths, padded on the right."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from puna.inference.spans import Window
from puna.model.llama import Llama, attend_with

BATCH_TOKENS = 8192  # read at once, padding included
_LOGITS_AT_ONCE = 1 << 24  # 64 MB of float32


def score(model: Llama, ordered: Sequence[Window], vocab_size: int) -> list[float]:
    """The sums of windows of ascending length, read by `model` in batches."""
    return [value for batch in _batches(ordered) for value in _score(model, batch, vocab_size)]


def _batches(ordered: Sequence[Window]) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in ordered:
        if batch and (len(batch) + 1) * len(window.tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _score(model: Llama, batch: list[Window], vocab_size: int) -> list[float]:
    width = max(len(w.tokens) for w in batch) - 1
    tokens = torch.zeros(len(batch), width + 1, dtype=torch.int64)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, window in enumerate(batch):
        length = len(window.tokens)
        tokens[row, :length] = torch.tensor(window.tokens)
        wanted[row, length - 1 - window.scored : length - 1] = True
    device = model.norm.weight.device
    tokens, wanted = tokens.to(device), wanted.to(device)
    positions = torch.arange(width, device=device).expand(len(batch), width)
    hidden = model.hidden(tokens[:, :-1], positions, attend_with(None))[wanted]  # (N, D)
    losses = [
        F.cross_entropy(model.output(h).float()[:, :vocab_size], target, reduction="none")
        for h, target in zip(*(x.split(max(1, _LOGITS_AT_ONCE // vocab_size)) for x in (hidden, tokens[:, 1:][wanted])))
    ]
    per_token = torch.cat(losses).double()
    return [-float(part.sum()) for part in per_token.split([w.scored for w in batch])]
