"""A soak: a run of four processes under faults of every kind at random moments, and what of its time was training.

    python benchmarks/faults_soak.py                        20 minutes, a fault every 30 s on average
    python benchmarks/faults_soak.py --minutes 3 --mean 15
    python benchmarks/faults_soak.py --reference FOLDER --only-reference      beforehand: the run without faults
    python benchmarks/faults_soak.py --reference FOLDER                       then the soak takes its minutes, no more

Moments are a Poisson process's. The run must finish by itself, with the bits of a run without faults; the ledger says
where its time went. A model of 256 x 16 and a step of about 0.1 s, so that a state has to be written but nothing
computes for long. Results go to benchmarks/results/faults_soak.json, the picture beside it.
"""

import argparse
import contextlib
import hashlib
import inspect
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "faults")]

import faults_world  # noqa: E402
import torch  # noqa: E402
from faults_world import Started, same_weights, started  # noqa: E402
from machine import command, processor, revision  # noqa: E402

from puna.planner.policies import DetectPolicy, RestartPolicy, SavePolicy, StragglerPolicy  # noqa: E402
from puna.train.resilience import goodput, inject, ledger  # noqa: E402
from puna.train.resilience.settings import ResilienceConfig  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
STEP_S = 0.1
PAUSE_S = 0.08  # the rest of a step is computing
TRAINING = 0.85  # share of the time that is expected to be training
RECHECK = 25  # steps
MORE = {"slow": {"seconds": 0.15, "steps": 30}, "wrong": {"times": RECHECK}}  # of some kinds
FROM_OUTSIDE = ("supervisor", "zygote", "disk full", "SIGTERM", "launcher")
UNTOUCHED = FROM_OUTSIDE[:3]  # after the others somebody has to give the command again
SETTINGS = ResilienceConfig(
    save=SavePolicy(every_steps=20, kept=3),
    detect=DetectPolicy(step_budget_s=1.5, start_budget_s=120.0),
    restart=RestartPolicy(first_wait_s=0.1, without_progress=10),
    straggler=StragglerPolicy(window=12, least=6, ratio=1.5),
    recompute_every_steps=RECHECK,
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=20.0)
    options.add_argument("--mean", type=float, default=30.0, help="seconds between faults")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--outside", nargs="*", choices=FROM_OUTSIDE, default=list(UNTOUCHED), help="faults that are not a rank's"
    )
    options.add_argument("--out", type=Path, default=RESULTS / "faults_soak.json")
    options.add_argument("--reference", type=Path, help="folder of the run without faults: made if it is not finished")
    options.add_argument("--only-reference", action="store_true", help="make the run without faults, and nothing else")
    given = options.parse_args()
    if given.only_reference and given.reference is None:
        options.error("--only-reference needs --reference FOLDER")
    draw = random.Random(given.seed)
    steps = int(given.minutes * 60 / STEP_S * TRAINING)  # the rest is what faults and saving will cost
    with tempfile.TemporaryDirectory() as folder:
        reference, out = given.reference or Path(folder) / "undisturbed", Path(folder) / "soak"
        undisturbed(reference, steps)
        if given.only_reference:
            return
        with small_disk(out / "work") as is_small:
            given.outside = [kind for kind in given.outside if is_small or kind != "disk full"]
            plan, outside = drawn(draw, steps, given)
            soak = run(out, plan, steps, SETTINGS, pause_s=PAUSE_S)
            soak = disturb(soak, outside, steps, draw)
            status, said = soak.finish(given.minutes * 180)
            assert status == 0, said
            report(given, out, same_weights(reference, out), len(plan) + len(outside))


def undisturbed(folder: Path, steps: int) -> None:
    """The run without faults, in `folder`: as it lies there, if it is finished; else made, or made to its end.

    Beside it lies what its weights depend on. Exits with what differs, if a run in `folder` is of other settings.
    """
    known, settings = folder / "reference.json", weights_depend_on(steps)
    found = json.loads(known.read_text()) if known.exists() else {}
    if not found and folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not a reference of this soak: it has no {known.name}\nhint: give another folder")
    differ = {name: (found.get(name), value) for name, value in settings.items() if found and found.get(name) != value}
    if differ:
        said = "\n".join(f"  {name}: there {there}, here {here}" for name, (there, here) in differ.items())
        sys.exit(f"the reference in {folder} is of other settings:\n{said}\nhint: give a folder that does not exist")
    if found.get("finished") and (folder / "final.pt").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(settings))
    plain = ResilienceConfig(save=SavePolicy(every_steps=1000, memory_every_steps=0), check_every_steps=0)
    status, said = run(folder, None, steps, plain, pause_s=0.0).finish(3600)
    assert status == 0, said
    known.write_text(json.dumps(settings | {"finished": True}))


