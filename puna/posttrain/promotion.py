"""A stage that does not improve the verified score is not promoted: the better checkpoint goes on.

Candidates come in order; the first is the incumbent. Each later one is promoted if its verified score on the *dev* items
is higher than the incumbent's. The dev items choose, the eval items only report, so the choice does not flatter.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.artifacts import Artifact, stage
from puna.config import require
from puna.evaluation.scores import compare, plain


@dataclass(frozen=True, kw_only=True)
class PromotionConfig:
    """When a candidate takes over."""

    least_gain: float = 0.0  # the dev score must rise by more than this


@stage("checkpoint")
def promote(
    config: PromotionConfig, candidates: list[Artifact], evaluations: list[Artifact], *, out: Path
) -> dict[str, Any]:
    """The best of `candidates`, each judged by the evaluation at the same place. Its files are copied."""
    require(len(candidates) == len(evaluations), "every candidate needs its evaluation")
    scores = [e.metrics["dev"]["verified"] for e in evaluations]
    names = [e.metrics["checkpoint"] for e in evaluations]  # a promoted copy keeps the name under which it was judged
    incumbent, decisions = 0, []
    for challenger in range(1, len(candidates)):
        change = compare(scores[incumbent], scores[challenger])
        promoted = scores[challenger]["value"] - scores[incumbent]["value"] > config.least_gain
        decisions.append(
            {
                "candidate": names[challenger],
                "incumbent": names[incumbent],
                "reason": _reason(scores[challenger]["value"], scores[incumbent]["value"]),
                "comparison": plain(change),
                "promoted": promoted,
            }
        )
        incumbent = challenger if promoted else incumbent
    chosen = candidates[incumbent]
    for name in chosen.manifest["files"]:
        if name != "metrics.jsonl":
            shutil.copyfile(chosen.file(name), out / name)
    return {"chosen": names[incumbent], "decisions": decisions}


def _reason(candidate: float, incumbent: float) -> str:
    return f"verified on dev items: {candidate:.1%} against {incumbent:.1%}"
