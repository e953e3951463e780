"""How likely a text is: the sum of log p(token | everything before it), exact, for texts of any length.

A text that fits the context is read once. A longer one is read in windows of W = context tokens that end half a window
apart, and each token is scored in the first window that reaches it:

    window 1   |============|              scores its tokens, each with all that precedes it
    window 2        |=====:::::::|         scores the second half, each with at least W/2 tokens before it
    window 3              |=====:::::::|

Every window begins with the text's first token (the begin-of-text token), as every text did in training.
Windows of all texts are sorted by length and read in batches of similar ones, padded on the right.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from puna.inference.spans import Runner, Window
from puna.model.llama import Llama, attend_with

BATCH_TOKENS = 8192  # read at once, padding included
_LOGITS_AT_ONCE = 1 << 24  # 64 MB of float32


def windows(text: int, ids: list[int], given: int, context: int) -> Iterator[Window]:
    """The windows that score ids[given:], each token once. `given` is at least 1: the first token has no context."""
    begin = given
    while begin < len(ids):
        end = min(len(ids), max(context + 1, begin + max(1, context // 2)))
        start = max(0, end - 1 - context)
        yield Window(text, [ids[0], *ids[start + 1 : end]], end - begin)
        begin = end


def log_likelihoods(runner: Runner, texts: Sequence[tuple[list[int], int]], vocab_size: int) -> list[float]:
    """For each (ids, given) the sum of log p over ids[given:], in nats."""
    todo = [w for i, (ids, given) in enumerate(texts) for w in windows(i, ids, given, runner.config.context)]
    todo.sort(key=lambda w: len(w.tokens))
    sums = [0.0] * len(texts)
    for window, value in zip(todo, runner.log_likelihoods(todo, vocab_size)):
        sums[window.text] += value
    return sums


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
