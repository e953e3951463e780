"""The seam between the engine and what computes: spans of tokens in, logits out.

A *span* is what one sequence reads in one step: a piece of its prompt, or the token that was drawn last. A *runner*
reads the spans of many sequences at once and keeps their keys and values in *blocks* of `block_tokens` positions. Which
block belongs to whom is the engine's business (`blocks.py`); a runner writes where it is told.

    sequence A   [b7][b2][b9..]        start 34, one new token:   position 34 lies in block b9
    sequence B   [b2']...              start 0, 20 new tokens:    they fill a block and a part of the next

The spans of one call are ragged: pieces of prompts and single tokens mix. `torch_runner.py` is the reference, plain
PyTorch on any device; `native.py` our C++ kernels. Logits are what crosses here: numpy arrays, which both kinds can give
and which need no PyTorch to be drawn from, or, on a GPU, tensors that stay there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from puna.kernels.logits import Logits
from puna.model.sizes import LlamaConfig

if TYPE_CHECKING:
    from puna.inference.adapters import Adapter

BLOCK_TOKENS = 16


@dataclass
class Span:
    """The new tokens of one sequence, and where its keys and values lie."""

    tokens: list[int]  # read at positions start, start + 1, ...
    start: int  # tokens of this sequence that the cache holds already
    blocks: list[int]  # the sequence's cache blocks in order; they cover start + len(tokens) positions
    wanted: int = 1  # logits are wanted after the last `wanted` tokens (0: none)
    adapter: int | None = None  # index of a LoRA adapter, None for none
    screened: bool = False  # only the likeliest tokens can be drawn: the other logits may be rougher


@dataclass(frozen=True)
class Window:
    """`tokens` are read; the last `scored` of them are scored, which belong to text `text`."""

    text: int
    tokens: list[int]
    scored: int


@runtime_checkable
class Runner(Protocol):
    """What computes. Its logits are numpy arrays, or PyTorch tensors that stay on their GPU (`kernels/logits.py`)."""

    config: LlamaConfig
    block_tokens: int  # positions per cache block
    blocks: int  # blocks in the pool; their memory is touched only when written
    block_bytes: int  # what a block takes in memory
    step_tokens: int  # the fewest that it reads at once about as fast as many

    def forward(self, spans: Sequence[Span]) -> Logits:
        """Logits (sum of wanted, V) float32, in the order of the spans.

        Of a span that is `screened` those of the likeliest tokens, some hundreds, are the same as without; a runner may
        compute the others with less precision, and need not.
        """
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of block `source` to block `target`, in every layer."""
        ...

    def forget(self) -> None:
        """Nothing in the cache is needed any more: its memory may go back to the system."""
        ...

    def add_adapter(self, adapter: "Adapter") -> int:
        """Take in a LoRA adapter; returns the index by which spans ask for it."""
        ...

    def log_likelihoods(self, windows: Sequence[Window], vocab_size: int) -> list[float]:
        """For each window, of ascending length, the sum of log p over its scored tokens, in nats."""
        ...
