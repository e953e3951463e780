"""The real loop under the supervisor: killed, stopped and given NaN it ends with the bits of a run that nobody disturbed."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_world import TOY, build

from puna import artifacts
from puna.model.checkpoint import load_model
from puna.parallel.layout import Layout
from puna.planner.policies import DetectPolicy, SavePolicy, StragglerPolicy
from puna.train.objectives.dpo import DpoObjective
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardObjective
from puna.train.optimizers import OptimizerConfig
from puna.train.resilience import inject, ledger
from puna.train.resilience.settings import ResilienceConfig
from puna.train.schedule import Schedule
from puna.train.settings import TrainConfig

pytestmark = pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="runs of several processes: PUNA_SLOW=1")

RUN = TrainConfig(
    lm=LmObjective(sequence_length=32, rows=8, validation_rows=8),
    model=TOY,
    steps=40,
    schedule=Schedule(peak=1e-2, warmup_steps=3, averaged=3),
    save_every_steps=10,
    validate_every_steps=20,
    threads=1,
    resilience=ResilienceConfig(detect=DetectPolicy(step_budget_s=5.0), save=SavePolicy(), check_every_steps=5),
)
SCRIPT = """
import json, sys
from pathlib import Path
from puna import artifacts, config
from puna.train.resilience.ranks import train_watched
from puna.train.settings import TrainConfig
given = json.loads(Path(sys.argv[1]).read_text())
train_watched(config.from_json(TrainConfig, given["settings"]), artifacts.load(given["data"]),
              artifacts.load(given["tokenizer"]), None, out=Path(given["out"]))
