"""The steps of a round on answers written by hand: pairs, rejection, averaging, and the gate."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from train_world import TOY, build

from puna import artifacts
from puna.artifacts import Artifact
from puna.chat import assistant, dialog_to_json, user
from puna.evaluation.scores import score
from puna.model.checkpoint import load_model
from puna.posttrain.averaging import AverageConfig, average
from puna.posttrain.preferences import PreferenceConfig, prefer
from puna.posttrain.promotion import PromotionConfig, promote
from puna.posttrain.rejection import RejectionConfig, reject
from puna.posttrain.tasks.dialogs_io import item_to_json
from puna.posttrain.tasks.item import Item
from puna.train.loop import TrainConfig, train
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardObjective
from puna.train.objectives.sft import read_lines


@dataclass(frozen=True, kw_only=True)
class Nothing:
    passed: tuple[bool, ...] = ()
    name: str = ""


def item(i: int) -> Item:
    return Item(
        task="constraints",
        variant="repeat",
        id=f"prompts/{i}",
        dialog=(user(f"Say ox {i}."),),
        check={"verifier": "exact", "text": f"ox {i}"},
    )


@artifacts.stage("dialogs")
def samples(config, *, out):
    lines = []
    for i in range(30):
        answers = [f"ox {i}", "Sure! ox", f"ox {i}"] if i % 3 else ["Sure! ox", "ant", "hen"]
        for text in answers:
            answer = dialog_to_json((assistant(text),))
            lines.append(
                {"item": item_to_json(item(i)), "answer": answer, "passed": text == f"ox {i}", "finished": True}
            )
    (out / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {}


@artifacts.stage("dialogs")
def demonstrations(config, *, out):
    lines = []
    for i in range(40, 50):
        said = f"ox {i}" if i % 2 else "Of course! ox"
        dialog = dialog_to_json((*item(i).dialog, assistant(said)))
        lines.append({"id": str(i), "task": "constraints", "item": item_to_json(item(i)), "dialog": dialog})
    (out / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {}


@artifacts.stage("evaluation")
def judged(config, *, out):
    return {"checkpoint": config.name, "dev": {"verified": score("verified", list(config.passed)).json()}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("round"))


@pytest.fixture(scope="module")
def bases(world, tmp_path_factory) -> list[Artifact]:
    config = TrainConfig(lm=LmObjective(sequence_length=32, rows=2, validation_rows=2), model=TOY, steps=2, threads=1)
    folder = tmp_path_factory.mktemp("bases")
    return [
        train(replace(config, seed=s), world.tokens, world.tokenizer, None, out=folder / f"seed-{s}") for s in range(3)
    ]


def test_pairs_prefer_what_passed_and_never_two_equal_texts(tmp_path):
    made = prefer(PreferenceConfig(heldout_share=0.2), samples(Nothing(), out=tmp_path / "s"), out=tmp_path / "p")
    pairs = [p for name in ("preferences", "heldout") for p in read_lines(made.file(f"{name}.jsonl"))]
    assert len(pairs) == made.metrics["prompts_with_both"] == 20
    for pair in pairs:
        said = pair["prompt"][0]["content"].removeprefix("Say ").rstrip(".")
        assert pair["chosen"][0]["content"] == said != pair["rejected"][0]["content"]


def test_rejection_keeps_one_verified_answer_per_prompt_and_drops_faulty_demonstrations(world, bases, tmp_path):
    drawn = samples(Nothing(), out=tmp_path / "s")
    pairs = prefer(PreferenceConfig(heldout_share=0.3), drawn, out=tmp_path / "p")
    config = TrainConfig(reward=RewardObjective(sequence_length=96, pairs=4), steps=2, threads=1)
    reward = train(config, pairs, world.tokenizer, bases[0], out=tmp_path / "r")
    chosen = reject(
        RejectionConfig(), drawn, demonstrations(Nothing(), out=tmp_path / "d"), reward, pairs, out=tmp_path / "c"
    )
    assert chosen.metrics["prompts_solved"] == 20 and chosen.metrics["demonstrations_verified"] == 5
    kept = read_lines(chosen.file("sft.jsonl"))
    assert len(kept) == 25
    assert all(k["dialog"][-1]["content"] == k["dialog"][0]["content"][4:-1] for k in kept)


def test_an_average_is_the_mean_of_the_weights(bases, tmp_path):
    mean = load_model(average(AverageConfig(), bases, out=tmp_path / "a").path)
    each = [dict(load_model(b.path).named_parameters()) for b in bases]
    for name, parameter in mean.named_parameters():
        torch.testing.assert_close(parameter, sum(e[name] for e in each) / 3)


@pytest.mark.parametrize(
    "shares, chosen", [((3, 5, 4), "seed-1"), ((5, 3, 4), "seed-0"), ((4, 4, 4), "seed-0"), ((1, 2, 3), "seed-2")]
)
def test_only_a_better_dev_score_is_promoted(bases, tmp_path, shares, chosen):
    scores = [
        judged(Nothing(passed=tuple(k < n for k in range(8)), name=f"seed-{i}"), out=tmp_path / f"e{i}")
        for i, n in enumerate(shares)
    ]
    best = promote(PromotionConfig(), bases, scores, out=tmp_path / "best")
    assert best.metrics["chosen"] == chosen
    original = next(b for b in bases if b.path.name == chosen)
    assert artifacts.hash_file(best.file("model.safetensors")) == artifacts.hash_file(
        original.file("model.safetensors")
    )
    assert len(best.metrics["decisions"]) == 2
