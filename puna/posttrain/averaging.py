"""The mean of several checkpoints' weights (arXiv 2407.21783, 4.1.5): what they agree on stays, noise cancels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puna.artifacts import Artifact, stage
from puna.config import require
from puna.model.checkpoint import load_model, save_model


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Nothing to choose: every checkpoint weighs the same."""


@stage("checkpoint")
def average(config: AverageConfig, checkpoints: list[Artifact], *, out: Path) -> dict[str, Any]:
    """The average of `checkpoints`, which must have one shape, summed in float64; the first one's tokenizer is kept."""
    models = [load_model(c.path) for c in checkpoints]
    shapes = {m.config for m in models}
    require(len(shapes) == 1, f"checkpoints of {len(shapes)} different shapes cannot be averaged")
    result = models[0]
    others = [dict(m.named_parameters()) for m in models]
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.copy_(torch.stack([o[name].double() for o in others]).mean(0))
    save_model(result, checkpoints[0].path, out)
    return {"averaged": [c.path.name for c in checkpoints]}
