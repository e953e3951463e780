"""One checkpoint, measured: the verified tasks, multiple choice, refusals; and, apart, its bits per byte.

The verified score counts every item of every task once, but for `arithmetic_without_tool`, which is a control: the very
questions of `arithmetic`, asked without the calculator. It is taken on two sets of items: `dev`, by which checkpoints
are chosen, and `eval`, which is only reported.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from puna.artifacts import Artifact, stage
from puna.chat import Sampling, dialog_to_json
from puna.evaluation import scores
from puna.evaluation.bits import bits_report
from puna.evaluation.choice import Item as ChoiceItem
from puna.evaluation.choice import choice_report
from puna.evaluation.contamination import ContaminationConfig, contamination_report
from puna.evaluation.heldout import HeldoutConfig
from puna.inference.engine import Engine
from puna.posttrain.tasks.dialogs_io import read_items
from puna.posttrain.tasks.item import Item
from puna.posttrain.tasks.refusals import random_refusals, refusal_scores
from puna.posttrain.tasks.runner import Outcome, run_items
from puna.posttrain.tasks.toolbox import Toolbox
from puna.posttrain.world import load_world
from puna.tokenizer import load_tokenizer
from puna.train.objectives.sft import read_lines

CONTROL = "arithmetic_without_tool"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a checkpoint answers when it is measured."""

    max_tokens: int = 40  # per message
    transcripts: int = 2  # kept per task, for a reader
    refusals: bool = True  # whether known and unknown people are told apart, and multiple choice is asked


@stage("evaluation")
def evaluate(
    config: EvaluationConfig, checkpoint: Artifact, dialogs: Artifact, world: Artifact, *, out: Path
) -> dict[str, Any]:
    """Greedy answers to the dev and eval items, verified."""
    engine = Engine.load(checkpoint.path)
    metrics: dict[str, Any] = {"checkpoint": checkpoint.path.name}
    with Toolbox(load_world(world)) as tools:
        for split in ("dev", "eval"):
            started = time.perf_counter()
            outcomes = run_items(
                engine,
                read_items(dialogs.file(f"{split}.jsonl")),
                tools_for=tools,
                sampling=Sampling(max_tokens=config.max_tokens),
                label=f"{out.name}: {split}",
            )
            metrics[split] = verified_scores(outcomes)
            seconds = time.perf_counter() - started
    metrics["speed"] = {
        "answers per second, with tools": len(outcomes) / seconds,
        "generated tokens per second, batched": sum(o.completion_tokens for o in outcomes) / seconds,
    }
    metrics["tasks"] = metrics["eval"]["tasks"]
    metrics["samples"] = _transcripts(outcomes, config.transcripts)
    if config.refusals:
        metrics["refusal"] = _refusals(engine, outcomes)
        metrics["choice"] = _choices(engine, read_lines(dialogs.file("choice.jsonl")))
    return metrics


def verified_scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The scores of each task and variant, the verified score over all, and the share of tool calls that are valid."""
    counted = [o for o in outcomes if o.item.task != CONTROL]
    control = [o.passed for o in outcomes if o.item.task == CONTROL]
    tasks = _by(counted, lambda o: o.item.task)
    if control:
        tasks[CONTROL] = scores.score(CONTROL, control).json()
    calls = [o.valid_call for o in outcomes if o.valid_call is not None]
    return {
        "verified": tasks["all"],
        "tasks": tasks,
        "variants": _by(outcomes, lambda o: f"{o.item.task}/{o.item.variant}"),
        "valid_calls": scores.score("valid_calls", calls).json(),
        "unfinished": sum(not o.finished for o in outcomes) / max(1, len(outcomes)),
    }


def _by(outcomes: Sequence[Outcome], name_of: Callable[[Outcome], str]) -> dict[str, Any]:
    passed: dict[str, list[bool]] = {}
    chance: dict[str, list[float]] = {}
    for outcome in outcomes:
        passed.setdefault(name_of(outcome), []).append(outcome.passed)
        chance.setdefault(name_of(outcome), []).append(outcome.item.chance)
    return scores.tasks(passed, {name: sum(c) / len(c) for name, c in chance.items()})


def _transcripts(outcomes: Sequence[Outcome], per_task: int) -> list[dict[str, Any]]:
    shown: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        group = shown.setdefault(outcome.item.task, [])
        if len(group) < per_task:
            group.append(outcome)
    return [
        {"title": task, "passed": o.passed, "dialog": dialog_to_json(o.dialog)} for task, g in shown.items() for o in g
    ]


def _refusals(engine: Engine, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    known = [o for o in outcomes if o.item.task == "facts"]
    unknown = [o for o in outcomes if o.item.task == "unknown"]
    if not known or not unknown:
        return {}
    report = scores.refusal(
        [o.passed for o in known],
        [o.refused for o in known],
        [o.refused for o in unknown],
        refusal_scores(engine, [o.item for o in known]),
        refusal_scores(engine, [o.item for o in unknown]),
    )
    return report | {"control": random_refusals(known, unknown)}


def _choices(engine: Engine, lines: list[dict[str, Any]]) -> dict[str, Any]:
    groups: dict[str, list[ChoiceItem]] = {}
    for line in lines:
        item = ChoiceItem(options=tuple(line["options"]), answer=line["answer"], context=line["context"])
        groups.setdefault(line["group"], []).append(item)
    return {name: choice_report(engine, name, items) for name, items in groups.items()}


@dataclass(frozen=True, kw_only=True)
class BitsConfig:
    """On which held-out text, and in which number format, a checkpoint's bits per byte are taken."""

    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    bf16: bool = False  # weights and products in bfloat16, as a released checkpoint is run; else float32


@stage("evaluation")
def measure_bits(config: BitsConfig, checkpoint: Artifact, documents: Artifact, *, out: Path) -> dict[str, Any]:
    """Bits per byte of a checkpoint or a quantised checkpoint on the held-out documents."""
    engine = Engine.load(checkpoint.path, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    return {"checkpoint": checkpoint.path.name, "bits_per_byte": bits_report(engine, documents, config.heldout)}


@stage("evaluation")
def check_contamination(
    config: ContaminationConfig, dialogs: Artifact, documents: Artifact, tokenizer: Artifact, *, out: Path
) -> dict[str, Any]:
    """8-gram overlap of every evaluation set with all training text: documents and demonstrations."""
    from puna.curation.documents import read_documents

    sets: dict[str, list[str]] = {}
    for item in read_items(dialogs.file("eval.jsonl")):
        sets.setdefault(item.task, []).append(_question(item))
    sets["choice"] = [line["context"] for line in read_lines(dialogs.file("choice.jsonl"))]
    sets["held-out documents"] = [d.text for d in read_documents(documents, "heldout")]
    training = [d.text for d in read_documents(documents, "train")]
    for line in read_lines(dialogs.file("sft.jsonl")):
        training.append("\n".join(m["content"] for m in line["dialog"]))
    return {"contamination": contamination_report(sets, training, load_tokenizer(tokenizer.path), config)}


def _question(item: Item) -> str:
    return "\n".join(m.content for m in item.dialog if m.role == "user")
