"""Mixture laws on measured mixtures: small runs on mixtures of real text, some of them hidden and predicted.

    python benchmarks/mixtures.py --minutes 40 --threads 2            sources of the embedded corpus
    python benchmarks/mixtures.py --minutes 5 --runs 12 --steps 60    to see it work

Each run trains the same model for the same steps on another mixture (`curation.mix`) and measures its loss on held-out text
of all sources, the same for every run. The law is chosen and fitted on three quarters of the runs and predicts the others. It
passes if it orders them (Spearman above 0.7) and errs by less than the spread of their losses. Interrupted, the same
command goes on. The result is written to `benchmarks/results/mixtures-DATE.json`.
"""

import argparse
import json
import time
from pathlib import Path

import machine
import numpy as np
from scipy.stats import spearmanr

from puna import artifacts
from puna.curation.curate import CurationConfig, curate
from puna.curation.mix import MixConfig, mix
from puna.recipes.scaling import Study, training
from puna.scaling.grid import GridConfig, run_at
from puna.scaling.mixtures import Mixtures, fit, spread_mixtures
from puna.tokenizer.shards import TokeniseConfig, tokenise
from puna.tokenizer.train import TokenizerConfig, train_tokenizer
from puna.train.loop import train

SOURCES = ("documentation", "python-docstrings", "python-packages", "python-stdlib", "python-tests")
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = arguments()
    ends = time.monotonic() + 60 * options.minutes
    out = options.out
    settings = CurationConfig(heldout_share=0.06, embedded_bytes=options.bytes)
    text = curate(settings, None, out=out / "01-text")
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=512, digits=1), text, out=out / "02-tokenizer")
    study = Study(grid=GridConfig(), threads=options.threads, validation_rows=512)
    planned = run_at(study.grid, 1e12, 8e4)
    config = training(study, planned)
    per_step = config.lm.rows * config.lm.sequence_length
    config = training(study, run_at(study.grid, planned.flops * options.steps * per_step / planned.tokens, 8e4))
    runs, losses = [], []
    for number, weights in enumerate(spread_mixtures(SOURCES, options.runs, least=0.02)):
        folder = out / f"run-{number:02d}"
        if time.monotonic() > ends and not (folder / "model" / artifacts.MANIFEST).is_file():
            print(f"time is up before run {number}: the same command with more --minutes goes on")
            break
        mixed = mix(MixConfig(weights=weights, max_bytes=options.bytes // 4), [text], out=folder / "text")
        tokens = tokenise(TokeniseConfig(), mixed, tokenizer, out=folder / "tokens")
        model = train(config, tokens, tokenizer, None, out=folder / "model")
        # What was trained on, not what was asked: a source may have too little text.
        runs.append({s: mixed.metrics["groups"][s]["share"] for s in SOURCES})
        losses.append(model.metrics["val_loss"])
        print(f"run {number}: loss {losses[-1]:.4f}", flush=True)
    if len(runs) < 11:
        print(f"{len(runs)} runs are too few to hide some and fit the rest (11 at least)")
        return 0
    return judged(options, Mixtures.of(runs, losses), config)


def judged(options: argparse.Namespace, runs: Mixtures, config: object) -> int:
    """Fit without every fourth run, predict those, and keep the numbers."""
    from puna import config as values

    hidden = np.arange(len(runs.loss)) % 4 == 3
    law = fit(runs.where(~hidden))
    told = np.array([law.loss(dict(zip(runs.sources, row))).value for row in runs.weights[hidden]])
    measured = runs.loss[hidden, 0]
    error = float(np.sqrt(np.mean((told - measured) ** 2)))
    order = float(spearmanr(told, measured).statistic)
    weights, expected = law.recommend()
    record = {
        "command": machine.command(),
        "revision": machine.revision(),
        "processor": machine.processor(),
        "training": values.to_json(config),
        "runs": [
            {"weights": dict(zip(runs.sources, w.tolist())), "loss": float(y[0])}
            for w, y in zip(runs.weights, runs.loss)
        ],
        "kind": law.kind,
        "judged": {j.kind: {"error": j.error, "order": j.order} for j in law.judged},
        "hidden": {"runs": int(hidden.sum()), "error": error, "order": order, "spread": float(np.std(measured))},
        "recommended": {"weights": weights, "loss": expected.to_json()},
    }
    print(json.dumps({k: record[k] for k in ("kind", "judged", "hidden", "recommended")}, indent=1))
    if not options.no_result:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"mixtures-{time.strftime('%Y-%m-%d')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"result: {path}")
    good = order > 0.7 and error < np.std(measured)
    print("the hidden runs are predicted" if good else "the hidden runs are NOT predicted")
    return 0 if good else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--bytes", type=int, default=24_000_000, help="of the embedded corpus")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/mixtures"))
    parser.add_argument("--no-result", action="store_true", help="write nothing into benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
