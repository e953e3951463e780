"""The loop: it learns, it says what it did, and a kill at any moment changes nothing about the result."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_world import TOY

from puna import artifacts, config
from puna.errors import ConfigError, PunaError
from puna.model.checkpoint import load_model
from puna.train.loop import TrainConfig, load_reward_model, train
from puna.train.objectives.dpo import DpoObjective
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardObjective
from puna.train.objectives.sft import SftObjective
from puna.train.schedule import Schedule

LM = TrainConfig(
    lm=LmObjective(sequence_length=32, rows=4, validation_rows=8),
    model=TOY,
    steps=30,
    schedule=Schedule(peak=1e-2, warmup_steps=3, averaged=3),
    save_every_steps=7,
    validate_every_steps=10,
    threads=1,
)


def weights(checkpoint) -> dict[str, torch.Tensor]:
    return dict(load_model(checkpoint.path).named_parameters())


def same(a, b) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    return train(LM, world.tokens, world.tokenizer, None, out=tmp_path_factory.mktemp("base") / "base")


def lines(checkpoint) -> list[dict]:
    return [json.loads(line) for line in checkpoint.file("metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_each_step_is_logged(base):
    log = lines(base)
    assert [line["step"] for line in log] == list(range(1, 31))
    assert log[-1]["val_loss"] < log[0]["loss"] - 1
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "mfu"} <= log[0].keys()
    assert base.metrics["tokens"] == 30 * 4 * 32


def test_the_same_run_twice_gives_the_same_artifact(world, base, tmp_path):
    again = train(LM, world.tokens, world.tokenizer, None, out=tmp_path / "again")
    assert same(base, again) and base.digest == again.digest


def test_another_seed_gives_another_model(world, base, tmp_path):
    other = train(replace(LM, seed=1), world.tokens, world.tokenizer, None, out=tmp_path / "other")
    assert not same(base, other)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from puna import artifacts, config
from puna.train.loop import TrainConfig, train
settings = config.from_json(TrainConfig, {settings!r})
data, tokenizer = artifacts.load({data!r}), artifacts.load({tokenizer!r})
print("ready", flush=True)
train(settings, data, tokenizer, None, out=Path({out!r}))
"""


def start(world, settings, out):
    script = SCRIPT.format(
        tests=str(Path(__file__).parent),
        settings=config.to_json(settings),
        data=str(world.tokens.path),
        tokenizer=str(world.tokenizer.path),
        out=str(out),
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    return process


@pytest.mark.parametrize(
    "signal_number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_again_and_again_it_ends_with_the_same_bits(world, base, tmp_path, signal_number):
    rng = random.Random(int(signal_number))
    out = tmp_path / "stopped"
    for _ in range(2):
        process = start(world, LM, out)
        states = out / artifacts.WORK
        deadline = time.monotonic() + 60
        while not any(states.glob("state-*/state.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal_number)
        process.communicate()
    process = start(world, LM, out)
    assert process.wait() == 0, process.stderr.read().decode()
    assert same(base, artifacts.load(out))
    assert [line["step"] for line in lines(artifacts.load(out))] == list(range(1, 31))


def test_a_damaged_state_is_set_aside_and_the_one_before_is_used(world, base, tmp_path, capsys):
    out = tmp_path / "run"
    process = start(world, replace(LM, save_every_steps=3), out)
    states = out / artifacts.WORK
    while len(list(states.glob("state-*/state.json"))) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = sorted(states.glob("state-??-????????"))[-1] / "part-0000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    done = train(replace(LM, save_every_steps=3), world.tokens, world.tokenizer, None, out=out)
    assert "set aside a damaged checkpoint" in capsys.readouterr().err
    assert same(base, done)


def test_a_loss_that_is_not_finite_stops_with_a_message(world, tmp_path):
    wild = replace(LM, schedule=Schedule(peak=1e30, warmup_steps=1), clip=1e30)
    with pytest.raises(PunaError, match="diverged"):
        train(wild, world.tokens, world.tokenizer, None, out=tmp_path / "wild")


def test_a_run_has_exactly_one_objective():
    with pytest.raises(ConfigError, match="one objective"):
        TrainConfig()
    with pytest.raises(ConfigError, match="one objective"):
        TrainConfig(lm=LmObjective(), sft=SftObjective())


def test_sft_then_preferences_then_reward(world, base, tmp_path):
    sft = TrainConfig(
        sft=SftObjective(sequence_length=96, rows=2),
        steps=40,
        schedule=Schedule(peak=1e-2, warmup_steps=3),
        threads=1,
        save_every_steps=100,
    )
    tuned = train(sft, world.dialogs, world.tokenizer, base, out=tmp_path / "sft")
    assert lines(tuned)[-1]["loss"] < lines(tuned)[0]["loss"] - 1
    dpo = replace(sft, sft=None, dpo=DpoObjective(sequence_length=96, pairs=4), steps=12)
    preferred = train(dpo, world.preferences, world.tokenizer, tuned, out=tmp_path / "dpo")
    log = lines(preferred)
    assert log[0]["contrastive"] == pytest.approx(0.693147, abs=1e-4), "at the first step the model is the reference"
    assert log[-1]["ranked_right"] == 1.0 and log[-1]["chosen_change"] > log[-1]["contrastive"] - 5
    reward = replace(sft, sft=None, reward=RewardObjective(sequence_length=96, pairs=4), steps=25)
    judge = train(reward, world.preferences, world.tokenizer, base, out=tmp_path / "reward")
    assert lines(judge)[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert lines(judge)[-1]["ranked_right"] == 1.0
    assert load_reward_model(judge).head.weight.abs().sum() > 0


def test_disk_full_while_saving_leaves_no_half_state(world, tmp_path, monkeypatch):
    from puna.train.resilience import durable

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError):
        train(LM, world.tokens, world.tokenizer, None, out=tmp_path / "full")
    monkeypatch.undo()
    assert not list((tmp_path / "full" / artifacts.WORK).glob("state-??-????????"))
    assert train(LM, world.tokens, world.tokenizer, None, out=tmp_path / "full").kind == "checkpoint"
