"""What a training step computes, and how: all that time and memory depend on besides the model and the layout."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from puna.config import require
from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout

# What is kept for the backward pass, most first; the rest is made again.
#   none       everything is kept
#   products   what products and attention made (`speed.recompute=selective` of our trainer)
#   selective  attention and every second product (torchtitan's, in bf16)
#   attention  attention alone (torchtitan's in fp8: its list of what to save had bf16 products only)
#   full       each layer's input
Recompute = Literal["none", "products", "selective", "attention", "full"]
BYTES = {"fp8": 2, "bf16": 2, "fp32": 4}  # of an activation; fp8 products still keep bf16 activations


@dataclass(frozen=True, kw_only=True)
class Work:
    """One optimizer step. The defaults are those of a compiled run in bfloat16 with FSDP."""

    sequence_length: int = 8192  # tokens
    rows: int = 16  # sequences of a step, over all ranks
    precision: Literal["bf16", "fp8", "fp32"] = "bf16"  # of the products
    recompute: Recompute = "none"
    attention: Literal["flash2", "cudnn", "flash3", "plain"] = "flash3"  # the kernel
    masked: bool = False  # attention with a written-out mask: its probabilities are kept
    compiled: bool = True  # elementwise operations are fused
    complex_rotation: bool = False  # turned as complex numbers, which torch.compile leaves unfused (Meta's own code)
    copied_heads: bool = False  # keys and values are written out for each query head before attention
    cast_bytes: int = 6  # of finding an fp8 scale and casting, a number: read twice, written by rows and by columns
    autocast: bool = False  # weights and residual stream stay float32, products cast (our trainer in one process)
    chunked_loss: bool = False  # the logits are never held whole (`kernels.cross_entropy`)
    tensor_hidden: float = 0.0  # share of tensor-parallel exchanges that runs beside products; 1: all that can
    fused_optimizer: bool = True  # AdamW in one kernel
    gather: Literal["auto", "layer", "step"] = "auto"  # FSDP: weights gathered for each layer, or once for the step
    uneven_ends: bool = False  # stages may be the embedding or the output alone (Llama 3.1 405B)
    gradient_bytes: int = 4  # float32, as the paper sums them
    master_bytes: int = 4  # of a stored weight
    optimizer_bytes: int = 8  # AdamW's two moments in float32
    activation_copies: float = 1.0  # what an allocator keeps on top: 1 is nothing

    def __post_init__(self) -> None:
        for name in ("sequence_length", "rows"):
            value = getattr(self, name)
            require(type(value) is int and value > 0, f"{name}={value!r} must be a whole number above 0")

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.sequence_length * self.rows

    @property
    def activation_bytes(self) -> int:
        return BYTES[self.precision]


def gathers_layers(layout: Layout, work: Work) -> bool:
    """Are weights gathered just before each layer and freed after it (else once, and kept for the step)?

    With a pipeline they are kept: gathering for each micro-batch would cost too much (arXiv 2407.21783, 3.3.2).
    """
    return work.gather == "layer" or (work.gather == "auto" and layout.pipeline == 1)


def microbatches(layout: Layout, work: Work) -> int:
    """Micro-batches of a data rank's rows of a step."""
    return max(1, layout.microbatches or (layout.pipeline if layout.pipeline > 1 else 1))


def microbatch_rows(layout: Layout, work: Work) -> float:
    """Rows of one micro-batch of one data rank. Raises `ConfigError` if a rank would get less than a row in all."""
    rows = work.rows / layout.data_ranks
    hint = f"give each step at least {layout.data_ranks} rows, or use fewer data ranks"
    require(rows >= 1, f"{work.rows} rows do not reach {layout.data_ranks} data ranks", hint=hint)
    return rows / microbatches(layout, work)


def local_tokens(layout: Layout, work: Work) -> float:
    """Tokens of one micro-batch on one rank (its context rank's share; tensor ranks share the same)."""
    return microbatch_rows(layout, work) * work.sequence_length / layout.context


def stage_counts(config: LlamaConfig, layout: Layout, work: Work) -> tuple[int, ...]:
    """Layers of each stage. With `uneven_ends` the first and last stage may have none: the embedding or output alone."""
    if layout.layers_per_stage:
        return tuple(len(part) for part in layout.stage_layers(config.n_layers))
    return _counts(config.n_layers, layout.pipeline, layout.stages_per_rank, work.uneven_ends)


@cache
def _counts(n_layers: int, pipeline: int, stages_per_rank: int, uneven_ends: bool) -> tuple[int, ...]:
    stages = pipeline * stages_per_rank
    if uneven_ends and n_layers + 2 == stages:
        return (0, *([1] * n_layers), 0)
    hint = "use fewer stages: each needs a layer"
    require(n_layers >= stages, f"{n_layers} layers cannot fill {stages} stages", hint=hint)
    layout = Layout(pipeline=pipeline, stages_per_rank=stages_per_rank)
    return tuple(len(part) for part in layout.stage_layers(n_layers))


def layers_on(config: LlamaConfig, layout: Layout, work: Work, pipeline_rank: int) -> int:
    """Layers whose weights a pipeline rank holds."""
    return sum(stage_counts(config, layout, work)[pipeline_rank :: layout.pipeline])
