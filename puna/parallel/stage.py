"""A run of a Llama's layers as a module of its own: with the embedding if it is the first, with the loss if it is the last.

One process that holds all layers has a stage that is both. The parts keep the names that they have in `Llama`, so a
weight is called the same wherever it lies. What goes in and out of a stage between ranks is the residual stream.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from puna.kernels.cross_entropy import cross_entropy
from puna.model.llama import Attend, Llama, rope_rotation
from puna.model.sizes import LlamaConfig
from puna.parallel.loss import vocabulary_parallel_cross_entropy
from puna.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a rank works on of one micro-batch: B rows, and of each the tokens of its context rank."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, from 0 in each document
    weights: Tensor  # (B, T) float32: how much each prediction counts
    share: float  # of a prediction of weight 1 in the mean of the global batch
    attend: Attend


class Stage(nn.Module):
    """Layers `layers` of a Llama."""

    def __init__(self, llama: Llama, layers: range, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        self.config: LlamaConfig = llama.config
        self.mesh, self.dtype = mesh, dtype
        self.is_first, self.is_last = layers.start == 0, layers.stop == llama.config.n_layers
        if self.is_first:
            self.tok_embeddings = llama.tok_embeddings
        self.layers = nn.ModuleDict({str(index): llama.layers[index] for index in layers})
        if self.is_last:
            self.norm = llama.norm
            self.output = llama.output

    def model_name(self, name: str) -> str:
        """What one process calls this stage's parameter `name`: a tied output matrix is the embedding."""
        return "tok_embeddings.weight" if self.config.tied and name == "output.weight" else name

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
            return self._loss(self.norm(x), rows) * rows.share if self.is_last else x

    def _loss(self, hidden: Tensor, rows: Tokens) -> Tensor:
        targets, weights = rows.targets.flatten(), rows.weights.flatten()
        output = self.output.weight
        if self.mesh.layout.tensor == 1:
            return cross_entropy(hidden.flatten(0, 1), output, targets, weights)
        assert isinstance(hidden, DTensor) and isinstance(output, DTensor)
        # each rank's gradient of the hidden states is that of its words only: a partial sum
        whole = hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        group = self.mesh.tensor_group
        return vocabulary_parallel_cross_entropy(whole.flatten(0, 1), output.to_local(), targets, weights, group)
