"""Answers drawn from the latest model, each with its verdict: what rejection sampling and preferences are made of.

`samples.jsonl` holds a line per answer: the item it answers, the messages after the prompt, whether the verifier passed
it, whether it ended by itself, and its log-probability.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.artifacts import Artifact, stage
from puna.chat import Sampling, dialog_to_json
from puna.config import require
from puna.inference.engine import Engine
from puna.posttrain.tasks.dialogs_io import item_to_json, read_items, write_lines
from puna.posttrain.tasks.runner import Outcome, by_task, run_items
from puna.posttrain.tasks.toolbox import Toolbox
from puna.posttrain.world import load_world


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How answers are drawn. The paper draws 10 to 30 per prompt, at temperatures up to 1."""

    samples: int = 6  # per prompt
    temperature: float = 0.8
    max_tokens: int = 40  # per message
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.samples >= 2, f"samples={self.samples}: at least two are needed to choose between")
        require(self.temperature > 0, f"temperature={self.temperature} must be positive: equal samples teach nothing")


@stage("dialogs")
def sample(
    config: SampleConfig, checkpoint: Artifact, dialogs: Artifact, world: Artifact, *, out: Path
) -> dict[str, Any]:
    """Let `checkpoint` answer the prompts of `dialogs`, with the world's tools at hand."""
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens, seed=config.seed)
    items = read_items(dialogs.file("prompts.jsonl"))
    engine = Engine.load(checkpoint.path)
    with Toolbox(load_world(world)) as tools:
        outcomes = run_items(
            engine, items, tools_for=tools, sampling=sampling, samples=config.samples, label=f"{out.name}: sampling"
        )
    write_lines(out / "samples.jsonl", map(_line, outcomes))
    passed = {task: sum(each) / len(each) for task, each in by_task(outcomes).items()}
    return {
        "prompts": len(items),
        "samples": len(outcomes),
        "passed": sum(o.passed for o in outcomes),
        "completion_tokens": sum(o.completion_tokens for o in outcomes),
        "pass_rate_by_task": passed,
        "best_of": _best_of(outcomes, config.samples),
    }


def _line(outcome: Outcome) -> dict[str, Any]:
    return {
        "item": item_to_json(outcome.item),
        "answer": dialog_to_json(outcome.dialog[len(outcome.item.dialog) :]),
        "passed": outcome.passed,
        "finished": outcome.finished,
        "logprob": round(outcome.logprob, 4),
    }


def _best_of(outcomes: list[Outcome], samples: int) -> dict[str, float]:
    """Share of prompts with a passing answer among the first n: what a perfect reward model could reach."""
    groups = [outcomes[i : i + samples] for i in range(0, len(outcomes), samples)]
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= samples]
    return {str(n): sum(any(o.passed for o in g[:n]) for g in groups) / max(1, len(groups)) for n in counts}
