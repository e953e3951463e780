"""Does the simulator of a cluster foretell a real run? Real processes, real kills, the trainer's own supervisor.

    python benchmarks/simulated_goodput.py                  two policies, about two minutes on a quiet machine
    python benchmarks/simulated_goodput.py --steps 2000 --seeds 4 --write

Short runs with kills at known steps measure what the simulator must be told: the seconds of a step, of a save, until a
kill is noticed, of a restart. Between them other runs are killed at random, and the goodput that their ledger gives is
compared with the simulator's, which knows of those runs only how many steps they have and how often they are killed.
The training is the small data-parallel one of the fault tests, on gloo; pauses stand for computing. The status is 0 if
both policies come out within 5 points. Nothing else should run on the machine: times are measured.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from machine import command, processor, revision

from puna import config
from puna.planner.expected import expected
from puna.planner.failures import Cause, FailureTable
from puna.planner.policies import SavePolicy
from puna.planner.scenario import DAY_S, Scenario, plain
from puna.planner.study import study
from puna.train.resilience import inject
from puna.train.resilience.job import Job
from puna.train.resilience.launcher import launch
from puna.train.resilience.ledger import Account, account, read
from puna.train.resilience.settings import ResilienceConfig

WORLD = Path(__file__).parent.parent / "tests" / "faults"
RESULTS = Path(__file__).parent / "results"
POLICIES = {
    "disk": SavePolicy(every_steps=40, memory_every_steps=0),
    "memory": SavePolicy(every_steps=40, memory_every_steps=1),
}
KNOWN = [37, 67, 87]  # steps in which the runs are killed from which times are measured
WITHIN = 0.05  # what the comparison must hold, a share of the time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=420, help="of each run that is killed at random")
    parser.add_argument("--pause-s", type=float, default=0.05, help="seconds of a step that stand for computing")
    parser.add_argument("--between-steps", type=float, default=60, help="mean steps between two kills")
    parser.add_argument("--seeds", type=int, default=1, help="killed runs of each policy")
    parser.add_argument("--write", action="store_true", help="write a dated result")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(WORLD), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(WORLD))
    found = [compared(name, policy, options) for name, policy in POLICIES.items()]
    print(f"{'policy':<8}{'kills':>6}{'measured':>10}{'simulated':>11}{'nine of ten runs':>20}{'formula':>9}")
    for row in found:
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        print(
            f"{row['policy']:<8}{row['kills']:>6}{row['measured']:>10.1%}{row['simulated']:>11.1%}{interval:>20}{row['formula']:>9.1%}"
        )
    if options.write:
        path = RESULTS / f"simulated-goodput-{time.strftime('%Y-%m-%d')}.json"
        record = {"command": command(), "revision": revision(), "processor": processor(), "rows": found}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)
    return 0 if all(abs(row["measured"] - row["simulated"]) <= WITHIN for row in found) else 1


def compared(name: str, policy: SavePolicy, options: argparse.Namespace) -> dict:
    """One policy: measured times, then goodput measured and simulated."""
    before = measured_times(trained(policy, 110, KNOWN, options))
    goodputs, kills = [], 0
    for seed in range(options.seeds):
        steps = struck(random.Random(seed), options.steps, options.between_steps, policy.every_steps)
        goodputs.append(goodput(trained(policy, options.steps, steps, options)))
        kills += len(steps)
    after = measured_times(trained(policy, 110, KNOWN, options))
    times = {key: (before[key] + after[key]) / 2 for key in before}  # the machine may be faster by now, or slower
    effective = 1.0
    for _ in range(30):  # the run is struck so often for each step it gets ahead, a cluster for each hour that passes
        scenario = scenario_of(policy, times, options, effective)
        effective = expected(scenario)
    simulated = study(scenario, range(200)).effective
    return {
        "policy": name,
        "times": times,
        "kills": kills,
        "measured": statistics.fmean(goodputs),
        "simulated": simulated.mean,
        "low": simulated.low,
        "high": simulated.high,
        "formula": expected(scenario),
    }


def struck(draw: random.Random, steps: int, between: float, every: int) -> list[int]:
    """Steps at which faults strike: as many as are to be expected, anywhere in the run, evenly far from saves.

    A Poisson process is as even as that in the mean. Left to chance, the number of kills and how long after a save each one
    comes would need hundreds of kills to tell a wrong forecast from bad luck.
    """
    count = max(1, round(steps / between))
    blocks = draw.sample(range((steps - 2) // every), count)
    return sorted(block * every + int((n + draw.random()) / count * every) + 1 for n, block in enumerate(blocks))


def trained(policy: SavePolicy, steps: int, kills: list[int], options: argparse.Namespace) -> Account:
    """The account of a run that is killed in these steps."""
    draw = random.Random(steps)
    # Replicas are compared from copies in memory, and what is there a restart uses: without memory, no comparisons.
    settings = ResilienceConfig(save=policy, check_every_steps=10 if policy.memory_every_steps else 0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        out.mkdir()
        inject.plan(out, [{"kind": "kill", "step": s, "rank": draw.randrange(options.processes)} for s in kills])
        argument = {
            "out": str(out),
            "steps": steps,
            "settings": config.to_json(settings),
            "pause_s": options.pause_s,
        }
        job = Job(
            target="faults_world:train",
            argument=argument,
            processes=options.processes,
            modules=("faults_world",),
            settings=settings,
        )
        status = launch(job, out)
        if status:
            raise SystemExit(f"the run ended with status {status}")
        return account(read(out))


def measured_times(found: Account) -> dict[str, float]:
    """What the simulator is told, from the account of a run with known kills."""
    steps = [i.seconds for i in found.intervals if i.category in ("training", "repeated") and i.step is not None]
    seconds = found.seconds()
    waited = seconds["saving"] + seconds["checking"]
    return {
        "step_s": statistics.median(steps),
        "saving_per_step_s": waited / len(steps),
        "detect_s": statistics.fmean(fault.detecting_s for fault in found.faults),
        "restart_s": statistics.fmean(fault.restarting_s for fault in found.faults),
    }


def goodput(found: Account) -> float:
    """Training as a share of all time from the first step on: the start is no fault's."""
    seconds = found.seconds()
    ran = sum(seconds.values()) - seconds["down"] - seconds["starting"]
    return seconds["training"] / ran


