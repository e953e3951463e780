"""The runner for NVIDIA GPUs: fused kernels over a pool of cache blocks, and CUDA graphs for decoding.

    keys, values    (L, blocks + 1, 16, K, E)    one pool for all sequences; the last block is nobody's

A decode step of an 8B model is some 300 kernels of a few microseconds each: started one by one from Python they would
take several times longer than they run. So a step in which every span is one token is *captured* once per batch size
(1, 2, 4, ... 256) as a CUDA graph and then replayed on new inputs; a batch between two sizes is filled up. Steps that
read prompts, check guesses or use adapters are started one kernel at a time: they are long enough to hide it.

Attention does not depend on a token's company (`kernels/paged_attention.py`); matrix products do, in their last bits.

On a CPU the same code runs with the kernels' references, and a "captured" step is simply computed: that is how it is
tested where there is no GPU.
"""

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.inference.adapters import Adapter, tokens_of_adapters
from puna.inference.fused_llama import Additions, FusedLlama
from puna.inference.room import bytes_per_token
from puna.inference.spans import BLOCK_TOKENS, Span, Window
from puna.inference.step_inputs import SIZES, Buffers, Step, captured_size, filled_up, step_of
from puna.inference.torch_adapters import Factors, factors_like
from puna.inference.torch_scoring import score
from puna.kernels.logits import Logits
from puna.kernels.paged_attention import CHUNK
from puna.kernels.triton import why_not
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig

_SHARE = 0.9  # of the free memory that a cache of no given size may take, with what steps need beside it
_STEP_TOKENS = 8192  # that a step is expected to read at most


