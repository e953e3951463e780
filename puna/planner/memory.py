"""What a rank must hold, by kind, before anything runs.

    parameters     the stored weights: this rank's share after tensor, pipeline and FSDP cuts
    gradients      of those weights, float32
    optimizer      AdamW's two moments
    activations    what the forward pass keeps for the backward pass, of all micro-batches in flight
    head           logits and their gradient on the last stage
    communication  gathered weights and other buffers of collectives
    cache          keys and values, when serving

Activations of one layer and token, in units of its compute dtype, with widths d (model), q (query heads), k (key/value
heads), f (feed-forward): two norms keep their input and output (4 d); attention keeps q, k, v and its output (2 q + 2 k)
and a float32 sum per head; SwiGLU keeps both products and their combination (3 f, 4 f when nothing is fused). Tensor
parallelism divides the parts between the cut matrices, with sequence parallelism the rest as well (arXiv 2205.05198).
Our trainer (`autocast`) keeps the stream in float32, each norm's input and unscaled output, and for each of the five
products that read it a cast, which tensor ranks gather before and keep whole.
"""

from dataclasses import dataclass, fields, replace

from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner.work import (
    Work,
    gathers_layers,
    layers_on,
    local_tokens,
    microbatches,
    stage_counts,
)

CHUNK = 1024  # tokens whose logits are made at a time by `kernels.cross_entropy`
BUFFERED_LAYERS = 2  # gathered at a time by FSDP: the one in use and the next


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank, by kind."""

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    head: float = 0
    communication: float = 0
    cache: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def by_kind(self) -> dict[str, float]:
        """The kinds that are not zero, largest first."""
        kinds = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def memory_per_rank(config: LlamaConfig, layout: Layout, work: Work, pipeline_rank: int | None = None) -> Memory:
    """Bytes of one rank: of `pipeline_rank`, or of the one that needs most. Raises `ConfigError` if nothing fits."""
    if pipeline_rank is None:
        found = (memory_per_rank(config, layout, work, rank) for rank in _heaviest_ranks(layout))
        return max(found, key=lambda memory: memory.total)
    held = rank_parameters(config, layout, work, pipeline_rank)
    own = sharded(held, layout)
    return Memory(
        parameters=own * work.master_bytes,
        gradients=own * work.gradient_bytes,
        optimizer=own * work.optimizer_bytes,
        activations=_activations(config, layout, work, pipeline_rank) * work.activation_copies,
        head=_head(config, layout, work) if pipeline_rank == layout.pipeline - 1 else 0,
        communication=_communication(config, layout, work, pipeline_rank, held),
    )


def _heaviest_ranks(layout: Layout) -> list[int]:
    """Pipeline ranks of which one holds most: the first two, which have most in flight, and the last with the head."""
    if layout.layers_per_stage:
        return list(range(layout.pipeline))
    return sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})


def rank_parameters(config: LlamaConfig, layout: Layout, work: Work, pipeline_rank: int) -> float:
    """Weights a rank works with, after tensor and pipeline cuts, before FSDP's."""
    layers = layers_on(config, layout, work, pipeline_rank)
    norms = 2 * config.dim * layers
    matrices = (config.layer_parameters - 2 * config.dim) * layers
    table = config.vocab_size * config.dim
    first, last = pipeline_rank == 0, pipeline_rank == layout.pipeline - 1
    if last:
        norms += config.dim
    matrices += table * (1 if config.tied and first and last else first + last)
    return matrices / layout.tensor + norms


def sharded(parameters: float, layout: Layout) -> float:
    """Weights that a rank stores of those it works with: FSDP cuts each over all ranks with other tokens, context's too."""
    return parameters / (layout.shard * layout.context)


def in_flight(layout: Layout, work: Work, pipeline_rank: int) -> float:
    """How many micro-batches' activations of all its layers a rank holds at most.

    With p ranks before this one and Llama 3's tunable N (P by default; arXiv 2407.21783, 3.3.2). 1F1B: N - p, as far as
    that many come here before the first comes back, 2 (P - p) - 1. Interleaved, in pieces of 1/stages_per_rank:
    2 (P - 1 - p) + (v - 1) N + 1 (arXiv 2104.04473). `parallel.schedule` plays the order itself; a test compares.
    """
    P, v, M = layout.pipeline, layout.stages_per_rank, microbatches(layout, work)
    N = min(layout.in_flight or P, M)
    if P == 1:
        return 1
    if v == 1:
        return min(M, max(1, (layout.in_flight or P) - pipeline_rank), 2 * (P - pipeline_rank) - 1)
    return min(M * v, 2 * (P - 1 - pipeline_rank) + (v - 1) * N + 1) / v


def layer_activations(config: LlamaConfig, layout: Layout, work: Work) -> float:
    """Bytes that one layer keeps for one token of its rank, without recomputation."""
    c, tp = work.activation_bytes, layout.tensor
    d, f = config.dim, config.ffn_dim
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    between = tp if layout.sequence_parallel else 1
    if work.autocast:  # each of wq, wk, wv, w1, w3 casts what it reads for itself, gathered before and kept whole
        norms = 2 * (8 * d + 4) + 5 * c * d * between
        inner = c * (2 * q + 2 * k + 4 * f)
    else:
        norms = 2 * (2 * c * d + 4)
        inner = c * (2 * q + 2 * k + (3 if work.compiled else 4) * f)
    rows = c * config.n_heads * work.sequence_length if work.masked else 4 * config.n_heads  # else log-sums, float32
    return norms / between + (inner + rows) / tp