def scenario_of(policy: SavePolicy, times: dict[str, float], options: argparse.Namespace, effective: float) -> Scenario:
    """The real run as a scenario: one node, one cause of faults, the measured times, the same policy.

    `effective` is the share of the time in which steps are made: it turns steps between faults into hours.
    """
    step_s = times["step_s"]
    table = FailureTable(
        gpus=options.processes,
        hours=options.between_steps * step_s / effective / 3600,
        causes=(Cause(name="kill", count=1, node=False),),
    )
    scenario = plain(
        save_every_steps=policy.every_steps,
        save_stall_s=0.0,
        detect_s=times["detect_s"],
        restart_s=times["restart_s"],
        gpus=options.processes,
        gpus_per_node=options.processes,
        spares=0,
        step_s=step_s,
        days=options.steps * step_s / effective / DAY_S,
        failures=table,
    )
    # Whatever a step waits for saves and checks is spread evenly over steps here, as it was measured.
    every = policy.memory_every_steps or 1
    saves = replace(policy, memory_every_steps=every) if policy.memory_every_steps else policy
    stall = (
        {"memory_stall_s": times["saving_per_step_s"]}
        if policy.memory_every_steps
        else {"save_stall_s": times["saving_per_step_s"] * policy.every_steps}
    )
    return replace(scenario, save=saves, times=replace(scenario.times, **stall))


if __name__ == "__main__":
    sys.exit(main())
