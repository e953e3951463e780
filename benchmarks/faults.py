"""The fault matrix: every kind of fault, several times each, on four processes.

    python benchmarks/faults.py                          all kinds, 5 times each: about ten minutes
    python benchmarks/faults.py --times 2 --kinds kill stop
    python benchmarks/faults.py --table                  write the table of docs/faults.md from the results

A run of the little data-parallel training of the tests takes each kind's faults, one after another, at random steps on
random ranks, and must end with the bits of a run without faults. For each fault:

    detect   from the fault to the alarm (a line in the ledger, or the state's being set aside)
    again    from the alarm to the next step that is done
    lost     steps that had to be made again

Results go to benchmarks/results/faults.json, kind by kind, so that a long matrix can be run in pieces.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "faults")]

from faults_world import SETTINGS, Started, same_weights, started  # noqa: E402
from machine import command, processor, revision  # noqa: E402

from puna.planner.policies import StragglerPolicy  # noqa: E402
from puna.train.resilience import home, inject, ledger  # noqa: E402
from puna.train.resilience.board import Board  # noqa: E402
from puna.train.resilience.durable import DurableTier  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
START, GAP = 24, 12  # the first fault comes after a state is on disk, and then one every so many steps
WORDS = {
    "kill": "kill -9 a rank", "stop": "SIGSTOP a rank", "hang": "a rank waits for ever", "raise": "an exception",
    "abort": "abort", "oom": "out of memory, killed by the kernel", "disk full": "disk full for 25 steps",
    "full": "no file of rank 0 can grow for 10 steps, on disk or in memory",
    "truncated": "newest state truncated, memory lost", "flipped": "a bit of the newest state flipped, memory lost",
    "missing": "a part of the newest state missing, memory lost", "slow": "a rank is slow", "flip": "a gradient's bit flipped",
    "wrong": "gradients wrong before the sum in 4 steps; one in 4 is checked",
    "nan": "a NaN batch", "SIGTERM": "SIGTERM at a random moment, started again", "supervisor": "kill -9 the supervisor",
    "launcher": "kill -9 the launcher, started again",
}  # fmt: skip
Trial = dict[str, float | None]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=5)
    options.add_argument("--kinds", nargs="+", choices=list(WORDS), default=list(WORDS))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--table", action="store_true", help="only write the table from the results")
    options.add_argument("--out", type=Path, default=RESULTS)
    given = options.parse_args()
    if not given.table:
        with tempfile.TemporaryDirectory() as folder:
            measure(given, Path(folder))
    write_table(json.loads(given.out.read_text()))


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Run the kinds, and write the results after each."""
    steps = START + GAP * given.times + 5
    reference = folder / "undisturbed"
    assert started(reference, steps=steps).finish()[0] == 0
    results = json.loads(given.out.read_text()) if given.out.exists() else {"kinds": {}}
    made = {"command": command(), "revision": revision(), "processor": processor(), "cpus": os.cpu_count()}
    for kind in given.kinds:
        out, draw = folder / kind.replace(" ", "-"), random.Random(f"{kind} {given.seed}")
        trials = MEASURES.get(kind, planned)(kind, out, draw, steps, given.times)
        results["kinds"][kind] = {"trials": trials, "identical": same_weights(reference, out)} | made
        print(line(kind, results["kinds"][kind]), flush=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
    if "bits" not in results or given.kinds == list(WORDS):
        results["bits"] = flipped_bits(folder, random.Random(given.seed)) | made
        given.out.write_text(json.dumps(results, indent=1) + "\n")


def planned(kind: str, out: Path, draw: random.Random, steps: int, times: int) -> list[Trial]:
    """Faults that the ranks do to themselves."""
    plan = [
        {"kind": kind, "step": START + GAP * i + draw.randrange(GAP // 2), "rank": draw.randrange(4)}
        for i in range(times)
    ]
    settings = SETTINGS
    if kind == "slow":
        plan = [{**fault, "seconds": 0.06, "steps": GAP - 1} for fault in plan]
        settings = replace(SETTINGS, straggler=StragglerPolicy(window=6, least=4), check_every_steps=2)
    if kind == "full":
        plan = [{**fault, "rank": 0, "steps": GAP - 2} for fault in plan]
    if kind == "wrong":
        plan = [{**fault, "times": 4} for fault in plan]
        settings = replace(SETTINGS, recompute_every_steps=4)
    finish(started(out, plan, steps=steps, settings=settings))
    if kind == "slow":
        return [_slow(out, fault) for fault in plan]
    if kind == "full":
        return [_no_room(out, fault) for fault in inject.happened(out)]
    return [_trial(out, fault) for fault in inject.happened(out)]


def _trial(out: Path, fault: dict[str, Any]) -> Trial:
    """What the ledger says of one fault."""
    events = [e for e in ledger.read(out) if e["at"] >= fault["wall"] - 0.001]
    alarm = next(e["at"] for e in events if e["event"] in ("fault", "verdict"))
    again = next(e["at"] for e in events if e["event"] == "step" and e["at"] > alarm)
    back = next(
        (e["step"] for e in events if e["event"] in ("restored", "rolled_back") and e["at"] <= again), fault["step"]
    )
    return {"detect": alarm - fault["wall"], "again": again - alarm, "lost": max(0, fault["step"] - back)}


def _slow(out: Path, fault: dict[str, Any]) -> Trial:
    """Steps are not lost; the alarm is the first word about that rank after it became slow."""
    events = ledger.read(out)
    begun = next(e["at"] for e in events if e["event"] == "step" and e["step"] == fault["step"])
    said = [e for e in events if e["event"] == "slow" and e["at"] >= begun and e["rank"] == fault["rank"]]
    return {"detect": said[0]["at"] - begun if said else None, "again": 0.0, "lost": 0}


def _no_room(out: Path, fault: dict[str, Any]) -> Trial:
    """Nothing is lost and nobody waits; the alarm is the first word about a state that could not be kept."""
    said = [e["at"] for e in ledger.read(out) if e["event"] in ("memory_failed", "save_failed")]
    found = [at for at in said if at >= fault["wall"]]
    return {"detect": found[0] - fault["wall"] if found else None, "again": 0.0, "lost": 0}


def disk_full(kind: str, out: Path, draw: random.Random, steps: int, times: int) -> list[Trial]:
    """The run's folder, with all that is written there, is a small file system: it is filled, and emptied 25 steps later."""
    trials: list[Trial] = []
    out.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode:
        print("disk full: left out, this user may not mount a small file system", flush=True)
        finish(started(out, steps=steps))
        return trials
    try:
        for _ in range(times):
            trials.append(_fill_disk(out, draw, steps))
        final = (out / "final.pt").read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
    (out / "final.pt").write_bytes(final)
    return trials


def _fill_disk(out: Path, draw: random.Random, steps: int) -> Trial:
    for path in out.glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = started(out, steps=steps, pause_s=0.03)
    run.await_step(START + draw.randrange(5))
    filled, ballast, first = time.time(), out / "ballast", progress(out)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    while progress(out) < first + 25 and run.process.poll() is None:
        time.sleep(0.02)
    ballast.unlink()
    finish(run)
    failed = next((e["at"] for e in ledger.read(out) if e["event"] == "save_failed" and e["at"] > filled), None)
    return {"detect": None if failed is None else failed - filled, "again": 0.0, "lost": 0}


def progress(out: Path) -> int:
    """The step of rank 0, from the board: the ledger on a full disk has to wait."""
    (board,) = home.open_root(home.run_id(out), out).glob("*/board")
    return Board(board, 4).read(0).step


def asked_to_end(kind: str, out: Path, draw: random.Random, steps: int, times: int) -> list[Trial]:
    """`detect` is the time to save and exit; `again` the new command's, which has everything to import."""
    return [_interrupted(out, draw, steps, START // 2 + GAP * i, signal.SIGTERM, i == times - 1) for i in range(times)]


def launcher_killed(kind: str, out: Path, draw: random.Random, steps: int, times: int) -> list[Trial]:
    """The same, without warning."""
    return [_interrupted(out, draw, steps, START // 2 + GAP * i, signal.SIGKILL, i == times - 1) for i in range(times)]


def _interrupted(out: Path, draw: random.Random, steps: int, at: int, number: int, last: bool) -> Trial:
    run = started(out, steps=steps, pause_s=0.03)
    run.await_step(at)
    time.sleep(draw.random() * 0.1)
    asked = time.time()
    run.process.send_signal(number)
    run.finish()
    left = time.time() - asked
    time.sleep(0.5)  # ranks that lost their launcher end by themselves
    done = run.step()
    begun = time.time()
    run = started(out, steps=steps, pause_s=0.03)
    restored = _awaited(out, "restored", begun)
    again = _awaited(out, "step", restored["at"])["at"] - begun
    if last:
        finish(run)
    else:
        run.process.send_signal(signal.SIGTERM)
        run.finish()
    return {"detect": left, "again": again, "lost": max(0, done - restored["step"])}


def _awaited(out: Path, event: str, since: float) -> dict[str, Any]:
    """The first such line of the ledger after `since`. Raises `TimeoutError` after a minute."""
    for _ in range(1200):
        if found := next((e for e in ledger.read(out) if e["event"] == event and e["at"] > since), None):
            return found
        time.sleep(0.05)
    raise TimeoutError(f"no {event!r} in the ledger of {out}")


def supervisor_killed(kind: str, out: Path, draw: random.Random, steps: int, times: int) -> list[Trial]:
    """The ranks notice nothing; `detect` is the time until another one watches."""
    run, trials = started(out, steps=steps, pause_s=0.05), []
    for i in range(times):
        run.await_step(START + GAP * i)
        pid = [e["pid"] for e in ledger.read(out) if e["event"] == "begin"][-1]
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        while not (begun := [e["at"] for e in ledger.read(out) if e["event"] == "begin" and e["at"] > killed]):
            time.sleep(0.01)
        trials.append({"detect": begun[0] - killed, "again": 0.0, "lost": 0})
    finish(run)
    return trials


MEASURES: dict[str, Callable[..., list[Trial]]] = {
    "disk full": disk_full,
    "SIGTERM": asked_to_end,
    "launcher": launcher_killed,
    "supervisor": supervisor_killed,
}


def finish(run: Started) -> None:
    status, said = run.finish()
    assert status == 0, f"exit status {status}: {said}"


def flipped_bits(folder: Path, draw: random.Random) -> dict[str, int]:
    """Single bits of a saved state, anywhere in its files: how many of 200 are found."""
    out = folder / "bits"
    finish(started(out, steps=START))
    state = DurableTier(out / "work").states()[-1]
    files = sorted(state.path.iterdir())
    found = 0
    for _ in range(200):
        file = draw.choices(files, weights=[p.stat().st_size for p in files])[0]
        content = file.read_bytes()
        inject.flip_file_bit(file, draw)
        found += bool(state.check(0))
        file.write_bytes(content)
    assert state.check(0) == ""
    print(f"flipped bits found: {found} of 200", flush=True)
    return {"flipped": 200, "found": found}


def line(kind: str, result: dict[str, Any]) -> str:
    """One kind as a row of the table."""
    trials = result["trials"]

    def worst(name: str) -> str:
        values = [t[name] for t in trials if t[name] is not None]
        missed = len(trials) - len(values)
        if not values:
            return "not found" if trials else "not run"
        text = f"{statistics.median(values):.2f} ({max(values):.2f})"
        return text + (f", {missed} not found" if missed else "")

    lost = f"{max((t['lost'] for t in trials), default=0):.0f}"
    same = "yes" if result["identical"] else "**no**"
    return f"| {WORDS[kind]} | {len(trials)} | {worst('detect')} | {worst('again')} | {lost} | {same} |"


def _made(kinds: dict[str, Any]) -> Iterator[str]:
    """One sentence for each run that rows of the table are from."""
    runs: dict[str, list[str]] = {}
    for kind, found in kinds.items():
        run = f"`{found['command']}` at {found['revision']}, {found['processor']}, {found['cpus']} CPUs"
        runs.setdefault(run, []).append(WORDS[kind])
    first = max(runs, key=lambda run: len(runs[run]))
    yield f"{first}."
    for run, names in runs.items():
        if run != first:
            yield f"The rows {'; '.join(names)}: {run}."


def write_table(results: dict[str, Any]) -> None:
    """Put the table between its marks in docs/faults.md."""
    rows = [
        "| fault | times | detected after, s | training again after, s | steps lost, at most | same bits |",
        "|---|---|---|---|---|---|",
        *(line(kind, results["kinds"][kind]) for kind in WORDS if kind in results["kinds"]),
    ]
    bits = results.get("bits", {"found": 0, "flipped": 0})
    note = " ".join(_made(results["kinds"]))
    said = f"Seconds are the median, in brackets the longest. Single bits flipped in a saved state: {bits['found']} of {bits['flipped']} found."
    text = PAGE.read_text()
    begin, end = "<!-- faults: begin -->", "<!-- faults: end -->"
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    PAGE.write_text(head + begin + "\n" + "\n".join(rows) + f"\n\n{said} {note}\n" + end + tail)
    print("\n".join(rows))


if __name__ == "__main__":
    main()