def kept_activations(config: LlamaConfig, layout: Layout, work: Work) -> float:
    """Bytes that one layer keeps for one token under the recomputation mode (`work.Recompute`).

    full: its input. attention: that, and what attention made. selective: that, and every second product, as torchtitan
    counts them (wq, wv, w1, w2). products: all seven of them.
    """
    c, tp = work.activation_bytes, layout.tensor
    stream = 4 if work.autocast else c
    between = tp if layout.sequence_parallel else 1
    d, f = config.dim, config.ffn_dim
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if work.recompute == "none":
        return layer_activations(config, layout, work)
    held = stream * d / between
    if work.recompute == "full":
        return held
    # Attention's output and its log-sums; where it is written out, its scores are a product like others.
    scores = (c * config.n_heads * work.sequence_length if work.recompute == "products" else 0) if work.masked else None
    held += (c * q + (4 * config.n_heads if scores is None else scores)) / tp
    made = {"attention": (0, 0), "selective": (d, q + k + f), "products": (2 * d, q + 2 * k + 2 * f)}
    outside, inside = made[work.recompute]  # of products: added to the stream, or between two cut matrices
    return held + c * (outside / between + inside / tp)


def made_again(config: LlamaConfig, layout: Layout, work: Work) -> float:
    """Bytes for each token by which recomputation makes a layer whole again while its backward pass runs."""
    if work.recompute == "none":
        return 0.0
    stored = kept_activations(config, layout, work) - kept_activations(config, layout, replace(work, recompute="full"))
    return max(0.0, layer_activations(config, layout, work) - stored)


def _activations(config: LlamaConfig, layout: Layout, work: Work, pipeline_rank: int) -> float:
    tokens = local_tokens(layout, work)
    layers = layers_on(config, layout, work, pipeline_rank)
    held = in_flight(layout, work, pipeline_rank) * layers * kept_activations(config, layout, work)
    if layers:
        held += made_again(config, layout, work)
    if pipeline_rank == 0:
        held += 8  # token numbers
    if pipeline_rank == layout.pipeline - 1:
        held += (8 if work.autocast else 2 * work.activation_bytes) * config.dim + 4  # the last norm
    if work.autocast:
        held += 4 * config.head_dim  # the rotation, complex64
    return held * tokens


def head_kept(config: LlamaConfig, layout: Layout, work: Work) -> float:
    """Of the head, what is kept for the backward pass: logits and log-sums, or the finished gradients of a chunked loss."""
    vocabulary, tokens = config.vocab_size / layout.tensor, local_tokens(layout, work)
    if work.chunked_loss:
        return 4 * vocabulary * config.dim + work.activation_bytes * config.dim * tokens
    return tokens * vocabulary * (work.activation_bytes + 4)


def _head(config: LlamaConfig, layout: Layout, work: Work) -> float:
    """What is kept, and while it is made the logits' gradient, or one chunk of logits."""
    vocabulary, tokens = config.vocab_size / layout.tensor, local_tokens(layout, work)
    passing = min(CHUNK, tokens) * (4 + work.activation_bytes) if work.chunked_loss else 4 * tokens
    return head_kept(config, layout, work) + vocabulary * passing


def _communication(config: LlamaConfig, layout: Layout, work: Work, pipeline_rank: int, held: float) -> float:
    c = work.activation_bytes
    found = 0.0
    layer = config.layer_parameters / layout.tensor
    cut = layout.shard * layout.context > 1
    if cut and gathers_layers(layout, work):
        largest = max(layer, config.vocab_size * config.dim / layout.tensor)
        found += c * (largest + (BUFFERED_LAYERS - 1) * layer)  # gathered weights
        found += work.gradient_bytes * layer  # a layer's gradients before they are reduced
    elif cut:
        found += c * held  # all weights, for the step
        found += work.gradient_bytes * layer * max(1, max(stage_counts(config, layout, work)))
    elif (
        work.autocast
    ):  # the casts of the weights, which the backward pass reads again: of a layer, if it is made again
        found += c * (held if work.recompute == "none" else layer)
    if layout.tensor > 1 and layout.sequence_parallel:
        found += c * local_tokens(layout, work) * config.dim  # a gathered activation
    if layout.context > 1:  # keys and values of the whole sequence
        keys = config.n_kv_heads * config.head_dim / layout.tensor
        found += 2 * c * keys * local_tokens(layout, work) * layout.context
    return found


def serving_memory(config: LlamaConfig, *, bits: float, context: int = 0, sequences: int = 1) -> Memory:
    """Bytes to serve a model: weights at `bits` each, and the keys and values of `sequences` of `context` tokens.

    The cache is bfloat16. 8B takes 8 GB at 8 bits and half of that at 4, as Meta's announcement of Llama 3.1 says.
    """
    cache = config.kv_bytes_per_token() * context * sequences
    return Memory(parameters=config.parameters * bits / 8, cache=cache)
