"""What turns gradients into updates: AdamW for everything, as in the paper (arXiv 2407.21783, 3.4.1), or Muon for matrices.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest matrix whose singular values are all one, so
that no direction of a layer is left behind because its gradients are small. Scaled by 0.2 * sqrt(larger side), as in
"Muon is Scalable for LLM Training" (arXiv 2502.16982), its updates are as large as AdamW's, and one learning rate serves
both. Embedding, output and norms stay with AdamW. In the smallest recipe it reaches a loss in about two thirds of
AdamW's steps, each a sixth longer (docs/log.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How updates are made. The learning rate is the schedule's."""

    kind: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1  # on matrices; norms have none
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    momentum: float = 0.95  # of Muon


def optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, rate: float
) -> list[torch.optim.Optimizer]:
    """The optimizers that share out named parameters among them, at the learning rate `rate`."""
    named = list(parameters)
    # The matrices of the layers: all but the embedding, the output and a reward model's head.
    matrices = [p for name, p in named if p.ndim > 1 and "layers." in name] if config.kind == "muon" else []
    taken = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=config.betas, fused=True)]
    if matrices:
        muon = torch.optim.Muon(
            matrices,
            lr=rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        made.append(muon)
    return made
