"""Weights on their way between a whole model and the parts that ranks hold, one tensor at a time.

First weights are those that one process draws for the same seed: every rank draws all of them in the same order and keeps
its part of each, so that the most it holds beside its parts is one matrix. The other way, a tensor's parts are gathered
and only rank 0 keeps them, for a checkpoint that does not know how it was laid out.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from puna.model.llama import Llama, draw
from puna.model.sizes import LlamaConfig
from puna.parallel.mesh import Mesh
from puna.parallel.stage import Stage
from puna.parallel.table import cut_dimension

Named = tuple[str, Tensor]


def first_weights(config: LlamaConfig, seed: int) -> Iterator[Named]:
    """The weights of `Llama(config).init_weights(seed)`, one after the other."""
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in [(name, weight.shape) for name, weight in model.named_parameters()]:
        weight = torch.empty(shape)
        draw(name, weight, config.n_layers, generator)
        yield name, weight


@torch.no_grad()
def fill(stages: list[Stage], weights: Iterable[Named], mesh: Mesh) -> None:
    """Copy this rank's parts of the whole `weights` into its stages."""
    held: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            held.setdefault(stage.model_name(name), []).append((name, parameter))
    for name, whole in weights:
        for own_name, parameter in held.pop(name, ()):
            local(parameter).copy_(part(whole, own_name, mesh))
    assert not held, f"no weights for {sorted(held)}"


def part(whole: Tensor, name: str, mesh: Mesh) -> Tensor:
    """What this rank holds of a whole weight: its cut by tensor parallelism, of that its rows by FSDP."""
    dimension, tensor = cut_dimension(name), mesh.layout.tensor
    if dimension is not None and tensor > 1:
        whole = whole.chunk(tensor, dimension)[mesh.at["tensor"]]
    rows = whole.chunk(mesh.rows, 0)
    return rows[mesh.rows_rank] if mesh.rows_rank < len(rows) else whole[:0]


def local(tensor: Tensor) -> Tensor:
    """A rank's part of a distributed tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_on_first(named: Iterable[Named], mesh: Mesh, shapes: dict[str, tuple[int, ...]]) -> Iterator[Named]:
    """The tensors `shapes` (in its order) from the parts `named` of all ranks: whole on rank 0, empty on the others.

    Called by all ranks together; each tensor is let go before the next one is gathered.
    """
    mine = dict(named)
    for name, shape in shapes.items():
        held = mine.get(name)
        full = None
        if held is not None:
            full = held.full_tensor() if isinstance(held, DTensor) else held
        source = _sender(held is not None, mesh)
        if source != 0 and mesh.rank == 0:
            full = torch.empty(shape)
            dist.recv(full, source)
        elif source != 0 and mesh.rank == source:
            dist.send(full.contiguous(), 0)
        yield name, full if mesh.rank == 0 else torch.empty(0)


def _sender(holds: bool, mesh: Mesh) -> int:
    """The first rank that holds a tensor."""
    first = torch.tensor(mesh.rank if holds else mesh.layout.world)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return int(first)