"""


def watched(world, settings, out, plan=(), data="tokens"):
    import json

    from puna import config

    inject.plan(out, list(plan))
    given = {"settings": config.to_json(settings), "data": str(getattr(world, data).path), "out": str(out)}
    (out.parent / f"{out.name}.json").write_text(json.dumps({**given, "tokenizer": str(world.tokenizer.path)}))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(out.parent / f"{out.name}.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return artifacts.load(out)


def same(a, b) -> bool:
    first, second = (dict(load_model(x.path).named_parameters()) for x in (a, b))
    return all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    "layout",
    [Layout(replicate=4), Layout(shard=4), Layout(tensor=2), Layout(pipeline=2), Layout(pipeline=2, shard=2)],
    ids=str,
)
def test_the_slow_rank_is_named_and_not_those_that_wait_for_it(world, tmp_path, layout):
    settings = replace(RUN.resilience, straggler=StragglerPolicy(window=6, least=4, ratio=2.5))
    plan = [{"kind": "slow", "step": 14, "rank": 1, "seconds": 0.2, "steps": 14}]
    watched(world, replace(RUN, layout=layout, steps=30, resilience=settings), tmp_path / "slow", plan)
    named = [event["rank"] for event in ledger.read(tmp_path / "slow") if event["event"] == "slow"]
    assert named and set(named) == {1}


@pytest.mark.parametrize(
    "objective, layout",
    [
        (DpoObjective(sequence_length=96, pairs=8), Layout(shard=2)),
        (RewardObjective(sequence_length=96, pairs=8), Layout(pipeline=2)),
        (RewardObjective(sequence_length=96, pairs=8), Layout(replicate=2)),
        (None, Layout(shard=2)),
    ],
    ids=["dpo", "reward", "reward twice", "muon"],
)
def test_pairs_and_muon_that_are_killed_and_given_nan_end_with_the_same_bits(world, tmp_path, objective, layout):
    untied = replace(TOY, tied=False)  # then a reward model's state has an output matrix that never has a gradient
    settings = replace(RUN, layout=layout, steps=20, save_every_steps=5, model=untied)
    if objective:
        name = "dpo" if isinstance(objective, DpoObjective) else "reward"
        settings = replace(settings, lm=None, **{name: objective})
    else:
        settings = replace(settings, optimizer=OptimizerConfig(kind="muon"))
    data = "preferences" if objective else "tokens"
    calm = watched(world, settings, tmp_path / "calm", data=data)
    plan = [
        {"kind": "kill", "step": 7, "rank": 1},
        {"kind": "missing", "step": 13, "rank": 1},  # to a state on disk
    ]
    weighs = not isinstance(objective, RewardObjective)  # whose batches are tokens alone: no number to spoil
    plan += [{"kind": "nan", "step": 11, "rank": 0}] * weighs
    disturbed = watched(world, settings, tmp_path / "disturbed", plan, data=data)
    assert same(calm, disturbed) and calm.digest == disturbed.digest
    events = ledger.read(tmp_path / "disturbed")
    assert {e["step"] for e in events if e["event"] == "transient"} == ({11} if weighs else set())
    assert len([e for e in events if e["event"] == "restored"]) >= 2


@pytest.mark.parametrize(
    "layout", [Layout(replicate=2), Layout(shard=2), Layout(tensor=2), Layout(pipeline=2)], ids=str
)
def test_numbers_that_are_wrong_are_found_and_the_run_ends_with_the_same_bits(world, tmp_path, layout):
    """Not a number, once, in a batch; gradients that are wrong before the sum, twice in a row; after it, once."""
    checked = replace(RUN.resilience, recompute_every_steps=5)
    settings = replace(RUN, layout=layout, resilience=checked, steps=30)
    calm = watched(world, settings, tmp_path / "calm")
    plan = [
        {"kind": "nan", "step": 6, "rank": layout.data_ranks - 1},
        {"kind": "wrong", "step": 13, "rank": 1, "times": 20},
        {"kind": "nan", "step": 21, "rank": 0},
        {"kind": "flip", "step": 26, "rank": 0},
    ]
    if layout.replicate == 1:  # after the sum only replicas have the same numbers
        del plan[-1]
    disturbed = watched(world, settings, tmp_path / "disturbed", plan)
    assert same(calm, disturbed) and calm.digest == disturbed.digest
    events = ledger.read(tmp_path / "disturbed")
    assert {e["step"] for e in events if e["event"] == "transient"} >= {6, 21}
    found = [e for e in events if e["event"] == "fault"]
    assert found[0]["kind"] == "corruption" and found[0]["step"] == 14 and "rank 1" in found[0]["why"]
    assert [e["rank"] for e in events if e["event"] == "accused"] == [1, *(p["rank"] for p in plan[3:])]
    # A rank that comes out differently each time it is asked ends, and all are started again; else they roll back.
    back = [e["step"] for e in events if e["event"] in ("rolled_back", "restored") and e["at"] > found[0]["at"]]
    assert back == [10]


@pytest.mark.parametrize("layout", [Layout(replicate=2, shard=2), Layout(pipeline=2, tensor=2)], ids=str)
def test_a_rank_that_waits_for_ever_is_named_though_all_do(world, tmp_path, layout):
    settings = replace(RUN.resilience, detect=DetectPolicy(step_budget_s=2.0))
    plan = [{"kind": "hang", "step": step, "rank": rank} for step, rank in ((5, 2), (11, 0))]
    watched(world, replace(RUN, layout=layout, steps=15, resilience=settings), tmp_path / "hung", plan)
    found = [event for event in ledger.read(tmp_path / "hung") if event["event"] == "fault"]
    assert [(f["kind"], f["rank"], f["step"]) for f in found] == [("hang", 2, 5), ("hang", 0, 11)]
    assert all("in hang" in f["why"] for f in found)


@pytest.mark.parametrize("layout", [Layout(), Layout(replicate=2), Layout(shard=2), Layout(tensor=2)], ids=str)
def test_a_disturbed_run_ends_as_an_undisturbed_one(world, tmp_path, layout):
    settings = replace(RUN, layout=layout)
    calm = watched(world, settings, tmp_path / "calm")
    last = layout.world - 1
    plan = [
        {"kind": "kill", "step": 7, "rank": last, "phase": "data"},
        {"kind": "raise", "step": 15, "rank": 0, "phase": "backward"},
        {"kind": "stop", "step": 23, "rank": last, "phase": "backward"},
        {"kind": "kill", "step": 33, "rank": 0, "phase": "update"},
    ]
    disturbed = watched(world, settings, tmp_path / "disturbed", plan)
    assert same(calm, disturbed)
    events = ledger.read(tmp_path / "disturbed")
    assert [e["kind"] for e in events if e["event"] == "fault"] == ["killed", "crash", "hang", "killed"]
    restored = [e["step"] for e in events if e["event"] == "restored"][1:]
    assert all(p["step"] - 1 <= back <= p["step"] for p, back in zip(plan, restored))
    assert calm.digest == disturbed.digest
