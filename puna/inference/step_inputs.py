"""What a step of the GPU runner reads, as arrays: pure bookkeeping, no GPU in it.

A step over spans is a few rows of small integers. They are laid out in one buffer, so that one copy takes them to the
device; there the same layout says where each lies:

    tokens, positions, slots    (N,)        the new tokens, whatever span they are of, and where their keys go
    begins, starts, lengths     (B,)        where each span begins among the N, in its sequence, and how long it is
    chunks, tiles               (B + 1,)    how attention is divided (`kernels/paged_attention.py`)
    table                       (B, M)      the blocks of each span, padded with the last one

A captured CUDA graph has fixed shapes, so a step of pure decodes is *filled up* to a size that was captured. What fills
it is a span like any other: token 0 at position 0, in a block that is nobody's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from puna.inference.spans import Span
from puna.kernels.paged_attention import Ragged, divide

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of captured steps, in spans


@dataclass(frozen=True)
class Step:
    """The arrays of a step, int32, and what the host alone needs to know."""

    arrays: dict[str, np.ndarray]
    short: int  # tokens of the longest short span
    rows: np.ndarray | None  # tokens after which logits are wanted; None for all of them

    @property
    def most_chunks(self) -> int:
        return int(self.arrays["chunks"][-1])

    @property
    def most_tiles(self) -> int:
        return int(self.arrays["tiles"][-1])


def step_of(spans: Sequence[Span], block_tokens: int, grouped: int) -> Step:
    """The step that reads `spans`; `grouped` query heads share a key/value head."""
    lengths = np.array([len(span.tokens) for span in spans])
    starts = np.array([span.start for span in spans])
    begins = lengths.cumsum() - lengths
    positions = np.arange(lengths.sum()) + np.repeat(starts - begins, lengths)
    table = _table([span.blocks[: -(-end // block_tokens)] for span, end in zip(spans, starts + lengths)])
    blocks = table[np.repeat(np.arange(len(spans)), lengths), positions // block_tokens]
    division = divide(starts, lengths, grouped)
    wanted = np.array([span.wanted for span in spans])
    rows = None
    if (wanted != lengths).any():
        ends = begins + lengths
        rows = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, wanted)])
    arrays = {
        "tokens": np.fromiter(chain.from_iterable(span.tokens for span in spans), np.int32, len(positions)),
        "positions": positions,
        "slots": blocks * block_tokens + positions % block_tokens,
        "begins": begins,
        "starts": starts,
        "lengths": lengths,
        "chunks": division.chunks,
        "tiles": division.tiles,
        "table": table,
    }
    return Step({name: array.astype(np.int32) for name, array in arrays.items()}, division.short, rows)


def _table(lists: list[list[int]]) -> np.ndarray:
    table = np.empty((len(lists), max(map(len, lists))), np.int32)
    for row, blocks in zip(table, lists):
        row[: len(blocks)] = blocks
        row[len(blocks) :] = blocks[-1]
    return table


def captured_size(spans: Sequence[Span], sizes: Sequence[int] = SIZES) -> int | None:
    """The smallest captured size that holds `spans`; None if they are not all plain decodes, or too many."""
    plain = all(len(s.tokens) == 1 and s.wanted == 1 and s.adapter is None for s in spans)
    return next((size for size in sizes if size >= len(spans)), None) if plain else None


def filled_up(step: Step, size: int, nobodys: int, block_tokens: int) -> Step:
    """`step`, of plain decodes, with spans added up to `size`, that use the block `nobodys`."""
    a, more = step.arrays, size - len(step.arrays["begins"])
    if not more:
        return step
    last = int(a["chunks"][-1])
    table = np.full((more, a["table"].shape[1]), nobodys)
    added = {
        "tokens": np.zeros(more),
        "positions": np.zeros(more),
        "slots": np.full(more, nobodys * block_tokens),
        "begins": np.arange(size - more, size),
        "starts": np.zeros(more),
        "lengths": np.ones(more),
        "chunks": np.arange(last + 1, last + 1 + more),
        "tiles": np.zeros(more),
        "table": table,
    }
    arrays = {name: np.concatenate((a[name], new.astype(np.int32))) for name, new in added.items()}
    return Step(arrays, step.short, step.rows)


class Buffers:
    """Room for the arrays of steps of `tokens` tokens and `spans` spans, whose tables have up to `columns` columns.

    `views` are the tensors on the device; they stay where they are, whatever is sent.
    """

    def __init__(self, tokens: int, spans: int, columns: int, device: torch.device, *, pinned: bool = False):
        lengths = dict.fromkeys(("tokens", "positions", "slots"), tokens)
        lengths |= dict.fromkeys(("begins", "starts", "lengths"), spans)
        lengths |= {
            "chunks": spans + 1,
            "tiles": spans + 1,
            "table": spans * columns,
        }  # the table last: it may be short
        self._at, end = {}, 0
        for name, length in lengths.items():
            self._at[name] = slice(end, end + length)
            end = -(-(end + length) // 4) * 4  # of 16 bytes: what a kernel reads at once
        self._host = torch.zeros(end, dtype=torch.int32, pin_memory=pinned)
        self._array = self._host.numpy()
        self._device = torch.zeros(end, dtype=torch.int32, device=device)
        self.views = {name: self._device[at] for name, at in self._at.items()}
        self.views["table"] = self.views["table"].view(spans, columns)
        self.columns = columns

    def send(self, step: Step) -> None:
        """Take the arrays of `step`, which must fit, to the device."""
        for name, array in step.arrays.items():
            if name != "table":
                self._array[self._at[name]] = array
        table = step.arrays["table"]
        room = self._array[self._at["table"]].reshape(len(table), self.columns)
        room[:, : table.shape[1]] = table
        self._device.copy_(self._host)

    def ragged(self, *, short: int, most_chunks: int, most_tiles: int) -> Ragged:
        """The spans for attention, with these bounds."""
        names = ("begins", "starts", "lengths", "table", "chunks", "tiles")
        views = {name: self.views[name] for name in names}
        return Ragged(**views, short=short, most_chunks=most_chunks, most_tiles=most_tiles)
