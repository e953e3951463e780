"""The reference runner: any Llama in plain PyTorch, on any device, over a pool of cache blocks.

    keys, values    (L, blocks, 16, K, E)    one pool for all sequences; which block is whose is in the spans

All new tokens of a step go through the model as one row of N tokens, whatever sequence they belong to; only attention
knows the difference. There the new keys and values are written first; then spans of similar size form *groups*, padded
to a rectangle, and a group gathers the blocks of its sequences and attends under a mask:

    group of B spans, up to T new tokens, up to S positions:   q (B, T, H, E) against the gathered k, v (B, S, K, E)

The sums of a matrix product depend on its shape in their last bits, so a token's logits depend, that slightly, on what
was read beside it. `invariant=True` reads one token at a time: slow, and the same bits in any company. The property
tests of the engine run on it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.inference.adapters import Adapter
from puna.inference.pool import Pool
from puna.inference.room import bytes_per_token
from puna.inference.spans import BLOCK_TOKENS, Span, Window
from puna.inference.torch_adapters import Factors, apply_adapters, factors_like
from puna.inference.torch_scoring import score
from puna.kernels.logits import Logits
from puna.model.llama import Llama

_MOST_PADDING = 0.4  # the share of a group's scores that may be padding
_ALWAYS_PADDED = 1 << 16  # a group with so few scores is not split
_SCORES_AT_ONCE = 1 << 25  # of a head; longer prompts attend slice by slice


class TorchRunner:
    """Computes with `model` on the device that it lies on; `blocks` is the size of the pool.

    `kv` is how keys and values are kept: in the model's own type, or `int8` with a scale per token and head.
    """

    step_tokens = 512

    def __init__(
        self,
        model: Llama,
        *,
        blocks: int,
        block_tokens: int = BLOCK_TOKENS,
        kv: str = "model",
        invariant: bool = False,
    ):
        self.model, self.config = model, model.config
        self.blocks, self.block_tokens = blocks, block_tokens
        self.invariant = invariant
        weight = model.norm.weight
        self.device = weight.device
        self.block_bytes = bytes_per_token(self.config, weight.dtype.itemsize, kv) * block_tokens
        self._pool = Pool(self.config, blocks, block_tokens, weight.dtype, weight.device, kv)
        self._adapters: list[Factors] = []

    def add_adapter(self, adapter: Adapter) -> int:
        """Make a LoRA adapter known; its index for `Span.adapter`."""
        self._adapters.append(factors_like(adapter, self.model.norm.weight))
        return len(self._adapters) - 1

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another."""
        self._pool.copy(source, target)

    def forget(self) -> None:
        """Give the memory of the cache back."""
        self._pool.clear()

    def log_likelihoods(self, windows: Sequence[Window], vocab_size: int) -> list[float]:
        """The sum of log p of each window's last tokens, in nats; read in batches, without the cache."""
        return score(self.model, windows, vocab_size)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Logits:
        """Logits (sum of wanted, V) float32, in the order of the spans."""
        if self.invariant:
            singles = chain.from_iterable(map(_single, spans))
            logits = torch.cat([self._forward([span]) for span in singles])
        else:
            logits = self._forward(spans)
        return logits.numpy() if logits.device.type == "cpu" else logits

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        lengths = np.array([len(span.tokens) for span in spans])
        ends = lengths.cumsum()
        starts = np.array([span.start for span in spans])
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
        attend = self._attend(spans, positions, ends - lengths)
        tokens = self._tensor(list(chain.from_iterable(span.tokens for span in spans)))
        with apply_adapters(self.model, self._adapters, spans):
            hidden = self.model.hidden(tokens[None], self._tensor(positions)[None], attend)[0]  # (N, D)
        wanted = np.array([span.wanted for span in spans])
        if (wanted != lengths).any():
            rows = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, wanted)])
            hidden = hidden[self._tensor(rows)]
        return self.model.output(hidden).float()

    def _attend(self, spans: Sequence[Span], positions: np.ndarray, first: np.ndarray):
        """The attention of this step; `first` says where each span begins in the row of all tokens."""
        size, pool = self.block_tokens, self._pool
        tables = [np.array(span.blocks) for span in spans]
        slots = [
            table[np.arange(s.start, s.start + len(s.tokens)) // size]
            if len(s.tokens) > 1
            else table[[s.start // size]]
            for table, s in zip(tables, spans)
        ]
        at = self._tensor(np.concatenate(slots) * size + positions % size)
        groups = [self._group(spans, tables, members, first) for members in _groups(spans, size)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pool.write(layer, at, k[0], v[0])
            if len(groups) == 1 and groups[0].whole:
                return groups[0].attend(q[0], *pool.read(layer, groups[0].table))[None]
            out = torch.empty_like(q[0])
            for group in groups:
                out[group.scatter] = group.attend(q[0], *pool.read(layer, group.table))
            return out[None]

        return attend

    def _group(
        self, spans: Sequence[Span], tables: list[np.ndarray], members: list[int], first: np.ndarray
    ) -> "_Group":
        """The indices and the mask for the spans `members`, in their order."""
        T = max(len(spans[i].tokens) for i in members)
        ends = np.array([spans[i].start + len(spans[i].tokens) for i in members])
        M = -(-int(ends.max()) // self.block_tokens)
        table = np.zeros((len(members), M), dtype=np.int64)
        for row, i in enumerate(members):
            used = -(-int(ends[row]) // self.block_tokens)
            table[row, :used] = tables[i][:used]
        lengths = np.array([len(spans[i].tokens) for i in members])[:, None]
        column = np.arange(T)[None]
        gather = first[members][:, None] + np.minimum(column, lengths - 1)  # (B, T)
        real = column < lengths
        sees = np.array([spans[i].start for i in members])[:, None] + np.minimum(column, lengths - 1)  # (B, T)
        scatter = gather[real]
        return _Group(
            table=self._tensor(table),
            gather=self._tensor(gather),
            scatter=self._tensor(scatter),
            real=None if real.all() else self._tensor(real),
            sees=self._tensor(sees),
            whole=len(members) == len(spans) and bool((scatter == np.arange(len(scatter))).all()),
        )

    def _tensor(self, values) -> Tensor:
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values)
        return tensor.to(self.device, non_blocking=True)


@dataclass
class _Group:
    """Spans that attend together, padded to a rectangle of B spans and T tokens."""

    table: Tensor  # (B, M): the blocks of each
    gather: Tensor  # (B, T): where its tokens are among all
    scatter: Tensor  # (n,): where the results of the real ones go
    real: Tensor | None  # (B, T): which are no padding; None if all
    sees: Tensor  # (B, T): the last position that each sees
    whole: bool  # these are all tokens of the step, in order
    mask: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the group's tokens among `q` (N, H, E) to `k`, `v` (B, S, K, E): (n, H, E), without padding.

        The G = H/K query heads that share a key/value head are its queries, so that nothing is repeated.
        """
        (B, T), (_, S, K, E) = self.gather.shape, k.shape
        q = q[self.gather] if not (self.whole and self.real is None) else q.view(B, T, *q.shape[1:])
        G = q.shape[2] // K
        q = q.view(B, T, K, G, E).permute(0, 2, 1, 3, 4)  # (B, K, T, G, E)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        step = max(1, _SCORES_AT_ONCE // (B * G * S))
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, t : t + step].reshape(B, K, -1, E),
                k,
                v,
                attn_mask=self._mask(t, min(t + step, T), G, S, q.dtype),
            )
            for t in range(0, T, step)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        out = out.view(B, K, T, G, E).permute(0, 2, 1, 3, 4).reshape(B, T, K * G, E)
        return out.flatten(0, 1) if self.real is None else out[self.real]

    def _mask(self, begin: int, end: int, G: int, S: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, (end - begin) G, S): what is added to the scores. Made once for all layers if there is one slice."""
        if self.mask is None or end - begin < self.gather.shape[1]:
            ahead = torch.arange(S, device=self.sees.device) > self.sees[:, begin:end, None]  # (B, t, S)
            mask = torch.zeros(ahead.shape, dtype=dtype, device=ahead.device).masked_fill_(ahead, -torch.inf)
            self.mask = mask.repeat_interleave(G, 1)[:, None] if G > 1 else mask[:, None]
        return self.mask


def _groups(spans: Sequence[Span], block_tokens: int) -> Iterator[list[int]]:
    """Indices of spans of similar size. If padding is affordable all go together, in their own order."""

    def size(i: int) -> tuple[int, int]:
        return len(spans[i].tokens), -(-(spans[i].start + len(spans[i].tokens)) // block_tokens) * block_tokens

    def padded(members: list[int]) -> bool:
        sizes = [size(i) for i in members]
        scores = len(sizes) * max(t for t, _ in sizes) * max(s for _, s in sizes)
        return scores > _ALWAYS_PADDED and sum(t * s for t, s in sizes) < (1 - _MOST_PADDING) * scores

    everyone = list(range(len(spans)))
    if not padded(everyone):
        yield everyone
        return
    group: list[int] = []
    for i in sorted(everyone, key=size):
        if group and padded([*group, i]):
            yield group
            group = []
        group.append(i)
    yield group


def _single(span: Span) -> Iterator[Span]:
    """The span token by token."""
    for i, token in enumerate(span.tokens):
        wanted = int(i >= len(span.tokens) - span.wanted)
        yield Span([token], span.start + i, span.blocks, wanted, span.adapter)
