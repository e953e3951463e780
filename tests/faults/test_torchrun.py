"""The real loop under torchrun's elastic agents: two nodes, which share a disk and no memory."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loop_watched import RUN
from train_world import build

from puna import config
from puna.model.checkpoint import load_model
from puna.parallel.layout import Layout
from puna.planner.policies import DetectPolicy
from puna.train.resilience import inject, ledger

pytestmark = pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="agents and their ranks: PUNA_SLOW=1")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory):
    """What the run ends with when nobody disturbs it."""
    from test_loop_watched import watched

    out = tmp_path_factory.mktemp("runs") / "calm"
    watched(world, replace(RUN, layout=Layout(shard=4)), out)
    return weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(out).named_parameters())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Node:
    """An agent with its ranks, in a session of its own, and a folder that is its memory."""

    def __init__(self, name: str, folder: Path, world, settings, *, nodes: int, each: int, port: int):
        self.memory, self.said = folder / f"memory-{name}", folder / f"said-{name}.txt"
        self.memory.mkdir()
        path = folder / "run.json"
        path.write_text(json.dumps(config.to_json(settings)))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        environment |= {"PUNA_NODE": name, "PUNA_SHARED_MEMORY": str(self.memory)}
        if nodes > 1:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        agent = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={each}"]
        agent += ["--max-restarts=5", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
        agent += ["--rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=2", "--monitor-interval=0.1"]
        run = ["-m", "puna.cli", "pretrain", str(path), "--data", str(world.tokens.path)]
        run += ["--tokenizer", str(world.tokenizer.path), "--out", str(folder / "run")]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [*agent, *run], env=environment, stdout=said, stderr=said, start_new_session=True
            )

    def kill(self) -> None:
        """The node is gone: agent, ranks, sentry, and what was in memory."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes()
            except OSError:
                continue
            if f"PUNA_SHARED_MEMORY={self.memory}\0".encode() in environment:
                os.kill(int(process.name), signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.memory)

    def finish(self) -> None:
        status = self.process.wait(400)
        assert status == 0, self.said.read_text()[-6000:]


def await_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        events = ledger.read(out) if (out / ledger.LEDGER).is_file() else []
        if any(event["event"] == "step" and event["step"] >= step for event in events):
            return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")


def test_a_rank_that_is_killed_or_hangs_is_started_again_by_the_agent(world, calm, tmp_path):
    settings = replace(RUN, layout=Layout(shard=4))
    settings = replace(settings, resilience=replace(RUN.resilience, detect=DetectPolicy(step_budget_s=3.0)))
    plan = [
        {"kind": "kill", "step": 12, "rank": 2},
        {"kind": "stop", "step": 24, "rank": 1},
        {"kind": "hang", "step": 31, "rank": 3},
    ]
    inject.plan(tmp_path / "run", plan)
    Node("a", tmp_path, world, settings, nodes=1, each=4, port=free_port()).finish()
    assert same(weights(tmp_path / "run"), calm)
    events = ledger.read(tmp_path / "run")
    found = [(e["kind"], e["rank"]) for e in events if e["event"] == "fault"]
    assert found == [("killed", 2), ("hang", 1), ("hang", 3)]
    restored = [(e["tier"], e["step"]) for e in events if e["event"] == "restored"][1:]
    assert [tier for tier, _ in restored] == ["memory"] * 3
    assert all(p["step"] - 1 <= step <= p["step"] for p, (_, step) in zip(plan, restored))
    assert not list((tmp_path / "memory-a").iterdir())  # given back


def test_a_node_is_lost_with_its_memory_and_the_run_goes_on_from_its_neighbours_copy(world, calm, tmp_path):
    """Layout shard=4: what ranks 2 and 3 hold is nowhere else but in the copy that node a has."""
    settings, port = replace(RUN, layout=Layout(shard=4)), free_port()
    plan = [{"kind": "slow", "step": 0, "rank": 0, "seconds": 0.1}]  # time to look
    inject.plan(tmp_path / "run", plan)
    first = Node("a", tmp_path, world, settings, nodes=2, each=2, port=port)
    time.sleep(3)  # the first one is host of the rendezvous
    lost = Node("b", tmp_path, world, settings, nodes=2, each=2, port=port)
    await_step(tmp_path / "run", 26)  # newer than what is on disk
    lost.kill()
    Node("c", tmp_path, world, settings, nodes=2, each=2, port=port).finish()
    first.finish()
    assert same(weights(tmp_path / "run"), calm)
    events = ledger.read(tmp_path / "run")
    (restored,) = [e for e in events if e["event"] == "restored"][1:]
    assert restored["tier"] == "memory" and restored["step"] >= 25
