"""Weights on their way between a whole model and the parts that ranks hold, one tensor at a time.

First weights are those that one process draws for the same seed: every rank draws all of them in the same order and keeps
its part of each, so that the most it holds beside its parts is one matrix. The other way, a tensor's parts are gathered
and only rank 0 keeps them, for a checkpoint that does not know how it was laid out.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from puna.model.llama import Llama, draw
from puna.model.reward import BODY, reward_head
from puna.model.sizes import LlamaConfig
from puna.parallel.mesh import Mesh
from puna.parallel.stage import Stage
from puna.parallel.table import cut_dimension

Named = tuple[str, Tensor]

# PyTorch warns, once per process, that gathering over two dimensions takes two steps. It does, rarely.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def first_weights(config: LlamaConfig, seed: int) -> Iterator[Named]:
    """The weights of `Llama(config).init_weights(seed)`, one after the other."""
    with torch.device("meta"):
        model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in [(name, weight.shape) for name, weight in model.named_parameters()]:
        weight = torch.empty(shape)
        draw(name, weight, config.n_layers, generator)
        yield name, weight


def with_head(weights: Iterable[Named], config: LlamaConfig) -> Iterator[Named]:
    """The weights of a reward model with this body, and a head that gives zero."""
    yield from ((BODY + name, weight) for name, weight in weights)
    yield "head.weight", reward_head(config).weight.detach()


@torch.no_grad()
def fill(stages: list[Stage], weights: Iterable[Named], mesh: Mesh) -> None:
    """Copy this rank's parts of the whole `weights` into its stages."""
    held: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            held.setdefault(stage.model_name(name), []).append((name, parameter))
    for name, whole in weights:
        for own_name, parameter in held.pop(name, ()):
            local(parameter).copy_(whole[region(own_name, tuple(whole.shape), mesh)])
    assert not held, f"no weights for {sorted(held)}"


def region(
    name: str, shape: tuple[int, ...], mesh: Mesh, rows_rank: int | None = None, tensor_rank: int | None = None
) -> tuple[slice, ...]:
    """Where in a whole weight of this shape the part of a rank lies (of this one, unless others are named).

    It is the rank's cut by tensor parallelism, of that its rows by FSDP, perhaps none. The name may have a prefix.
    """
    rows_rank = mesh.rows_rank if rows_rank is None else rows_rank
    tensor_rank = mesh.at["tensor"] if tensor_rank is None else tensor_rank
    starts, sizes = [0] * len(shape), list(shape)
    if (dimension := cut_dimension(name)) is not None:
        sizes[dimension] //= mesh.layout.tensor
        starts[dimension] = tensor_rank * sizes[dimension]
    each = -(-sizes[0] // mesh.rows)
    before = min(sizes[0], rows_rank * each)
    starts[0] += before
    sizes[0] = min(each, sizes[0] - before)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def local(tensor: Tensor) -> Tensor:
    """A rank's part of a distributed tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distributed(own: Tensor, like: DTensor) -> DTensor:
    """This rank's part as a distributed tensor that lies as `like` does."""
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def join(named: Iterable[Named], mesh: Mesh) -> Iterator[Named]:
    """Whole tensors from the parts of all ranks, by name: on rank 0, on the CPU; the others get nothing.

    Called by all ranks together, and run to its end by all. Tensors that several ranks hold come once. Each is gathered
    when it is asked for, and let go before the next.
    """
    mine = dict(named)
    own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()}
    everyone: list[dict[str, Any]] = [{}] * mesh.layout.world
    dist.all_gather_object(everyone, own)
    for name in sorted({name for held in everyone for name in held}):
        source = next(rank for rank, held in enumerate(everyone) if name in held)
        held = mine.get(name)
        full = held.full_tensor() if isinstance(held, DTensor) else held
        if source != 0 and mesh.rank == 0:
            shape, dtype = everyone[source][name]
            full = torch.empty(shape, dtype=dtype, device=mesh.device)
            dist.recv(full, source)
        elif source != 0 and mesh.rank == source:
            dist.send(full.contiguous(), 0)
        if mesh.rank == 0:
            yield name, full.cpu()
