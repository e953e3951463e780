"""A small data-parallel training for fault tests: a two-layer network on gloo processes, with the guard of the real loop.

Batches are a function of the sample index alone. Faults come from `inject`, so the training code is the same with and
without them. It writes its last weights, and which samples it trained on, where the test reads them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from puna import config
from puna.errors import PunaError
from puna.parallel.brought import Brought
from puna.planner.policies import DetectPolicy, RestartPolicy, SavePolicy, Verdict
from puna.train.resilience import inject, ledger
from puna.train.resilience.guard import Guard
from puna.train.resilience.peers import Peers, meet
from puna.train.resilience.settings import ResilienceConfig

ROWS = 8  # per rank and step


class Run:
    """What the guard sees of a training."""

    def __init__(self, width: int):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.brought = Brought()
        self.position, self.consumed, self.rate = SimpleNamespace(step=0), 0, 1.0


def capture(run: Run):
    tensors = {f"model.{name}": p.detach() for name, p in run.model.named_parameters()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    return tensors, {"step": run.position.step, "consumed": run.consumed, "rate": run.rate}, {}


@torch.no_grad()
def fill(run: Run, tensors, record) -> None:
    for name, parameter in run.model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
    moments: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value.clone()
    run.optimizer.load_state_dict({"state": moments, "param_groups": run.optimizer.state_dict()["param_groups"]})
    run.position.step = record["step"]
    run.consumed, run.rate = record["consumed"], record["rate"]


def batch(first: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = []
    for row in range(ROWS):
        generator = torch.Generator().manual_seed(first + rank + row * world)
        rows.append(torch.randn(16, generator=generator))
    x = torch.stack(rows)
    return x, x.sin().sum(1, keepdim=True)


def gradients(run: Run, guard: Guard, rank: int, world: int) -> tuple[float, float]:
    guard.beat(run.position.step, "backward")
    x, y = batch(run.consumed, rank, world)
    x = inject.spoil(run.position.step, x)
    run.optimizer.zero_grad()
    loss = (run.model(x) - y).square().mean()
    loss.backward()
    flat = torch.cat([p.grad.reshape(-1) for p in run.model.parameters()] + [loss.detach().reshape(1)])
    run.brought.begin()
    run.brought.bring(flat)
    if world > 1:
        dist.all_reduce(flat)
    flat /= world
    place = 0
    for p in run.model.parameters():
        p.grad.copy_(flat[place : place + p.numel()].view_as(p))
        place += p.numel()
    guard.beat(run.position.step, "update")
    return flat[-1].item(), nn.utils.clip_grad_norm_(run.model.parameters(), 1.0).item()


def roll_back(run: Run, guard: Guard, verdict: Verdict) -> None:
    consumed = run.consumed + ROWS * guard.peers.world
    assert guard.restore(run, verdict.to)
    if verdict.pass_over:
        run.consumed, run.rate = consumed, verdict.rate


def over(run: Run, guard: Guard, steps: int) -> bool:
    if run.position.step < steps:
        return False
    verdict = guard.settle()
    if verdict.action != "go":
        roll_back(run, guard, verdict)
    return verdict.action == "go"


def train(*, out: str, steps: int, settings: dict, width: int = 32, pause_s: float = 0.0, alone: bool = False) -> None:
    """One rank. With `alone`, each says that what it holds nobody else does, as ranks of a sharded model would."""
    torch.set_num_threads(1)
    meet()
    peers = Peers.replicated()
    if alone:
        peers = Peers(rank=peers.rank, world=peers.world, part=peers.rank, parts=peers.world)
    run = Run(width)
    faults = inject.planned(Path(out), [run.model], run.brought)
    how = config.from_json(ResilienceConfig, settings)
    with Guard(how, Path(out), capture, fill, peers=peers, brought=run.brought, on_beat=faults) as guard:
        guard.restore(run)
        while not over(run, guard, steps):
            step(run, guard, pause_s)
        if peers.rank == 0:
            torch.save(run.model.state_dict(), Path(out) / "final.pt")
            (Path(out) / "final.json").write_text(json.dumps({"consumed": run.consumed, "rate": run.rate}))
        guard.finished()


def step(run: Run, guard: Guard, pause_s: float) -> None:
    number, peers = run.position.step, guard.peers
    guard.beat(number, "data")
    verdict = Verdict(action="again")
    while verdict.action == "again":
        loss, norm = gradients(run, guard, peers.rank, peers.world)
        time.sleep(pause_s)
        verdict = guard.judge(number, loss, norm)
    if verdict.action == "stop":
        raise PunaError(f"step {number}: {verdict.why}")
    if verdict.action in ("roll_back", "lower_rate"):
        return roll_back(run, guard, verdict)
    guard.beat(number, "update")
    if verdict.action == "go":
        for group in run.optimizer.param_groups:
            group["lr"] = 3e-3 * run.rate
        run.optimizer.step()
    run.position.step += 1
    run.consumed += ROWS * peers.world
    guard.after_step(run)


class Started:
    """A launcher in a process of its own, as a person would start it."""

    def __init__(self, out: Path, argument: dict):
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        (out / "job.json").write_text(json.dumps(argument))
        folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(out / "job.json")]
        self.errors = (out / "errors.txt").open("w")
        self.process = subprocess.Popen(command, env=environment, stdout=self.errors, stderr=self.errors)

    def finish(self, timeout_s: float = 300) -> tuple[int, str]:
        """Exit status, and what was said."""
        status = self.process.wait(timeout_s)
        return status, self.said()

    def said(self) -> str:
        return (self.out / "errors.txt").read_text()

    def step(self) -> int:
        """The newest step in the ledger."""
        path = self.out / ledger.LEDGER
        if not path.exists():
            return -1
        with path.open("rb") as file:  # the end of it alone: this is asked often, and a long run writes much
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().split(b"\n")[1 if file.tell() > 8192 else 0 : -1]
        events = [json.loads(line) for line in lines if b'"step"' in line]
        return max((e["step"] for e in events if e["event"] == "step"), default=-1)

    def await_step(self, step: int, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while self.step() < step and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.step() >= step, self.said()


SETTINGS = ResilienceConfig(
    save=SavePolicy(every_steps=20),
    detect=DetectPolicy(step_budget_s=1.0, start_budget_s=60.0),
    restart=RestartPolicy(first_wait_s=0.1),
)


def started(
    out: Path,
    faults: list[dict] | None = None,
    *,
    steps: int = 60,
    processes: int = 4,
    settings: ResilienceConfig = SETTINGS,
    target: str = "faults_world:train",
    pause_s: float = 0.01,
    alone: bool = False,
    **job,
) -> Started:
    """Launch the little training with these faults planned."""
    if faults is not None:
        inject.plan(out, faults)
    argument = {"out": str(out)}
    if target.endswith(":train"):
        argument |= {"steps": steps, "settings": config.to_json(settings), "pause_s": pause_s, "alone": alone}
    work = {"target": target, "argument": argument, "processes": processes, "modules": ["faults_world"], **job}
    return Started(out, {**work, "settings": config.to_json(settings)})


def same_weights(a: Path, b: Path) -> bool:
    """Are two runs' last weights equal, bit for bit?"""
    first, second = (torch.load(path / "final.pt", weights_only=True) for path in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def complain(*, out: str) -> None:
    raise PunaError("the data is not there", hint="give data that exists")


if __name__ == "__main__":
    from puna.train.resilience.job import Job
    from puna.train.resilience.launcher import launch

    path = Path(sys.argv[1])
    sys.exit(launch(config.from_json(Job, json.loads(path.read_text())), path.parent))
