"""From tokens to next-token logits: the model with its cache.

Prefill reads prompts, padded on the right to one length: under a causal mask nothing sees the padding behind it, and
what it leaves in the cache is overwritten before it is read. Decode reads one token of every running sequence.
"""

import torch
from torch import Tensor

from puna.inference.cache import KVCache
from puna.model.llama import Llama

PREFILL_CHUNK = 2048  # tokens of each prompt at a time: bounds the memory for activations and masks


class Runner:
    """The model and the keys and values of what it has read."""

    def __init__(self, model: Llama):
        self.model = model
        self.cache = KVCache(model.config, model.norm.weight.dtype)

    def prefill(self, prompts: list[list[int]], first: int, longest: int) -> Tensor:
        """Read `prompts` into slots `first`, ...; logits (B, V) float32 after the last token of each.

        A prompt that several requests share (samples of one answer) is read once. `longest` is how many positions a
        slot may come to need soon; it saves growing the cache step by step.
        """
        row_of: dict[tuple[int, ...], int] = {}
        rows = [row_of.setdefault(tuple(prompt), len(row_of)) for prompt in prompts]
        width = max(map(len, prompts))
        self.cache.reserve(first + len(prompts), max(width, longest))
        last = self._read(list(row_of), first, width)
        if len(row_of) < len(prompts):
            self.cache.spread(first, rows, width)
        return self.model.output(last).float()[rows]

    def _read(self, prompts: list[tuple[int, ...]], first: int, width: int) -> Tensor:
        """The hidden state (B, D) after the last token of each prompt, chunk by chunk."""
        lengths = torch.tensor([len(p) for p in prompts])
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        last = torch.empty(len(prompts), self.model.config.dim, dtype=self.model.norm.weight.dtype)
        for start in range(0, width, PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            positions = torch.arange(start, start + chunk.shape[1]).expand_as(chunk)
            hidden = self.model.hidden(chunk, positions, self.cache.prefill(first, start))
            ends = ((lengths > start) & (lengths <= start + chunk.shape[1])).nonzero()[:, 0]
            last[ends] = hidden[ends, lengths[ends] - 1 - start]
        return last

    def decode(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Read one token for each of the first n slots at its position; logits (n, V) float32."""
        self.cache.reserve(len(tokens), max(positions) + 1)
        at = torch.tensor(positions)
        attend = self.cache.decode(at)
        return self.model(torch.tensor(tokens)[:, None], at[:, None], attend)[:, 0].float()
