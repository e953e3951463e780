"""Llama's sharding table: which dimension of each weight is cut by tensor parallelism, and what its module then does.

    tok_embeddings  rows       each rank looks up its part of the vocabulary; the sum is dealt out along the sequence
    wq wk wv w1 w3  rows       whole heads, or a part of the feed-forward width; nothing to exchange
    wo w2           columns    partial sums over the ranks, added while they are dealt out along the sequence
    norms           not cut    each rank normalises its part of the sequence
    head            not cut    a reward model's: each rank computes all rewards
    output          rows       a part of the vocabulary; `loss.py` puts the loss together

Between the cut matrices the residual stream is cut along the sequence (sequence parallelism, Korthikanti et al. 2022,
arXiv 2205.05198), or with `sequence_parallel=False` whole on every rank. The model's code knows nothing of this: PyTorch's
parallel styles wrap its modules.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from puna.parallel.mesh import Mesh

CUT = {  # by the last name before `.weight`: PyTorch's dimension, 0 the rows (outputs), 1 the columns (inputs)
    "tok_embeddings": 0,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "w1": 0,
    "w3": 0,
    "wo": 1,
    "w2": 1,
}


def cut_dimension(name: str) -> int | None:
    """The dimension of the weight `name` that tensor parallelism cuts; None for norms, which every rank has whole."""
    return CUT.get(name.split(".")[-2])


def apply(stage: nn.Module, mesh: Mesh) -> None:
    """Cut the weights of a stage and wrap its modules. They may be on the meta device."""
    spread = Shard(1) if mesh.layout.sequence_parallel else Replicate()
    norm = SequenceParallel() if mesh.layout.sequence_parallel else _Whole()
    outside: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=spread),
        "norm": norm,
        "output": ColwiseParallel(),
        "head": _Copied(),
    }
    present = {name: style for name, style in outside.items() if hasattr(stage, name)}
    parallelize_module(stage, mesh.tensor, present)
    for block in stage.layers.values():
        plan = {
            "attention_norm": norm,
            "attention": _gathered(spread, 3),
            **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
            "attention.wo": RowwiseParallel(output_layouts=spread),
            "ffn_norm": norm,
            "feed_forward": _gathered(spread, 1),
            **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
            "feed_forward.w2": RowwiseParallel(output_layouts=spread),
        }
        parallelize_module(block, mesh.tensor, plan)


def _gathered(spread: Shard | Replicate, arguments: int) -> PrepareModuleInput:
    """The first argument of a module whole on every rank, as a DTensor: its gradients are summed once, not per matrix."""
    rest = (None,) * (arguments - 1)
    return PrepareModuleInput(
        input_layouts=(spread, *rest), desired_input_layouts=(Replicate(), *rest), use_local_output=False
    )


class _Whole(ParallelStyle):
    """A module that every rank runs whole, on whole inputs."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_module, inputs, mesh):
            first = inputs[0]
            wrapped = first if isinstance(first, DTensor) else DTensor.from_local(first, mesh, [Replicate()])
            return (wrapped, *inputs[1:])

        return distribute_module(module, device_mesh, input_fn=enter)


class _Copied(ParallelStyle):
    """A module whose weights every rank has whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)