class CudaRunner:
    """Computes with `model` where it lies; `blocks` is the size of the pool.

    `graphs=False` starts every step kernel by kernel. With `fp8` the dense matrices of the layers are rounded to 8-bit
    floating-point numbers (e4m3, a scale per row); a quantised model's stay as they are.
    """

    step_tokens = 512

    def __init__(
        self,
        model: Llama,
        *,
        blocks: int,
        block_tokens: int = BLOCK_TOKENS,
        graphs: bool = True,
        fp8: bool = False,
        sizes: Sequence[int] = SIZES,
    ):
        self.model, self.config = model, model.config
        self.blocks, self.block_tokens = blocks, block_tokens
        weight = model.norm.weight
        self.device = weight.device
        self._llama = FusedLlama(model, fp8=fp8)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the matrices before they were joined
        c = self.config
        room = (c.n_layers, blocks + 1, block_tokens, c.n_kv_heads, c.head_dim)
        self.block_bytes = 2 * weight.dtype.itemsize * math.prod(room) // (blocks + 1)
        self._keys, self._values = (torch.zeros(room, dtype=weight.dtype, device=self.device) for _ in "kv")
        self._adapters: list[Factors] = []
        self._sizes = sizes if graphs else ()
        self._captured: dict[int, _Captured] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" and graphs else None

    def add_adapter(self, adapter: Adapter) -> int:
        """Make a LoRA adapter known; its index for `Span.adapter`."""
        self._adapters.append(factors_like(adapter, self.model.norm.weight))
        return len(self._adapters) - 1

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of one block to another."""
        for pool in (self._keys, self._values):
            pool[:, target] = pool[:, source]

    def log_likelihoods(self, windows: Sequence[Window], vocab_size: int) -> list[float]:
        """The sum of log p of each window's last tokens, in nats; read in batches, without the cache."""
        return score(self.model, windows, vocab_size)

    def forget(self) -> None:
        """The pool stays: captured steps know its address."""

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every size now, not when it is first needed."""
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            self._capture(size)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Logits:
        """Logits (sum of wanted, V) float32, in the order of the spans; they stay on the GPU."""
        logits = self._logits(spans)
        return logits.numpy() if self.device.type == "cpu" else logits

    def _logits(self, spans: Sequence[Span]) -> Tensor:
        step = step_of(spans, self.block_tokens, self.config.n_heads // self.config.n_kv_heads)
        size = captured_size(spans, self._sizes)
        if size is not None:
            captured = self._captured.get(size) or self._capture(size)
            filled = filled_up(step, size, self.blocks, self.block_tokens)
            if captured.holds(filled):
                return captured.run(filled)[: len(spans)].clone()  # the next replay writes there again
        return self._read(spans, step)

    def _read(self, spans: Sequence[Span], step: Step) -> Tensor:
        """A step of any kind, kernel by kernel."""
        buffers = Buffers(len(step.arrays["tokens"]), len(spans), step.arrays["table"].shape[1], self.device)
        buffers.send(step)
        rows = None if step.rows is None else torch.from_numpy(step.rows).to(self.device)
        added = self._added(spans)
        return self._llama.logits(self._hidden(buffers, step.short, step.most_chunks, step.most_tiles, added, rows))

    def _hidden(
        self, buffers: Buffers, short: int, chunks: int, tiles: int, added: Additions, rows: Tensor | None = None
    ) -> Tensor:
        ragged = buffers.ragged(short=short, most_chunks=chunks, most_tiles=tiles)
        at = (buffers.views[name] for name in ("tokens", "positions", "slots"))
        return self._llama.hidden(*at, self._keys, self._values, ragged, added, rows)

    def _added(self, spans: Sequence[Span]) -> Additions:
        added: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for index, tokens in tokens_of_adapters(spans).items():
            at = torch.tensor(tokens, device=self.device)
            for name, (a, b) in self._adapters[index].items():
                added.setdefault(name, []).append((at, a, b))
        return added

    def _capture(self, size: int) -> "_Captured":
        if size not in self._captured:
            self._captured[size] = _Captured(self, size)
        return self._captured[size]


@dataclass(frozen=True)
class _Room:
    """What a captured step of `size` spans has room for."""

    columns: int  # blocks of a sequence
    chunks: int


def room_for(size: int, config: LlamaConfig, blocks: int, block_tokens: int) -> _Room:
    """Every table of a sequence within the context, and as many chunks as the pool holds if its blocks are not shared.

    Sequences that share a long beginning may need more: such a step is not replayed.
    """
    positions = min(config.context, blocks * block_tokens)
    chunks = min(size * -(-positions // CHUNK), blocks * block_tokens // CHUNK + size)
    return _Room(-(-positions // block_tokens), max(chunks, size))


class _Captured:
    """A decode step of `size` spans with fixed shapes and addresses."""

    def __init__(self, runner: CudaRunner, size: int):
        self._room = room_for(size, runner.config, runner.blocks, runner.block_tokens)
        on_gpu = runner.device.type == "cuda"
        self._buffers = Buffers(size, size, self._room.columns, runner.device, pinned=on_gpu)
        self._graph: torch.cuda.CUDAGraph | None = None

        def compute() -> Tensor:
            return runner._llama.logits(runner._hidden(self._buffers, 1, self._room.chunks, 0, {}))

        self._compute = compute
        if on_gpu:
            self._record(runner, size)

    def holds(self, step: Step) -> bool:
        """Whether there is room for `step`."""
        fits = step.arrays["table"].shape[1] <= self._room.columns
        return fits and step.most_chunks <= self._room.chunks

    def run(self, step: Step) -> Tensor:
        """Logits (size, V), valid until the next run."""
        self._buffers.send(step)
        if self._graph is None:
            return self._compute()
        self._graph.replay()
        return self._logits

    def _record(self, runner: CudaRunner, size: int) -> None:
        nobodys = Span([0], 0, [runner.blocks])
        grouped = runner.config.n_heads // runner.config.n_kv_heads
        self._buffers.send(step_of([nobodys] * size, runner.block_tokens, grouped))
        aside = torch.cuda.Stream(runner.device)
        aside.wait_stream(torch.cuda.current_stream(runner.device))
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles the kernels, and lets libraries make their workspaces
                self._compute()
        torch.cuda.current_stream(runner.device).wait_stream(aside)
        torch.cuda.synchronize(runner.device)
        gc.collect()  # a tensor freed while the graph is recorded would be missed
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=runner._graph_memory):
            self._logits = self._compute()


def unfit(model: Llama, kv: str) -> str | None:
    """Why this runner cannot compute `model` with a cache of the kind `kv` where it lies; None if it can."""
    weight = model.norm.weight
    if weight.device.type != "cuda":
        return f"the model is on {weight.device}"
    if kv != "model":
        return f"kv={kv!r} is not supported on a GPU yet"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in {weight.dtype}"
    return why_not(weight)


def cache_bytes_of(free: int, config: LlamaConfig, dtype: torch.dtype) -> int:
    """What the cache may take of `free` bytes: most, less what a step needs beside it.

    That is a few vectors of the feed-forward width per token, logits of the largest captured step twice in float32, and
    the largest matrix expanded. At least one block.
    """
    widest = max(2 * config.ffn_dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim) + 4 * config.dim
    vectors = 2 * _STEP_TOKENS * widest * dtype.itemsize
    logits = 2 * SIZES[-1] * config.vocab_size * 4
    matrix = config.vocab_size * config.dim * dtype.itemsize
    block = bytes_per_token(config, dtype.itemsize) * BLOCK_TOKENS
    return max(int(_SHARE * free) - vectors - logits - matrix, block)
