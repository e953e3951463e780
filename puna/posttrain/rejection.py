"""Rejection sampling: the next fine-tuning set is the best of what the last model said (arXiv 2407.21783, 4.2.2).

For each prompt the answers that the verifier passed are ranked by the reward model and the best is kept; a prompt that
nobody solved is left out. Demonstrations go through the same gate: those whose answer the verifier fails (people err)
are dropped, the others stay, so that what the model cannot yet do is still taught.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puna.artifacts import Artifact, stage
from puna.chat import Dialog, dialog_from_json, dialog_to_json
from puna.evaluation.intervals import wilson
from puna.evaluation.scores import plain
from puna.model.reward import RewardModel
from puna.parallel.whole import WholeReading
from puna.posttrain.tasks.dialogs_io import item_from_json, write_lines
from puna.posttrain.tasks.verify import verify
from puna.tokenizer import AnyTokenizer, load_tokenizer
from puna.tokenizer.formats import dialog_format
from puna.train.loop import load_reward_model
from puna.train.objectives.reward import dialog_rows
from puna.train.objectives.sft import read_lines


@dataclass(frozen=True, kw_only=True)
class RejectionConfig:
    """How the next fine-tuning set is put together."""

    repeats: int = 1  # how often a kept answer appears beside the demonstrations


@stage("dialogs")
def reject(
    config: RejectionConfig, samples: Artifact, dialogs: Artifact, reward: Artifact, preferences: Artifact, *, out: Path
) -> dict[str, Any]:
    """Write `sft.jsonl`: the best verified answer to each sampled prompt, and the demonstrations that verify."""
    model, tokenizer = load_reward_model(reward), load_tokenizer(reward.path)
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(samples.file("samples.jsonl")):
        groups.setdefault(line["item"]["id"], []).append(line)
    best = [line for answers in groups.values() if (line := _best(model, tokenizer, answers)) is not None]
    demonstrations = read_lines(dialogs.file("sft.jsonl"))
    verified = [d for d in demonstrations if verify(item_from_json(d["item"]), dialog_from_json(d["dialog"]))]
    write_lines(out / "sft.jsonl", [*verified, *best * config.repeats])
    return {
        "prompts": len(groups),
        "prompts_solved": len(best),
        "demonstrations": len(demonstrations),
        "demonstrations_verified": len(verified),
        "reward_accuracy": _accuracy(model, tokenizer, preferences),
    }


def _best(model: RewardModel, tokenizer: AnyTokenizer, answers: list[dict[str, Any]]) -> dict[str, Any] | None:
    passed = {str(a["answer"]): a for a in answers if a["passed"]}
    if not passed:
        return None
    candidates = list(passed.values())
    dialogs = [dialog_from_json(a["item"]["dialog"] + a["answer"]) for a in candidates]
    scores = rewards(model, tokenizer, dialogs)
    chosen = max(range(len(dialogs)), key=lambda i: (scores[i], -i))
    item = candidates[chosen]["item"]
    return {"id": item["id"], "task": item["task"], "dialog": dialog_to_json(dialogs[chosen]), "reward": scores[chosen]}


@torch.inference_mode()
def rewards(model: RewardModel, tokenizer: AnyTokenizer, dialogs: list[Dialog]) -> list[float]:
    """The reward of each dialog."""
    format = dialog_format(tokenizer)
    rows, last = dialog_rows([format.render(d, answer=False).ids for d in dialogs])
    return [round(r, 4) for r in WholeReading(model, rows).rewards(last).tolist()]


def _accuracy(model: RewardModel, tokenizer: AnyTokenizer, preferences: Artifact) -> dict[str, Any]:
    """How often the reward model ranks a pair of prompts it has not seen as the verifier does."""
    right = 0
    pairs = read_lines(preferences.file("heldout.jsonl"))
    for pair in pairs:
        sides = [dialog_from_json(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
        chosen, rejected = rewards(model, tokenizer, sides)
        right += chosen > rejected
    return plain(wilson(right, len(pairs))) if pairs else {}
