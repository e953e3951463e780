"""A model over many processes, as the training loop sees it: FSDP, tensor, context and pipeline parallelism in one.

Every rank builds its stages on the meta device, cuts their weights by the table (`table.py`), lets FSDP2 shard what is left over the
ranks that have other tokens but the same weights, and fills its parts (`weights.py`). Forward and backward over a step's
micro-batches are a loop, or a pipeline's schedule (`pipeline.py`). All sums of gradients are in float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from puna.config import require
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.parallel import table
from puna.parallel.brought import Brought, WatchedReduceScatter
from puna.parallel.context import attend_across, local_index
from puna.parallel.dealt import through_owners
from puna.parallel.layout import Layout
from puna.parallel.mesh import Mesh
from puna.parallel.pipeline import Pipeline
from puna.parallel.placement import Cut
from puna.parallel.stage import Stage, Tokens
from puna.parallel.weights import Named, distributed, fill, first_weights, join, local, region


def place(
    config: LlamaConfig,
    layout: Layout,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    weights: Iterable[Named] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> "Sharded":
    """A Llama laid out over the processes of the default group, which are to be as many as the layout says.

    Its weights are `weights` (whole tensors by their names in one process), or those that one process would draw for
    `seed`. Matrix products are in `dtype`; weights, their gradients and all sums in float32. Raises `ConfigError` where
    layout, processes and model do not fit.
    """
    layout.check_model(config)
    device = torch.device(device)
    mesh = Mesh(layout, device)
    stages, brought = _stages(config, mesh, dtype), Brought()
    for stage in stages:
        _shard(stage, mesh, dtype, brought)
        stage.to_empty(device=device)
    fill(stages, first_weights(config, seed) if weights is None else weights, mesh)
    return Sharded(config, stages, mesh, device, brought)


def _stages(config: LlamaConfig, mesh: Mesh, dtype: torch.dtype) -> list[Stage]:
    """This rank's stages on the meta device, cut by tensor parallelism."""
    layers = mesh.layout.stage_layers(config.n_layers)
    with torch.device("meta"):
        llama = Llama(config)
    stages = [Stage(llama, layers[s], mesh, dtype) for s in mesh.layout.stages_of(mesh.at["pipeline"])]
    for stage in stages:
        if mesh.layout.tensor > 1:
            table.apply(stage, mesh)
        if config.tied and stage.is_first and stage.is_last:
            stage.output.weight = stage.tok_embeddings.weight
    return stages


def _shard(stage: Stage, mesh: Mesh, dtype: torch.dtype, brought: Brought) -> None:
    """FSDP2: each layer is gathered as one, and what is outside the layers as another.

    The matrices of layers are gathered in `dtype`, which is what the products take anyway; the norms, on their own, and
    what is outside the layers in float32, as one process has them. In a pipeline all stay gathered between forward and
    backward, as in Llama 3; else a layer is let go and gathered again.
    """
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    low = None if dtype == torch.float32 else dtype
    rounded = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    again = mesh.layout.pipeline == 1
    for block in stage.layers.values():
        if low:
            for norm in (block.attention_norm, block.ffn_norm):
                fully_shard(norm, mesh=mesh.weights, mp_policy=exact, reshard_after_forward=again)
        fully_shard(block, mesh=mesh.weights, mp_policy=rounded, reshard_after_forward=again)
    fully_shard(stage, mesh=mesh.weights, mp_policy=exact, reshard_after_forward=False)
    for module in _sharded_modules(stage):
        module.set_gradient_divide_factor(1.0)  # sums: losses are already shares of the global mean
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_reduce_scatter(WatchedReduceScatter(brought))


def _sharded_modules(stage: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in stage.modules() if isinstance(module, FSDPModule))


