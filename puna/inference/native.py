"""The model in the C++ kernels' hands: the runner that the engine uses on a CPU where the kernels were built.

The whole network, from tokens to logits, is one call into the library. What a token gets depends on its own sequence
alone, bit for bit: not on the batch, nor on how a prompt was cut up.

`NativeRunner.load` takes a checkpoint in straight from its file, `NativeRunner.of` the weights of a model in memory.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puna.inference.adapters import Adapter
from puna.inference.intake import Numbers, Source, in_memory, open_source, read_network
from puna.inference.room import cache_blocks, memory
from puna.inference.spans import Span, Window
from puna.kernels import native
from puna.kernels.logits import at, best
from puna.model.opening import Dtype
from puna.model.sizes import LlamaConfig

if TYPE_CHECKING:
    from puna.model.llama import Llama

_ROWS_AT_ONCE = 1 << 24  # logits: 64 MB


def unfit(config: LlamaConfig) -> str | None:
    """Why the kernels cannot run a model of this shape here; None if they can."""
    if why := native.why_not():
        return why
    if config.head_dim % 16 or config.head_dim > 1024:
        return f"a head of {config.head_dim} is not a multiple of 16"
    return None


class NativeRunner:
    """A network with its cache. `blocks` or `cache_bytes` say how large, `kv` how keys and values are kept: "model" is
    the type that the weights are asked in, and bfloat16 for codes; "int8" quarters it."""

    block_tokens = native.BLOCK_TOKENS
    step_tokens = 128

    def __init__(
        self,
        source: Source,
        *,
        threads: int,
        kv: str = "model",
        blocks: int | None = None,
        cache_bytes: int | None = None,
    ):
        c = self.config = source.config
        self.network = read_network(source, threads)
        wide = not source.codes and source.numbers.dtype != "bfloat16"
        self._kind = "int8" if kv == "int8" else "float32" if wide else "bfloat16"
        self.block_bytes = self._new_cache(1).block_bytes
        self.blocks = cache_blocks(c, self.block_bytes, memory(), blocks=blocks, cache_bytes=cache_bytes)
        self.cache = self._new_cache(self.blocks)
        self._scoring: native.Cache | None = None

    @classmethod
    def load(cls, path: Path, *, dtype: Dtype = "float32", packed: bool = True, **settings: object) -> "NativeRunner":
        """The runner for the checkpoint at `path`, of any format. Raises `ArtifactError`.

        `packed` keeps bfloat16 in 12 bits: the same logits, sooner.
        """
        with open_source(Path(path), Numbers(native.dtype_name(dtype), packed)) as source:
            return cls(source, **settings)

    @classmethod
    def of(cls, model: "Llama", *, packed: bool = True, **settings: object) -> "NativeRunner":
        """The runner for a model in memory, which stays as it is."""
        return cls(in_memory(model, packed), **settings)

    def forward(self, spans: Sequence[Span]) -> np.ndarray:
        """Logits (sum of wanted, V) float32; see `spans.Runner`."""
        return self._forward(spans, self.cache)

    def copy_block(self, source: int, target: int) -> None:
        self.cache.copy(source, target)

    def forget(self) -> None:
        """Nothing of the cache is needed any more: its memory goes back to the system."""
        self.cache.forget()

    def add_adapter(self, adapter: Adapter) -> int:
        """A LoRA adapter that spans may ask for; returns its index."""
        index = self.network.adapter()
        for name, (down, up) in adapter.factors.items():
            _, layer, module = name.split(".", 2)
            self.network.adapt(index, int(layer), module.rpartition(".")[2], down, up)
        return index

    def log_likelihoods(self, windows: Sequence[Window], vocab_size: int) -> list[float]:
        """The sum of log p of each window's last tokens, in nats; in a cache of its own."""
        step = max(1, _ROWS_AT_ONCE // self.config.vocab_size)
        found = []
        for window in windows:
            needed = -(-len(window.tokens) // self.block_tokens)
            if self._scoring is None or self._scoring.blocks < needed:
                self._scoring = self._new_cache(max(needed, 64))
            read, total = len(window.tokens) - 1, 0.0  # the last token is predicted, not read
            begin = read - window.scored
            cuts = [0, *range(begin, read, step), read] if begin else [*range(0, read, step), read]
            for start, end in itertools.pairwise(cuts):
                wanted = end - max(start, begin)
                span = Span(window.tokens[start:end], start, list(range(needed)), max(0, wanted))
                logits = self._forward([span], self._scoring)
                if len(logits):
                    targets = np.array(window.tokens[end - len(logits) + 1 : end + 1])
                    sums = best(logits[:, :vocab_size], 1)[2]
                    total += float((at(logits, targets) - sums).sum(dtype=np.float64))
            found.append(total)
        if self._scoring is not None:
            self._scoring.forget()
        return found

    def _new_cache(self, blocks: int) -> native.Cache:
        c = self.config
        return native.Cache(self._kind, c.n_layers, blocks, c.n_kv_heads, c.head_dim)

    def _forward(self, spans: Sequence[Span], cache: native.Cache) -> np.ndarray:
        facts, blocks, tokens = [], [], []
        for span in spans:
            adapter = -1 if span.adapter is None else span.adapter
            facts.append((len(span.tokens), span.start, span.wanted, adapter, len(blocks), int(span.screened)))
            blocks += span.blocks
            tokens += span.tokens
        table = np.ascontiguousarray(np.array(facts, dtype=np.int64).T)
        ids = np.array(tokens, dtype=np.int32)
        return self.network.forward(cache, ids, table, np.array(blocks, dtype=np.int32))
