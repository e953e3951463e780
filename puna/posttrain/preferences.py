"""Pairs of answers to one prompt, the better one known: for the reward model and for DPO.

The verifier decides: `chosen` passed, `rejected` failed; pairs that read the same are no pairs. An item gives at most
`pairs_per_prompt` of them, each made of another answer. A share of the *prompts* is kept back, so that the reward
model's accuracy is measured on prompts it has not seen (`heldout.jsonl`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from puna.artifacts import Artifact, stage
from puna.chat import dialog_from_json, dialog_to_json
from puna.config import require
from puna.posttrain.tasks.dialogs_io import write_lines
from puna.train.objectives.sft import read_lines


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How pairs are formed."""

    pairs_per_prompt: int = 2
    heldout_share: float = 0.15  # of the prompts
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.pairs_per_prompt > 0, f"pairs_per_prompt={self.pairs_per_prompt} must be positive")
        require(0 <= self.heldout_share < 1, f"heldout_share={self.heldout_share} must lie in 0..1")


@stage("preferences")
def prefer(config: PreferenceConfig, samples: Artifact, *, out: Path) -> dict[str, Any]:
    """Write `preferences.jsonl` and `heldout.jsonl`: prompt, chosen and rejected answer, a pair a line.

    There may be none, where every answer passed or every one failed; the metric `preferences` says how many.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(samples.file("samples.jsonl")):
        groups.setdefault(line["item"]["id"], []).append(line)
    kept: dict[str, list[dict[str, Any]]] = {"preferences": [], "heldout": []}
    for identifier, answers in groups.items():
        rng = Random(f"{config.seed}/{identifier}")
        split = "heldout" if rng.random() < config.heldout_share else "preferences"
        kept[split] += _pairs(answers, config.pairs_per_prompt, rng)
    for split, pairs in kept.items():
        write_lines(out / f"{split}.jsonl", pairs)
    with_both = sum(1 for a in groups.values() if len({x["passed"] for x in a}) == 2)
    return {"prompts": len(groups), "prompts_with_both": with_both} | {k: len(v) for k, v in kept.items()}


def _pairs(answers: list[dict[str, Any]], count: int, rng: Random) -> Iterator[dict[str, Any]]:
    good = _distinct(a for a in answers if a["passed"])
    bad = _distinct(a for a in answers if not a["passed"])
    rng.shuffle(good)
    rng.shuffle(bad)
    for chosen, rejected in list(zip(good, bad))[:count]:
        yield {
            "task": chosen["item"]["task"],
            "prompt": chosen["item"]["dialog"],
            "chosen": chosen["answer"],
            "rejected": rejected["answer"],
        }


def _distinct(answers: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without repeats and without answers that say nothing at all (nothing is learnt from those)."""
    found = {str(a["answer"]): a for a in answers if a["answer"]}
    return [a for a in found.values() if dialog_to_json(dialog_from_json(a["answer"]))]
