"""A run of a Llama's layers as a module of its own: with the embedding if it is the first, with the loss if it is the last.

One process that holds all layers has a stage that is both. The parts keep the names that they have in `Llama`, so a
weight is called the same wherever it lies. What goes in and out of a stage between ranks is the residual stream.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from puna.kernels.cross_entropy import cross_entropy, token_log_probs
from puna.model.llama import Attend, Llama, rope_rotation
from puna.model.reward import BODY, reward_head
from puna.model.sizes import LlamaConfig
from puna.parallel.context import summed
from puna.parallel.loss import vocabulary_parallel_cross_entropy, vocabulary_parallel_log_probs
from puna.parallel.mesh import Mesh
from puna.parallel.placement import Reading
from puna.parallel.whole import row_sums


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a rank works on of one micro-batch: B rows, and of each the tokens of its context rank."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, from 0 in each document
    weights: Tensor  # (B, T) float32: how much each prediction counts
    places: Tensor  # (T,) int64: where in the whole rows these tokens are
    length: int  # of the whole rows
    attend: Attend
    learn: Callable[[Reading], Tensor]  # what the last stage does with what it reads: this rank's share of the loss


class Stage(nn.Module):
    """Layers `layers` of a Llama."""

    def __init__(self, llama: Llama, layers: range, mesh: Mesh, dtype: torch.dtype, *, reward: bool = False):
        super().__init__()
        self.config: LlamaConfig = llama.config
        self.mesh, self.dtype, self.reward = mesh, dtype, reward
        self.is_first, self.is_last = layers.start == 0, layers.stop == llama.config.n_layers
        if self.is_first:
            self.tok_embeddings = llama.tok_embeddings
        self.layers = nn.ModuleDict({str(index): llama.layers[index] for index in layers})
        if self.is_last:
            self.norm = llama.norm
            if not (reward and llama.config.tied):
                self.output = llama.output
            if reward:
                self.head = reward_head(llama.config)

    def model_name(self, name: str) -> str:
        """What one process calls this stage's parameter `name`: a tied output matrix is the embedding."""
        if self.config.tied and name == "output.weight":
            name = "tok_embeddings.weight"
        return BODY + name if self.reward and not name.startswith("head.") else name

    def forward(self, x: Tensor, rows: Tokens) -> Tensor:
        """The residual stream after the layers, or of the last stage the share of its tokens in the mean loss.

        `x` is the residual stream (B, T, D), of which tensor ranks hold parts of T; of the first stage the tokens.
        """
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.is_first:
                x = self.tok_embeddings(x)
            rotation = rope_rotation(self.config, rows.positions)
            for layer in self.layers.values():
                x = layer(x, rotation, rows.attend)
            return rows.learn(PartReading(self, self.norm(x), rows)) if self.is_last else x


class PartReading:
    """What the last stage says of its rows: of some of their tokens, where the context is cut.

    After a number per row was asked for, all context ranks know it, and `repeats` says how many make the same loss of it.
    """

    def __init__(self, stage: Stage, hidden: Tensor, rows: Tokens):
        self.stage, self.hidden, self.rows = stage, hidden, rows
        self.repeats = 1

    def token_losses(self) -> Tensor:
        """The weighted sum of the losses of this rank's tokens."""
        targets, weights = self.rows.targets.flatten(), self.rows.weights.flatten()
        hidden, output, group = self._over_vocabulary()
        if group is None:
            return cross_entropy(hidden, output, targets, weights)
        return vocabulary_parallel_cross_entropy(hidden, output, targets, weights, group)

    def log_probs(self, weights: Tensor) -> Tensor:
        """(W, B), of whole rows, from (W, B, T) of whole rows."""
        own = F.pad(weights, (0, self.rows.length - weights.shape[-1]))[..., self.rows.places]
        hidden, output, group = self._over_vocabulary()
        targets = self.rows.targets.flatten()

        def values(counted: Tensor) -> Tensor:
            if group is None:
                return token_log_probs(hidden[counted], output, targets[counted])
            return vocabulary_parallel_log_probs(hidden[counted], output, targets[counted], group)

        return self._of_rows(row_sums(own, values))

    def rewards(self, places: Tensor) -> Tensor:
        """(B,) float32, from the context rank that has the place."""
        hidden, head = self.hidden, self.stage.head.weight
        if isinstance(hidden, DTensor):  # every tensor rank computes the same
            hidden, head = hidden.redistribute(placements=[Replicate()]).to_local(), head.to_local()
        here = self.rows.places == places[:, None]  # (B, T)
        at = torch.arange(len(places), device=places.device)
        rewards = F.linear(hidden[at, here.int().argmax(1)], head)[:, 0].float()
        return self._of_rows(torch.where(here.any(1), rewards, 0.0))

    def _over_vocabulary(self) -> tuple[Tensor, Tensor, dist.ProcessGroup | None]:
        """Hidden states (N, D), the output matrix or this rank's part of it, and the group that has the others."""
        hidden, output = self.hidden, self.stage.output.weight
        if self.stage.mesh.layout.tensor == 1:
            return hidden.flatten(0, 1), output, None
        assert isinstance(hidden, DTensor) and isinstance(output, DTensor)
        # each rank's gradient of the hidden states is that of its words only: a partial sum
        whole = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return whole.flatten(0, 1), output.to_local(), self.stage.mesh.tensor_group

    def _of_rows(self, numbers: Tensor) -> Tensor:
        self.repeats = self.stage.mesh.layout.context
        return summed(numbers, self.stage.mesh.context_group)