class Sharded:
    """A `Placement` of many ranks. Learns next tokens (the objectives lm and sft)."""

    def __init__(self, config: LlamaConfig, stages: list[Stage], mesh: Mesh, device: torch.device, brought: Brought):
        self.brought = brought
        self.config, self.mesh, self.device = config, mesh, device
        self.layout = mesh.layout
        self.stages = stages
        self.parts: list[nn.Module] = list(stages)
        self.rank, self.world = mesh.rank, mesh.layout.world
        self.data_rank, self.data_ranks = mesh.layout.data_rank(mesh.rank), mesh.layout.data_ranks
        self.parameters = config.parameters
        self._pipeline = Pipeline(stages, mesh, device) if self.layout.pipeline > 1 else None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's shards, DTensors, by their names in one process. A tied matrix may lie on two ranks."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield stage.model_name(name), parameter

    def backward(self, _data: Any, batches: Sequence[Any]) -> tuple[float, dict[str, float]]:
        """Gradients of this rank's micro-batches, and the mean loss over the global batch."""
        self.brought.begin()
        for stage in self.stages:
            stage.zero_grad()
        pieces = self._pieces(batches)
        share = 1.0 / self._counted(batches)
        rows = [self._tokens(batch, piece, share) for batch, piece in pieces]
        if self._pipeline:
            total = self._pipeline.backward(rows)
            self._sum_tied()
        else:
            total = torch.zeros((), device=self.device)
            for tokens in rows:
                loss = self.stages[0](tokens.tokens, tokens)
                loss.backward()
                total += loss.detach()
        return self._over_ranks(total), {}

    def clip(self, most: float) -> float:
        """The global norm of all gradients, which are scaled in place so that it is `most` at the most."""
        own = [local(p.grad) for name, p in self._parameters() if self._counts(name)]
        norms = [gradient.norm().double() for gradient in own] or [torch.zeros((), dtype=torch.float64)]
        squares = torch.stack(norms).to(self.device).square().sum()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if norm > most:  # a NaN is not, and is told by the norm
            torch._foreach_mul_([local(p.grad) for _, p in self._parameters()], most / (norm + 1e-6))
        return norm

    def updated(self) -> None:
        """The parameters have changed: whole copies that FSDP may still hold are let go."""
        for stage in self.stages:
            for module in _sharded_modules(stage):
                module.reshard()

    @torch.no_grad()
    def validate(self, _data: Any, batches: Sequence[Any]) -> float:
        """The mean loss, without gradients, over the predicted tokens of all batches of all data ranks."""
        share = 1.0 / self._counted(batches)
        rows = [self._tokens(batch, slice(None), share) for batch in batches]
        if self._pipeline:
            total = self._pipeline.loss(rows)
        else:
            total = torch.zeros((), device=self.device)
            for tokens in rows:
                total += self.stages[0](tokens.tokens, tokens)
        self.updated()
        return self._over_ranks(total)

    def whole(self) -> Llama | None:
        """The complete model on rank 0, on the CPU; None on the others."""
        with torch.device("meta"):
            llama = Llama(self.config)
        if self.rank == 0:
            llama.to_empty(device="cpu")
            if self.config.tied:
                llama.output.weight = llama.tok_embeddings.weight
        targets = dict(llama.named_parameters())
        with torch.no_grad():
            for name, weight in self.join(self.named_parameters()):
                targets[name].copy_(weight)
        return llama if self.rank == 0 else None

    def join(self, named: Iterable[Named]) -> Iterator[Named]:
        """Whole tensors, on rank 0, from the parts of all ranks. To be run to its end by all ranks together."""
        return join(named, self.mesh)

    def part(self, name: str, given: Tensor) -> Tensor:
        """What this rank holds of a tensor that lies as the parameter `name` does, from the whole or from its piece."""
        own_name, parameter = next((own, p) for own, p in self._parameters() if self._model_name(own) == name)
        if given.shape == local(parameter).shape:
            own = given
        elif given.shape == parameter.shape:
            own = given[region(own_name, tuple(given.shape), self.mesh)]
        else:
            return given  # a step count is no part of anything
        return distributed(own.to(self.device, copy=True), parameter)

    def pieces(self, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Cut]:
        """What this rank holds, as plain tensors, and of which whole each is a piece that begins where."""
        cut = {
            name: (tuple(tensor.shape), tuple(s.start for s in region(name, tuple(tensor.shape), self.mesh)))
            for name, tensor in named.items()
            if local(tensor).shape != tensor.shape
        }
        return {name: local(tensor).detach() for name, tensor in named.items()}, cut

    def change_wholes(self, pieces: Iterable[Named], change: Callable[[Tensor], Tensor]) -> Iterator[Named]:
        """This rank's pieces of what `change` makes of whole matrices, each made by one of the ranks that hold it."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        return through_owners(pieces, shapes, change, self.mesh)

    def most(self, value: int) -> int:
        """The largest `value` of any rank."""
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _model_name(self, own: str) -> str:
        return self.stages[-1].model_name(own)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for stage in self.stages for name, p in stage.named_parameters())

    def _counts(self, name: str) -> bool:
        """Whether the gradient of `name` enters the global norm on this rank: each number on one rank."""
        twin = name == "output.weight" and self.config.tied and self.layout.pipeline > 1
        at = self.mesh.at
        copied = self.layout.tensor > 1 and table.cut_dimension(name) is None and at["tensor"] > 0
        return at["replicate"] == 0 and not twin and not copied

    def _pieces(self, batches: Sequence[Any]) -> list[tuple[Any, slice]]:
        """The micro-batches, cut further where a pipeline asks for more of them than there are."""
        each = -(-self.layout.microbatch_count // len(batches))
        pieces = []
        for batch in batches:
            rows = batch.tokens.shape[0]
            require(
                rows % each == 0,
                f"{rows} rows of data rank {self.data_rank} cannot be cut into {each} micro-batches of one size",
                hint="change the number of rows, or set the layout's microbatches",
            )
            size = rows // each
            pieces += [(batch, slice(first, first + size)) for first in range(0, rows, size)]
        return pieces

    def _tokens(self, batch: Any, piece: slice, share: float) -> Tokens:
        """This rank's tokens of some rows of a batch."""
        T = batch.tokens.shape[1]
        self.layout.check_model(self.config, T)
        index = local_index(T, self.layout.context, self.mesh.at["context"])
        tokens, targets, positions, weights = (
            getattr(batch, name)[piece][:, index].to(self.device)
            for name in ("tokens", "targets", "positions", "weights")
        )
        attend = attend_across(batch.documents[piece].to(self.device), self.mesh.context_group)
        return Tokens(tokens=tokens, targets=targets, positions=positions, weights=weights, share=share, attend=attend)

    def _counted(self, batches: Sequence[Any]) -> float:
        """The weight of all predicted tokens of the global batch."""
        total = torch.tensor(sum(float(b.weights.sum()) for b in batches), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) * self.data_ranks / self.world

    def _over_ranks(self, total: Tensor) -> float:
        """The sum over ranks of a loss that all tensor ranks have alike."""
        total = total.double() if self.mesh.at["tensor"] == 0 else torch.zeros_like(total, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def _sum_tied(self) -> None:
        """The embedding's gradient is that of its use on the first stage and of its use as output on the last."""
        group = self.mesh.ends_group
        if not self.config.tied or group is None:
            return
        for name, parameter in self._parameters():
            if name in ("tok_embeddings.weight", "output.weight"):
                dist.all_reduce(local(parameter.grad), group=group)
