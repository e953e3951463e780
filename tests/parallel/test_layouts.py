"""Real processes: any layout computes what one process computes, and hands over to any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layout_runs import CONFIG, losses
from train_world import build

from puna.config import to_json
from puna.model.folder import load_config
from puna.parallel.context import attend_across, local_index

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent


def started(script: Path, *arguments: str, timeout_s: int = 900) -> dict:
    """What a script prints at its end, as JSON. Its processes are its own: this one has computed, and cannot be forked."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "train")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s)
    assert done.stdout, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_handful_of_layouts_gives_the_loss_and_gradients_of_one_process():
    found = started(ROOT / "benchmarks" / "parallel.py", "--few")
    assert found["bad"] == []
    assert found["cases"] == 11


def agrees(losses: list[float], whole: list[float]) -> bool:
    return losses == pytest.approx(whole, rel=1e-4)


def test_a_run_goes_on_with_other_processes_and_has_the_same_losses_and_samples(tmp_path):
    build(tmp_path / "world")
    runs = {"moved": [{"pipeline": 2, "tensor": 2}, {"shard": 2}]}
    found = started(HERE / "layout_runs.py", str(tmp_path / "world"), str(tmp_path / "out"), json.dumps(runs))
    assert found["whole"][0] > found["whole"][-1] + 0.3
    assert agrees(found["moved"], found["whole"])
    assert len(set(found["samples"].values())) == 1


@pytest.mark.parametrize("kind", ["muon", "dpo", "reward"])
def test_muon_and_pairs_go_on_with_other_processes_and_a_stopped_run_ends_with_the_same_bits(tmp_path, kind):
    build(tmp_path / "world")
    runs = {
        "moved": [{"tensor": 2, "context": 2}, {"pipeline": 2}],
        "straight": [{"shard": 2}],
        "stopped": [{"shard": 2}, {"shard": 2}],
    }
    given = [str(tmp_path / "world"), str(tmp_path / "out"), json.dumps(runs), kind]
    found = started(HERE / "layout_runs.py", *given)
    whole = found["whole"]
    assert whole[0] > whole[7] + 0.1, "it learns"
    for name in runs:
        assert agrees(found[name], whole), name
    assert len(set(found["samples"].values())) == 1
    assert found["weights"]["stopped"] == found["weights"]["straight"]
    assert len(found["weights"]["whole"]) == (2 if kind == "reward" else 1)


@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="minutes long: PUNA_SLOW=1")
@pytest.mark.slow
def test_the_whole_matrix_agrees():
    for world in ("2", "4", "8"):
        found = started(ROOT / "benchmarks" / "parallel.py", "--worlds", world, "--dry")
        assert found["bad"] == []


@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="minutes long: PUNA_SLOW=1")
@pytest.mark.slow
def test_many_layouts_give_the_loss_curve_of_one_process(tmp_path):
    build(tmp_path / "world")
    runs = {
        "tensor": [{"tensor": 2}],
        "replicas": [{"replicate": 2, "shard": 2}],
        "all": [{"tensor": 2, "context": 2, "pipeline": 2}],
        "around": [{"context": 2, "shard": 2}, {}, {"pipeline": 2, "stages_per_rank": 2, "shard": 2}],
    }
    found = started(HERE / "layout_runs.py", str(tmp_path / "world"), str(tmp_path / "out"), json.dumps(runs))
    for name in runs:
        assert agrees(found[name], found["whole"]), name
    assert len(set(found["samples"].values())) == 1


@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="minutes long: PUNA_SLOW=1")
@pytest.mark.slow
def test_processes_that_torchrun_starts_train_as_one_does(tmp_path):
    world = build(tmp_path / "world")
    recipe = tmp_path / "run.json"
    recipe.write_text(json.dumps(to_json(CONFIG)))
    given = ["pretrain", str(recipe), "--data", str(world.tokens.path), "--tokenizer", str(world.tokenizer.path)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", "puna.cli"]
    shape = ["--layout", "tensor=2", "shard=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, command in {"one": ["-m", "puna.cli", *given], "four": [*torchrun, *given, *shape]}.items():
        command = [sys.executable, *command, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.strip() == str(tmp_path / name)  # one process speaks for all
    one, four = (losses(tmp_path / name) for name in ("one", "four"))
    assert four == pytest.approx(one, rel=1e-3)  # products in bfloat16
    assert load_config(tmp_path / "four") == CONFIG.model


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_context_ranks_share_out_all_tokens_and_have_the_same_number_of_pairs(ranks):
    held = [local_index(64, ranks, rank) for rank in range(ranks)]
    assert torch.cat(held).sort().values.tolist() == list(range(64))
    assert len({int((index + 1).sum()) for index in held}) == 1


def test_a_token_that_attends_to_nothing_gives_zero_and_no_nan():
    documents = torch.tensor([[0, 0, 0, -1, -1, 1, 1, -1]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, heads, 4, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    out = attend_across(documents, None)(0, q, k, v)
    out.sum().backward()
    empty = documents[0] < 0
    assert torch.all(out[0, empty] == 0) and torch.all(out[0, ~empty] != 0)
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert torch.all(x.grad[0, empty] == 0)
    lone = attend_across(documents[:, 5:7], None)(0, q[:, 5:7], k[:, 5:7], v[:, 5:7])
    assert torch.allclose(out[:, 5:7], lone, atol=1e-6)
