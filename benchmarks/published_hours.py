"""Device-hours that were published for whole pretraining runs, beside those of a plan.

    python benchmarks/published_hours.py                          the table; ten seconds, no GPU, nothing is measured
    python benchmarks/published_hours.py --docs docs/planning.md

A plan gets the size, the tokens, the devices and the sequence length, and nothing else: layout, batch and software are its
own. Published hours hold all that was paid for (restarts, evaluations, stages of longer context), a plan's hold
one undisturbed kind of step and what interruptions cost, so that published ones should be somewhat more. The column of their MFU says
what the hours mean if all of them trained: where it is far below what anybody reaches on such devices, more than one
pretraining run is in them.

Prints a table and writes `benchmarks/results/published-hours-DATE.json` (or `--out`); exit code 1 if a run that was pretraining
alone is not within a factor of 0.9 to 1.4 of its plan.
"""

import argparse
import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import command, revision

from puna.model.sizes import SIZES
from puna.planner.choice import fastest
from puna.planner.hardware import device
from puna.planner.risk import risk
from puna.planner.wish import Wish

RESULTS = Path(__file__).parent / "results"
TABLE, END = "<!-- the table of benchmarks/published_hours.py -->", "<!-- its end -->"
BETWEEN = (0.9, 1.4)  # published over planned
LLAMA_1, LLAMA_2 = "arXiv 2302.13971, table 15", "arXiv 2307.09288, table 2"
CARD_3, CARD_31, CARD_32 = (f"model card of Llama {version}" for version in ("3", "3.1", "3.2"))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run. `alone`: its hours are one pretraining run's, as far as its source tells."""

    size: str
    tokens: float
    devices: int  # as its source says, or assumed to be those of its larger brothers
    device: str
    length: int  # tokens of a sequence
    hours: float
    source: str
    alone: bool = True


RUNS = [
    Run(size="llama-1-7b", tokens=1e12, devices=2048, device="A100", length=2048, hours=82_432, source=LLAMA_1),
    Run(size="llama-1-13b", tokens=1e12, devices=2048, device="A100", length=2048, hours=135_168, source=LLAMA_1),
    Run(size="llama-1-33b", tokens=1.4e12, devices=2048, device="A100", length=2048, hours=530_432, source=LLAMA_1),
    Run(size="llama-1-65b", tokens=1.4e12, devices=2048, device="A100", length=2048, hours=1_022_362, source=LLAMA_1),
    Run(size="llama-2-7b", tokens=2e12, devices=2000, device="A100", length=4096, hours=184_320, source=LLAMA_2),
    Run(size="llama-2-13b", tokens=2e12, devices=2000, device="A100", length=4096, hours=368_640, source=LLAMA_2),
    Run(size="llama-2-70b", tokens=2e12, devices=2000, device="A100", length=4096, hours=1_720_320, source=LLAMA_2),
    Run(size="llama-3.1-405b", tokens=15.6e12, devices=16_384, device="H100", length=8192, hours=30.84e6,
        source=CARD_31),
    Run(size="llama-3-8b", tokens=15e12, devices=2048, device="H100", length=8192, hours=1.3e6, source=CARD_3,
        alone=False),
    Run(size="llama-3-70b", tokens=15e12, devices=2048, device="H100", length=8192, hours=6.4e6, source=CARD_3,
        alone=False),
    Run(size="llama-3.1-8b", tokens=15e12, devices=2048, device="H100", length=8192, hours=1.46e6, source=CARD_31,
        alone=False),
    Run(size="llama-3.1-70b", tokens=15e12, devices=2048, device="H100", length=8192, hours=7.0e6, source=CARD_31,
        alone=False),
    Run(size="llama-3.2-1b", tokens=9e12, devices=512, device="H100", length=8192, hours=370e3, source=CARD_32,
        alone=False),
    Run(size="llama-3.2-3b", tokens=9e12, devices=512, device="H100", length=8192, hours=460e3, source=CARD_32,
        alone=False),
]  # fmt: skip


def compared(run: Run) -> dict[str, Any]:
    """A run beside the plan of our trainer for it."""
    config, on = SIZES[run.size], device(run.device)
    wish = Wish(devices=run.devices, device=on, tokens=run.tokens, size=config, sequence_length=run.length)
    best = fastest(config, wish).best
    trains = risk(run.devices, best.step.seconds, on).effective
    hours = run.devices * run.tokens / best.step.tokens_per_s / trains / 3600
    flops = run.tokens * config.train_flops_per_token(run.length)
    return {
        "size": run.size,
        "tokens": run.tokens,
        "devices": f"{run.devices:,} {run.device}",
        "source": run.source,
        "alone": run.alone,
        "published_hours": run.hours,
        "planned_hours": hours,
        "ratio": run.hours / hours,
        "published_mfu": flops / (3600 * run.hours) / on.peak["bf16"],
        "planned_mfu": best.step.mfu(),
        "layout": str(best),
    }


def good(row: dict[str, Any]) -> bool:
    return not row["alone"] or BETWEEN[0] <= row["ratio"] <= BETWEEN[1]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | of | published hours | planned | published / planned | MFU published | MFU planned, causal |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = f"{r['size']}, {r['tokens'] / 1e12:g}T tokens, {r['devices']}"
        name = f"**{name}**" if r["alone"] else name
        lines.append(
            f"| {name} | {r['source']} | {r['published_hours']:,.0f} | {r['planned_hours']:,.0f} | {r['ratio']:.2f} | "
            f"{r['published_mfu']:.0%} | {r['planned_mfu']:.0%} |"
        )
    ratios = [r["ratio"] for r in rows if r["alone"]]
    lines += [
        "",
        "In bold type are runs whose hours are one pretraining run's, as far as their sources tell: published are ",
    ]
    lines[-1] += f"{min(ratios):.2f} to {max(ratios):.2f} times the hours planned."
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"published-hours-{datetime.date.today()}.json")
    parser.add_argument("--docs", type=Path, default=None, help="a page whose table is replaced")
    options = parser.parse_args()
    rows = [compared(run) for run in RUNS]
    print(table(rows))
    options.out.write_text(json.dumps({"command": command(), "revision": revision(), "rows": rows}, indent=1) + "\n")
    if options.docs:
        before, rest = options.docs.read_text().split(TABLE)
        options.docs.write_text(f"{before}{TABLE}\n{table(rows)}\n{END}{rest.split(END, 1)[1]}")
    return 0 if all(good(row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
