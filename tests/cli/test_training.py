"""`puna train`: preferences as `puna pretrain` does text, in one process or in several that are watched."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from train_world import TOY, build

from puna import artifacts
from puna.cli import main
from puna.config import to_json
from puna.model.checkpoint import load_model
from puna.parallel.layout import Layout
from puna.train.loop import load_reward_model, train
from puna.train.objectives.dpo import DpoObjective
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardObjective
from puna.train.schedule import Schedule
from puna.train.settings import TrainConfig

ROOT = Path(__file__).parent.parent.parent
LM = TrainConfig(lm=LmObjective(sequence_length=32, rows=4, validation_rows=4), model=TOY, steps=6, threads=1)
PAIRS = TrainConfig(
    reward=RewardObjective(sequence_length=96, pairs=4),
    steps=8,
    schedule=Schedule(peak=1e-2, warmup_steps=2),
    threads=1,
    save_every_steps=4,
)
DPO = replace(PAIRS, reward=None, dpo=DpoObjective(sequence_length=96, pairs=4))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    return train(LM, world.tokens, world.tokenizer, None, out=tmp_path_factory.mktemp("base") / "base")


def losses(checkpoint: artifacts.Artifact) -> list[float]:
    return [json.loads(line)["loss"] for line in checkpoint.file("metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings, layout", [(DPO, "shard=2"), (PAIRS, "tensor=2")], ids=["dpo", "reward"])
def test_two_watched_processes_train_on_preferences_as_one_does(settings, layout, world, base, tmp_path):
    recipe = tmp_path / "run.json"
    recipe.write_text(json.dumps(to_json(settings)))
    given = ["train", str(recipe), "--data", str(world.preferences.path), "--tokenizer", str(world.tokenizer.path)]
    given += ["--base", str(base.path), "--out", str(tmp_path / "two"), "--processes", "2", "--layout", layout]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "puna.cli", *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == str(tmp_path / "two")
    two = artifacts.load(tmp_path / "two", "checkpoint")
    one = train(settings, world.preferences, world.tokenizer, base, out=tmp_path / "one")
    assert two.metrics["layout"] == layout and "layout" not in one.metrics
    assert losses(one)[-1] < losses(one)[0] - 0.1, "it learns"
    assert losses(two) == pytest.approx(losses(one), abs=0.02)  # products in bfloat16
    if settings.reward:
        assert load_reward_model(two).head.weight.abs().sum() > 0
    else:
        assert load_model(two.path).config == TOY


def test_a_recipe_starts_the_processes_that_a_layout_asks_for(world, base, tmp_path, monkeypatch):
    from puna.train.processes import train_laid_out

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = replace(PAIRS, steps=2, layout=Layout(replicate=2))
    made = train_laid_out(settings, world.preferences, world.tokenizer, base, out=tmp_path / "made")
    assert made.metrics["layout"] == "replicate=2" and len(losses(made)) == 2


def test_preferences_are_asked_for_where_the_objective_reads_them(world, base, tmp_path, capsys):
    recipe = tmp_path / "run.json"
    recipe.write_text(json.dumps(to_json(DPO)))
    given = ["--tokenizer", str(world.tokenizer.path), "--base", str(base.path), "--out", str(tmp_path / "out")]
    assert main(["train", str(recipe), "--data", str(world.tokens.path), *given]) != 0
    assert "preferences" in capsys.readouterr().err
    assert main(["pretrain", str(recipe), "--data", str(world.preferences.path), *given]) == 2
    assert "puna train" in capsys.readouterr().err


def test_a_layout_without_its_processes_is_refused(world, base, tmp_path):
    from puna.errors import ConfigError

    with pytest.raises(ConfigError, match="needs 2 processes, there are 1"):
        laid_out = replace(DPO, layout=Layout(shard=2))
        train(laid_out, world.preferences, world.tokenizer, base, out=tmp_path / "out")
