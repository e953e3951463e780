"""What turns gradients into updates: AdamW for everything, as in the paper (arXiv 2407.21783, 3.4.1), or Muon for matrices.

Muon (`muon.py`) makes the singular values of a matrix's update all one, so that no direction of a layer is left behind
because its gradients are small. Embedding, output and norms stay with AdamW, at the same learning rate. In the smallest
recipe it reaches a loss in about two thirds of AdamW's steps, each a sixth longer (docs/log.md).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from puna.parallel.placement import Placement
from puna.train.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How updates are made. The learning rate is the schedule's."""

    kind: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1  # on matrices; norms have none
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    momentum: float = 0.95  # of Muon


def optimizers(placement: Placement, config: OptimizerConfig, rate: float) -> list[torch.optim.Optimizer]:
    """The optimizers that share out a model's parameters among them, at the learning rate `rate`."""
    named = list(placement.named_parameters())
    # The matrices of the layers: all but the embedding, the output and a reward model's head.
    matrices = [(n, p) for n, p in named if p.ndim > 1 and "layers." in n] if config.kind == "muon" else []
    taken = {id(p) for _, p in matrices}
    others = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=config.betas, fused=True)]
    if matrices:
        kept = {"weight_decay": config.weight_decay, "momentum": config.momentum}
        made.append(Muon(matrices, placement, rate=rate, **kept))
    return made
