"""A plan as the settings of a training run: the JSON that `puna pretrain` takes (`train.settings.TrainConfig`).

Written as plain values, since the class itself needs PyTorch; a test reads them back through it.
"""

from typing import Any

from puna.config import to_json
from puna.planner.choice import OURS
from puna.planner.plan import Plan
from puna.planner.wish import Foresight
from puna.planner.work import microbatch_rows

WARMUP_STEPS = 2000  # at most, and at most a hundredth of the run
SAVE_STEPS = 1000  # between durable saves, at most


def recipe(plan: Plan, foresight: Foresight) -> dict[str, Any]:
    """The run that the plan describes: size, steps, batch, rate, saves, layout."""
    choice = plan.choice
    best = choice.found.best
    speed = {"recompute": OURS.get(best.work.recompute, "full"), "float8": best.work.precision == "fp8"}
    warmup = max(1, min(WARMUP_STEPS, choice.steps // 100))
    return {
        "model": to_json(choice.config),
        "lm": {"sequence_length": best.work.sequence_length, "rows": best.work.rows},
        "steps": choice.steps,
        "micro_batch": max(1, round(microbatch_rows(best.layout, best.work))),
        "schedule": {"peak": foresight.learning_rate(choice.config, choice.tokens), "warmup_steps": warmup},
        "layout": to_json(best.layout),
        **({"speed": speed} if any(value not in ("none", False) for value in speed.values()) else {}),
        "save_every_steps": max(1, min(SAVE_STEPS, choice.risk.save_every_steps)),
    }
