"""`puna run tiny` whole, over several seeds, and once under fire: what it reaches, how far seeds differ, and whether kills matter.

    python benchmarks/tiny.py --seeds 0 1 2 --into /tmp/tiny            three runs, each from nothing, one after the other
    python benchmarks/tiny.py --seeds 0 --into /tmp/tiny --kills 10     then seed 0 again, killed ten times on its way

Prints a table, and writes `benchmarks/results/tiny-DATE-seeds-….json`: for each seed the figures of its report, wall-clock time
and peak memory, and with `--kills` whether the final weights are those of the undisturbed run. A run that is complete in
`--into` already is read, not made again. Nothing else should run on the machine meanwhile.
"""

import argparse
import datetime
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import processor, revision

from puna import artifacts, log

RESULTS = Path(__file__).parent / "results"


def command(seed: int, out: Path, settings: list[str]) -> list[str]:
    """What a user would type."""
    return [sys.executable, "-m", "puna.cli", "run", "tiny", f"seed={seed}", f"out={out}", *settings]


def undisturbed(seed: int, out: Path, settings: list[str]) -> dict:
    """One run to its end; the figures of its report, with seconds and peak memory if it was made now."""
    fresh, started = not (out / "report.json").exists(), time.perf_counter()
    subprocess.run(command(seed, out, settings), check=True)
    found = figures(out)
    if fresh:
        found["wall seconds"] = round(time.perf_counter() - started, 1)
        found["peak memory of any process, GB"] = round(
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2
        )
    return found


def killed(seed: int, out: Path, settings: list[str], kills: int, seconds: float) -> dict:
    """A run that is killed `kills` times, at moments spread at random over `seconds`, and started again each time."""
    rng = random.Random(f"kills/{seed}")
    moments = sorted(rng.uniform(2, seconds) for _ in range(kills))
    done = 0
    for wait in [b - a for a, b in zip([0.0, *moments], moments)] + [None]:
        process = subprocess.Popen(command(seed, out, settings), start_new_session=True)
        try:
            code = process.wait(timeout=wait if wait is None else max(wait, 2))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            continue
        if code != 0:
            raise SystemExit(f"after {done} kills the run ended with exit code {code}")
        break
    return {"kills": done, "weights": weights(out)}


def weights(out: Path) -> str:
    """The hash of the final model's weights."""
    model = json.loads((out / "run.json").read_text())["model"]
    return artifacts.hash_file(out / model / "model.safetensors")


def figures(out: Path) -> dict:
    """The figures that the report leads with, and those that make them understandable, by name."""
    report = json.loads((out / "report.json").read_text())
    results = {}
    for result in report["results"]:
        results.setdefault(result["checkpoint"], {}).update(result)
    found: dict = {"base: bits per byte": results["07-base"]["bits_per_byte"]["overall"]["value"]}
    for name in ("tokens_5gram", "bytes_5gram", "bytes_8gram", "xz_primed"):
        found[f"{name}: bits per byte"] = report["baselines"]["baselines"][name]["bits_per_byte"]["overall"]["value"]
    judged = {name: r for name, r in results.items() if "eval" in r}
    accepted = [p["candidate"] for p in report["promotions"] if p["promoted"]]
    judged["promoted"] = judged[accepted[-1] if accepted else "09-sft"]
    for name, result in judged.items():
        scores = result["eval"]
        verified = scores["verified"]
        found[f"{name}: verified"] = [round(verified[k], 4) for k in ("value", "low", "high")]
        found[f"{name}: valid calls"] = scores["valid_calls"]["value"]
        for task, score in scores["tasks"].items():
            found[f"{name}: {task}"] = [round(score[k], 4) for k in ("value", "low", "high")]
        for key, value in result.get("refusal", {}).items():
            if isinstance(value, dict) and "value" in value:
                found[f"{name}: {key}"] = value["value"]
    for small in report["quantisation"]:
        found[f"{small['name']}: change of bits per byte"] = small["change"]["value"]
    found["promotions"] = [f"{p['candidate']}: {p['reason']}" for p in report["promotions"]]
    found["seconds in stages"] = report["run"]["seconds"]
    found["code"] = report["run"]["code"]
    found["weights"] = weights(out)
    return found


def table(runs: dict[int, dict]) -> str:
    """A line per figure: each seed, then the mean and the standard deviation."""
    lines = []
    for name in next(iter(runs.values())):
        values = [run.get(name) for run in runs.values()]
        numbers = [v[0] if isinstance(v, list) and v and isinstance(v[0], float) else v for v in values]
        if not all(isinstance(n, int | float) for n in numbers):
            continue
        spread = f"  mean {statistics.mean(numbers):.4g} ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else ""
        lines.append(f"{name:44s}" + "".join(f"{n:>10.4g}" for n in numbers) + spread)
    return "\n".join(lines)


def main() -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--into", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--kills", type=int, default=0, help="run the first seed once more with so many kills")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings of the recipe")
    given = parser.parse_args()
    runs = {seed: undisturbed(seed, given.into / f"seed-{seed}", given.settings) for seed in given.seeds}
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{os.cpu_count()} cores of {processor()}",
        "revision": revision(),
        "command": " ".join(["python benchmarks/tiny.py", *sys.argv[1:]]),
        "seeds": runs,
    }
    if given.kills:
        first = given.seeds[0]
        disturbed = given.into / f"seed-{first}-killed"
        record["killed"] = killed(first, disturbed, given.settings, given.kills, runs[first]["seconds in stages"])
        record["killed"]["same weights"] = record["killed"]["weights"] == runs[first]["weights"]
    print(table(runs))
    if given.kills:
        print(f"killed {record['killed']['kills']} times: same weights: {record['killed']['same weights']}")
    RESULTS.mkdir(exist_ok=True)
    seeds = "-".join(map(str, given.seeds))
    path = RESULTS / f"tiny-{record['date'][:10]}-seeds-{seeds}{'-killed' if given.kills else ''}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    log.info(f"wrote {path}")


if __name__ == "__main__":
    main()
