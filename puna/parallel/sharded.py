"""A model over many processes, as the training loop sees it: FSDP, tensor, context and pipeline parallelism in one.

Every rank builds its stages on the meta device, cuts their weights by the table (`table.py`), lets FSDP2 shard what is left over the
ranks that have other tokens but the same weights, and fills its parts (`weights.py`). Forward and backward over a step's
micro-batches are a loop, or a pipeline's schedule (`pipeline.py`). All sums of gradients are in float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from puna.config import require
from puna.model.llama import Llama
from puna.model.reward import RewardModel
from puna.model.sizes import LlamaConfig
from puna.parallel import table
from puna.parallel.brought import Brought, WatchedReduceScatter
from puna.parallel.context import attend_across, local_index
from puna.parallel.dealt import through_owners
from puna.parallel.layout import Layout
from puna.parallel.mesh import Mesh
from puna.parallel.pipeline import Pipeline
from puna.parallel.placement import Ask, Batch, Cut, Objective, Reading
from puna.parallel.stage import PartReading, Stage, Tokens
from puna.parallel.weights import Named, distributed, fill, first_weights, join, local, region, with_head


def place(
    config: LlamaConfig,
    layout: Layout,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    weights: Iterable[Named] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    reward: bool = False,
) -> "Sharded":
    """A Llama laid out over the processes of the default group, which are to be as many as the layout says.

    With `reward` it is a reward model's body, and gets a head that gives zero. Its weights are `weights` (whole tensors by their names in one process), or those that one process would draw for
    `seed`. Matrix products are in `dtype`; weights, their gradients and all sums in float32. Raises `ConfigError` where
    layout, processes and model do not fit.
    """
    layout.check_model(config)
    device = torch.device(device)
    mesh = Mesh(layout, device)
    stages, brought = _stages(config, mesh, dtype, reward), Brought()
    for stage in stages:
        _shard(stage, mesh, dtype, brought)
        stage.to_empty(device=device)
    body = first_weights(config, seed) if weights is None else weights
    fill(stages, with_head(body, config) if reward else body, mesh)
    return Sharded(config, stages, mesh, device, brought)


def _stages(config: LlamaConfig, mesh: Mesh, dtype: torch.dtype, reward: bool) -> list[Stage]:
    """This rank's stages on the meta device, cut by tensor parallelism."""
    layers = mesh.layout.stage_layers(config.n_layers)
    with torch.device("meta"):
        llama = Llama(config)
    stages = [Stage(llama, layers[s], mesh, dtype, reward=reward) for s in mesh.layout.stages_of(mesh.at["pipeline"])]
    for stage in stages:
        if mesh.layout.tensor > 1:
            table.apply(stage, mesh)
        if config.tied and stage.is_first and hasattr(stage, "output"):
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
    """A `Placement` of many ranks, of a Llama or a reward model."""

    def __init__(self, config: LlamaConfig, stages: list[Stage], mesh: Mesh, device: torch.device, brought: Brought):
        self.brought = brought
        self.config, self.mesh, self.device = config, mesh, device
        self.layout = mesh.layout
        self.stages = stages
        self.parts: list[nn.Module] = list(stages)
        self.rank, self.world = mesh.rank, mesh.layout.world
        self.data_rank, self.data_ranks = mesh.layout.data_rank(mesh.rank), mesh.layout.data_ranks
        self._reward = stages[0].reward
        self.parameters = config.parameters + (config.dim if self._reward else 0)
        self._twins = config.tied and self.layout.pipeline > 1 and not self._reward  # a matrix on two ranks
        self._pipeline = Pipeline(stages, mesh, device) if self.layout.pipeline > 1 else None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's shards, DTensors, by their names in one process. A tied matrix may lie on two ranks."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield stage.model_name(name), parameter

    def backward(self, data: Objective, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Gradients of this rank's micro-batches, and the mean loss over the global batch, with its notes."""
        self.brought.begin()
        for stage in self.stages:
            stage.zero_grad()
        noted: list[Tensor] = []
        rows = self._learnt(data, self._pieces(batches), batches, noted)
        if self._pipeline:
            total = self._pipeline.backward(rows)
            self._sum_tied()
        else:
            total = torch.zeros((), device=self.device)
            for tokens in rows:
                loss = self.stages[0](tokens.tokens, tokens)
                loss.backward()
                total += loss.detach()
        summed = torch.stack([total, *(torch.stack(noted).sum(0) if noted else total.new_zeros(len(data.noted)))])
        loss, *notes = self._over_ranks(summed)
        return loss, dict(zip(data.noted, notes, strict=True))

    def clip(self, most: float) -> float:
        """The global norm of all gradients, which are scaled in place so that it is `most` at the most."""
        gradients = [(name, local(p.grad)) for name, p in self._parameters() if p.grad is not None]
        own = [gradient for name, gradient in gradients if self._counts(name)]
        norms = [gradient.norm().double() for gradient in own] or [torch.zeros((), dtype=torch.float64)]
        squares = torch.stack(norms).to(self.device).square().sum()
        dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if norm > most:  # a NaN is not, and is told by the norm
            torch._foreach_mul_([gradient for _, gradient in gradients], most / (norm + 1e-6))
        return norm

    def updated(self) -> None:
        """The parameters have changed: whole copies that FSDP may still hold are let go."""
        for stage in self.stages:
            for module in _sharded_modules(stage):
                module.reshard()

    @torch.no_grad()
    def validate(self, data: Objective, batches: Sequence[Batch]) -> float:
        """The mean loss, without gradients, over the units of all batches of all data ranks."""
        total = self._forward(self._learnt(data, batches, batches, []))
        self.updated()
        return self._over_ranks(total[None])[0]

    @torch.no_grad()
    def read(self, ask: Ask, count: int, batch: Callable[[int], Batch]) -> list[Tensor]:
        """What `ask` says of each batch. Data ranks take turns; all make as many passes, of which some may count for nothing."""
        mine: dict[int, Tensor] = {}
        at = self.mesh.at
        for first in range(0, count, self.data_ranks):
            number = min(first + self.data_rank, count - 1)
            given = batch(number).to(self.device)

            def keep(reading: Reading, number: int = number, given: Batch = given) -> Tensor:
                answer = ask(reading, given)
                if at["tensor"] == at["context"] == 0:
                    mine[number] = answer.cpu()
                return torch.zeros((), device=self.device)

            self._forward([self._tokens(given.rows, self._length([given]), keep)])
        self.updated()
        everyone: list[dict[int, Tensor]] = [{}] * self.world
        dist.all_gather_object(everyone, mine)
        found = {number: answer for answers in reversed(everyone) for number, answer in answers.items()}
        return [found[number] for number in range(count)]

    def whole(self) -> nn.Module | None:
        """The complete model on rank 0, on the CPU; None on the others."""
        with torch.device("meta"):
            llama = Llama(self.config)
            model = RewardModel(llama) if self._reward else llama
        if self.rank == 0:
            model.to_empty(device="cpu")
            if self.config.tied:
                llama.output.weight = llama.tok_embeddings.weight
        targets = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in self.join(self.named_parameters()):
                targets[name].copy_(weight)
        return model if self.rank == 0 else None

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
        twin = name == "output.weight" and self._twins
        at = self.mesh.at
        copied = self.layout.tensor > 1 and table.cut_dimension(name) is None and at["tensor"] > 0
        return at["replicate"] == 0 and not twin and not copied

    def _pieces(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches, cut further where a pipeline asks for more of them than there are."""
        each = -(-self.layout.microbatch_count // len(batches))
        pieces = []
        for batch in batches:
            require(
                batch.samples % each == 0,
                f"{batch.samples} samples of data rank {self.data_rank} cannot be cut into {each} micro-batches of one size",
                hint="change the number of rows or pairs, or set the layout's microbatches",
            )
            size = batch.samples // each
            pieces += [batch.take(slice(first, first + size)) for first in range(0, batch.samples, size)]
        return pieces

    def _learnt(
        self, data: Objective, pieces: Sequence[Batch], batches: Sequence[Batch], noted: list[Tensor]
    ) -> list[Tokens]:
        """This rank's tokens of the pieces of batches, each with what is learnt of it; notes are added to `noted`."""
        totals = self._totals(batches)

        def learning(piece: Batch) -> Callable[[Reading], Tensor]:
            def learn(reading: PartReading) -> Tensor:
                loss, said = data.loss(reading, piece, totals)
                if said:
                    noted.append(torch.stack([said[name] for name in data.noted]) / reading.repeats)
                return loss / reading.repeats

            return learn

        pieces = [piece.to(self.device) for piece in pieces]
        lengths = [self._length(pieces if self._pipeline else [piece]) for piece in pieces]
        return [self._tokens(p.rows, length, learning(p)) for p, length in zip(pieces, lengths, strict=True)]

    def _length(self, batches: Sequence[Batch]) -> int:
        """To how many tokens the rows of batches are filled up, all alike, so that every context and tensor rank gets as many."""
        layout = self.layout
        spread = layout.tensor if layout.sequence_parallel else 1
        unit = math.lcm(2 * layout.context if layout.context > 1 else 1, layout.context * spread)
        return -(-max(batch.shape[1] for batch in batches) // unit) * unit

    def _tokens(self, rows: Any, length: int, learn: Callable[[Reading], Tensor]) -> Tokens:
        """This rank's tokens of some rows, which are filled up to `length`."""
        places = local_index(length, self.layout.context, self.mesh.at["context"]).to(self.device)

        def own(name: str) -> Tensor:
            return F.pad(getattr(rows, name), (0, length - rows.tokens.shape[1]))[:, places]

        documents = F.pad(rows.documents, (0, length - rows.tokens.shape[1]), value=-1)
        return Tokens(
            **{name: own(name) for name in ("tokens", "targets", "positions", "weights")},
            places=places,
            length=length,
            attend=attend_across(documents, self.mesh.context_group),
            learn=learn,
        )

    def _forward(self, rows: list[Tokens]) -> Tensor:
        """The sum of what the last stage makes of each, zero on ranks without it."""
        if self._pipeline:
            return self._pipeline.loss(rows)
        return torch.stack([self.stages[0](tokens.tokens, tokens) for tokens in rows]).sum()

    def _totals(self, batches: Sequence[Batch]) -> tuple[float, ...]:
        """The counts of the global batch."""
        counts = [batch.counts for batch in batches]
        total = torch.tensor(counts, dtype=torch.float64, device=self.device).sum(0)
        dist.all_reduce(total)
        return tuple((total * self.data_ranks / self.world).tolist())

    def _over_ranks(self, shares: Tensor) -> list[float]:
        """The sum over ranks of numbers that all tensor ranks have alike."""
        shares = shares.double() if self.mesh.at["tensor"] == 0 else torch.zeros_like(shares, dtype=torch.float64)
        dist.all_reduce(shares)
        return shares.tolist()

    def _sum_tied(self) -> None:
        """The embedding's gradient is that of its use on the first stage and of its use as output on the last."""
        group = self.mesh.ends_group
        if not self._twins or group is None:
            return
        for name, parameter in self._parameters():
            if name in ("tok_embeddings.weight", "output.weight"):
                dist.all_reduce(local(parameter.grad), group=group)
