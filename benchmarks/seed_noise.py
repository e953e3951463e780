"""How far do equal runs of a scaling study lie apart, if only their seed differs? No law can predict one run closer than that.

    python benchmarks/seed_noise.py                      two sizes at the smallest budget of the last study, 8 seeds each
    python benchmarks/seed_noise.py --flops 1.92e12 --parameters 57856 --seeds 4

Each run is the study's own: text, tokenizer, rate, batch and steps by size, only with another seed for weights and samples.
Interrupted, the same command goes on where it was. The result is `benchmarks/results/seed-noise-DATE.json`.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import machine
import numpy as np

from puna.curation.curate import curate
from puna.recipes.scaling import Study, training
from puna.scaling.grid import run_at
from puna.tokenizer.shards import TokeniseConfig, tokenise
from puna.tokenizer.train import TokenizerConfig, train_tokenizer
from puna.train.loop import train

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = arguments()
    study = Study(flops=6e13, threads=options.threads)
    text = curate(study.curation, None, out=options.out / "01-text")
    words = TokenizerConfig(vocab_size=study.grid.vocab_size, digits=1)
    tokenizer = train_tokenizer(words, text, out=options.out / "02-tokenizer")
    tokens = tokenise(TokeniseConfig(), text, tokenizer, out=options.out / "03-tokens")
    rows = []
    for parameters in options.parameters:
        planned = run_at(study.grid, options.flops, parameters)
        losses = []
        for seed in range(options.seeds):
            settings = replace(training(replace(study, seed=seed), planned), save_every_steps=1_000_000)
            run = train(settings, tokens, tokenizer, None, out=options.out / "noise" / f"{planned.name}-seed{seed}")
            losses.append(run.metrics["val_loss"])
        mean, spread = float(np.mean(losses)), float(np.std(losses, ddof=1))
        rows.append({"run": planned.name, "parameters": parameters, "tokens": planned.tokens, "losses": losses,
                     "mean": mean, "deviation": spread / mean})  # fmt: skip
        print(f"{planned.name}: loss {mean:.4f}, standard deviation of a run {spread / mean:.2%} ({len(losses)} seeds)")
    if not options.no_result:
        path = RESULTS / f"seed-noise-{time.strftime('%Y-%m-%d')}.json"
        record = {
            "command": machine.command(),
            "revision": machine.revision(),
            "processor": machine.processor(),
            "runs": rows,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"result: {path}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", type=float, default=2.135e11, help="of each run")
    parser.add_argument("--parameters", type=int, nargs="+", default=[20_480, 44_032], help="in matrices")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/seed-noise"))
    parser.add_argument("--no-result", action="store_true", help="write nothing into benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