def weights_depend_on(steps: int) -> dict[str, Any]:
    """What the last weights of a run come from: its length, what computes, and the text of the training."""
    training = (faults_world.Run, faults_world.batch, faults_world.gradients, faults_world.step, run)
    text = "".join(inspect.getsource(part) for part in training) + str(faults_world.ROWS)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"steps": steps, "torch": torch.__version__, "processor": processor(), "training": digest}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A small file system at `folder`, so that it can be full; False where this user may not mount one."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def run(out: Path, plan: list[dict] | None, steps: int, settings: ResilienceConfig, *, pause_s: float) -> Started:
    return started(out, plan, steps=steps, settings=settings, pause_s=pause_s)


def drawn(draw: random.Random, steps: int, given: argparse.Namespace) -> tuple[list[dict], list[tuple[int, str]]]:
    """Faults by the step at which they come: those of ranks, and those from outside."""
    plan, outside, at = [], [], 60.0
    kinds = [*inject.PLANNED, *given.outside]
    while (at := at + draw.expovariate(STEP_S / TRAINING / given.mean)) < steps - 2 * RECHECK:
        kind = draw.choice(kinds)
        if kind in FROM_OUTSIDE:
            outside.append((int(at), kind))
        else:
            plan.append({"kind": kind, "step": int(at), "rank": draw.randrange(4), **MORE.get(kind, {})})
    return plan, outside


def disturb(soak: Started, outside: list[tuple[int, str]], steps: int, draw: random.Random) -> Started:
    """Wait for each fault's step, and cause it."""
    for step, kind in outside:
        soak.await_step(step, timeout_s=3600)
        time.sleep(draw.random() * STEP_S)
        inject.note(soak.out / inject.FOLDER, {"kind": kind, "step": step, "rank": None})
        if kind in UNTOUCHED:
            OUTSIDE[kind](soak)
            continue
        soak.process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        soak.finish()
        time.sleep(0.5)
        soak = run(soak.out, None, steps, SETTINGS, pause_s=PAUSE_S)
    return soak


def kill_supervisor(soak: Started) -> None:
    begun = [e["pid"] for e in ledger.read(soak.out) if e["event"] == "begin"]
    os.kill(begun[-1], signal.SIGKILL)


def kill_zygote(soak: Started) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if b"resilience.zygote" in (process / "cmdline").read_bytes() and int(parent) == soak.process.pid:
                os.kill(int(process.name), signal.SIGKILL)


def fill_disk(soak: Started) -> None:
    ballast = soak.out / "work" / "ballast"
    with contextlib.suppress(OSError):
        ballast.write_bytes(b"\0" * (16 << 20))
    time.sleep(3)
    ballast.unlink(missing_ok=True)


OUTSIDE = {"supervisor": kill_supervisor, "zygote": kill_zygote, "disk full": fill_disk}


def report(given: argparse.Namespace, out: Path, identical: bool, planned: int) -> None:
    events = ledger.read(out)
    book, picture = goodput.write(out)
    made = [e for e in events if e["event"] == "step"]
    between = [b["at"] - a["at"] for a, b in itertools.pairwise(made) if b["step"] == a["step"] + 1]
    step_s = statistics.median(between)
    stalls = [e.get("saving", 0.0) for e in made]
    durable = [e.get("saving", 0.0) for e in made if SETTINGS.save.durable(e["step"])]
    result: dict[str, Any] = {
        "command": command(),
        "revision": revision(),
        "processor": processor(),
        "identical": identical,
        "planned": planned,
        "came": len(inject.happened(out)),
        "faults": dict(Counter(fault["kind"] for fault in inject.happened(out))),
        "goodput": round(book.goodput, 4),
        "seconds": {name: round(seconds, 2) for name, seconds in book.seconds().items()},
        "step_s": round(step_s, 4),
        "stall_share_of_step": {
            "median": round(statistics.median(stalls) / step_s, 5),
            "mean": round(statistics.fmean(stalls) / step_s, 5),
            "median_of_those_to_disk": round(statistics.median(durable) / step_s, 5),
        },
        "median_cost_of_a_fault_s": round(statistics.median(fault.cost_s for fault in book.faults), 3),
        "steps_lost": sum(fault.lost_steps for fault in book.faults),
    }
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    here = f"{Path(__file__).resolve().parents[1]}/"  # of stacks in the picture's notes: no business of a result
    given.out.with_suffix(".svg").write_text(picture.read_text().replace(here, ""))
    print(json.dumps(result, indent=1))
    print(ledger.table(book))


if __name__ == "__main__":
    main()
