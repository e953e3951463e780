"""A real scaling study on this machine: a grid of runs on real text, a law, and a size that the law has not seen.

    python benchmarks/scaling_study.py --minutes 120 --threads 2              the embedded corpus
    python benchmarks/scaling_study.py --minutes 120 --data PATH              your own text
    python benchmarks/scaling_study.py --minutes 3 --flops 1e12 --budgets 2   to see it work

At least 4 budgets of 5 sizes each, the last run with three times the largest budget's compute, predicted before it is fitted.
Interrupted, or stopped by its minutes, the same command goes on where it was. The result is written when all runs are
made: `benchmarks/results/scaling-DATE.json`, with a page beside the runs (`OUT/fit/report.html`). It passes if the
predicted run's loss is within 1% of the measured one.
"""

import argparse
import json
import time
from pathlib import Path

import machine

from puna.recipes import scaling
from puna.scaling.grid import GridConfig

RESULTS = Path(__file__).parent / "results"
WITHIN = 0.01


def main() -> int:
    options = arguments()
    grid = GridConfig(budgets=options.budgets, sizes=options.sizes, factor=options.factor)
    study = scaling.Study(data=options.data, flops=options.flops, grid=grid, threads=options.threads, seed=options.seed)
    fit = scaling.run(study, options.minutes, options.out)
    if fit is None or fit.path.name != "fit":
        print("not all runs are made yet: the same command with more --minutes goes on")
        return 0
    found = json.loads(fit.file("fit.json").read_text())
    record = summary(found, options.out)
    print(json.dumps({k: record[k] for k in ("runs", "predicted", "left_out", "exponents", "seconds")}, indent=1))
    if not options.no_result:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"scaling-{time.strftime('%Y-%m-%d')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"result: {path}")
    print(f"report: {fit.path / 'report.html'}")
    worst = max((abs(p["error"]) for p in record["predicted"]), default=float("inf"))
    print(f"predicted run: {'within' if worst <= WITHIN else 'NOT within'} {WITHIN:.0%} ({worst:.2%})")
    return 0 if worst <= WITHIN else 1


def summary(found: dict, out: Path) -> dict:
    """What is kept of a study: its runs, its law, and how well it predicted."""
    manifests = [json.loads(p.read_text()) for p in sorted((out / "runs").glob("*/manifest.json"))]
    left_out = [abs(e["error"]) for e in found["errors"]["by_size"]]
    return {
        "command": machine.command(),
        "revision": machine.revision(),
        "processor": machine.processor(),
        "seconds": round(sum(m["seconds"] for m in manifests)),
        "plan": json.loads((out / "plan.json").read_text()),
        "runs": found["runs"],
        "predicted": found["errors"]["predicted"],
        "left_out": {
            "mean_error": sum(left_out) / len(left_out) if left_out else None,
            "largest_error": max(left_out, default=None),
        },
        "exponents": found["exponents"],
        "optima": found["optima"],
        "law": found["law"],
        "warnings": found["warnings"],
        "points": found["points"],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path("out/scaling-study"))
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--flops", type=float, default=0.0, help="of all runs; 0: what the minutes allow")
    parser.add_argument("--budgets", type=int, default=4)
    parser.add_argument("--sizes", type=int, default=5)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-result", action="store_true", help="write nothing into benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
