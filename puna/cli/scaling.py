"""The verb `scale`: which size to train, for how long, on what mixture, and what to expect of it."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.cli.asking import add_ask, add_downstream, add_mix, add_serve, amount_of, sized

Add = Callable[..., argparse.ArgumentParser]


def add(commands: Any, add_command: Add) -> None:
    """Add the verb to the command line."""
    top = commands.add_parser(
        "scale",
        help="Which size to train, for how long, and what to expect: scaling laws, by one's own runs or published ones.",
        description="Scaling laws: plan and run a grid, fit it, and ask it.",
        epilog="Each has its own --help. Numbers may be written 8B, 15T, 3.8e25; sizes of memory 8GB.",
    )
    verbs = top.add_subparsers(title="what", metavar="WHAT", required=True)
    _add_plan(verbs, add_command)
    _add_run(verbs, add_command)
    _add_fit(verbs, add_command)
    add_ask(verbs, add_command)
    add_serve(verbs, add_command)
    add_downstream(verbs, add_command)
    add_mix(verbs, add_command)


def _grid_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--flops", default="", help="of all runs together (default: what --minutes allow)")
    sub.add_argument("--budgets", type=int, default=4)
    sub.add_argument("--sizes", type=int, default=5, help="at each budget")
    sub.add_argument("--factor", type=float, default=3.0, help="from one budget to the next")
    sub.add_argument(
        "--vocab", type=int, default=512, help="ids of the tokenizer that is learnt for the study; 512: bytes"
    )
    sub.add_argument("--sequence", type=int, default=128, metavar="TOKENS", help="length of the training sequences")
    sub.add_argument("--no-prediction", action="store_true", help="no larger run that the fit must predict")


def _study(options: argparse.Namespace, **more: Any) -> Any:
    from puna.recipes.scaling import Study
    from puna.scaling.grid import GridConfig

    grid = GridConfig(
        budgets=options.budgets, sizes=options.sizes, factor=options.factor, vocab_size=options.vocab,
        sequence_length=options.sequence, beyond=0.0 if options.no_prediction else 3.0,
    )  # fmt: skip
    return Study(grid=grid, flops=amount_of(options.flops) if options.flops else 0.0, **more)


def _add_plan(verbs: Any, add_command: Add) -> None:
    sub = add_command(
        verbs, "plan", _plan, "Print the grid of runs for an amount of compute, and run nothing.",
        "example:\n  puna scale plan --flops 3e14 --budgets 4 --sizes 5",
    )  # fmt: skip
    _grid_options(sub)
    sub.add_argument("--minutes", type=float, default=120.0, help="used where --flops is not given: speed is measured")
    sub.add_argument("--threads", type=int, default=0)
    sub.add_argument("--json", action="store_true")


def _plan(options: argparse.Namespace) -> int:
    from puna.recipes.scaling import measured_speed, planned_runs
    from puna.scaling.family import recipe_for
    from puna.scaling.grid import cost, sizes_of

    study = _study(options, threads=options.threads)
    if not study.flops:
        study = replace(study, flops=0.85 * 60 * options.minutes * measured_speed(study))
    runs = planned_runs(study)
    kind = study.optimizer.kind
    recipes = [recipe_for(r.model, r.tokens, study.grid.sequence_length, optimizer=kind) for r in runs]
    if options.json:
        rows = [
            {"name": r.name, "flops": r.flops, "parameters": sizes_of(r), "tokens": r.tokens, "predicted": r.predicted,
             "learning_rate": q.learning_rate, "batch_tokens": q.batch_tokens, "steps": q.steps}
            for r, q in zip(runs, recipes)
        ]  # fmt: skip
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{len(runs)} runs, {cost(runs):.3g} FLOPs; sizes of later budgets follow the minima of earlier ones")
    print(f"{'budget':>10}{'width':>7}{'layers':>7}{'in matrices':>13}{'all':>11}{'tokens':>11}{'per N':>7}{'rate':>9}{'batch':>8}{'steps':>7}")  # fmt: skip
    for r, q in zip(runs, recipes):
        n = sizes_of(r)
        print(
            f"{r.budget:>10.3g}{r.model.dim:>7}{r.model.n_layers:>7}{n['matrices']:>13,}{n['all']:>11,}{r.tokens:>11.3g}"
            f"{r.tokens / n['matrices']:>7.1f}{q.learning_rate:>9.2g}{q.batch_tokens:>8,}{q.steps:>7,}"
            + ("  predicted" if r.predicted else "")
        )
    return 0


def _add_run(verbs: Any, add_command: Add) -> None:
    sub = add_command(
        verbs, "run", _run, "Make the runs of a grid, within a time, and fit them. The same command goes on.",
        """examples:
  puna scale run out/study --minutes 120             the embedded corpus, what this machine can do in two hours
  puna scale run out/study --data ~/texts --minutes 30 --budgets 3

When the time is up, what is there is fitted; the same command with more --minutes continues.""",
    )  # fmt: skip
    sub.add_argument("out", type=Path)
    sub.add_argument("--minutes", type=float, default=120.0, help="after which no further run is begun")
    sub.add_argument(
        "--data", type=Path, default=None, help="your own text (default: what every machine with Python has)"
    )
    _grid_options(sub)
    sub.add_argument("--threads", type=int, default=0)
    sub.add_argument("--seed", type=int, default=0)


def _run(options: argparse.Namespace) -> int:
    from puna.recipes import scaling

    study = _study(options, data=options.data, threads=options.threads, seed=options.seed)
    fit = scaling.run(study, options.minutes, options.out)
    if fit is None:
        return 0
    print("\n".join(_fit_lines(json.loads(fit.file("fit.json").read_text()))))
    print(f"report:  {fit.path / 'report.html'}")
    print(f"ask:     puna scale ask --law {fit.path} --flops 1e18")
    return 0


def _add_fit(verbs: Any, add_command: Add) -> None:
    sub = add_command(
        verbs, "fit", _fit, "Fit runs of your own, from a CSV, by all three ways.",
        """The first line names the columns: parameters,tokens,loss and, if known, flops,budgets.

example:
  puna scale fit runs.csv out/fit --counts all --target 3.8e25""",
    )  # fmt: skip
    sub.add_argument("runs", type=Path, help="a CSV file")
    sub.add_argument("out", type=Path)
    sub.add_argument("--counts", choices=("all", "matrices", "body"), default="all", help=(
        "what `parameters` counts: all weights; those in matrices (the output head, not the input embedding); or neither"
    ))  # fmt: skip
    sub.add_argument(
        "--target", nargs="+", default=[], metavar="FLOPS", help="compute for which the best size is wanted"
    )
    sub.add_argument(
        "--predict-above", default="", metavar="FLOPS", help="budgets from here on are predicted, not fitted"
    )
    sub.add_argument("--draws", type=int, default=400, help="resampled fits, for the intervals")
    sub.add_argument("--json", action="store_true", help="all numbers, to stdout")


def _fit(options: argparse.Namespace) -> int:
    from puna.scaling.stage import FitConfig, fit_scaling

    above = amount_of(options.predict_above) if options.predict_above else 0.0
    targets = tuple(amount_of(t) for t in options.target)
    settings = FitConfig(
        name=options.runs.stem, counts=options.counts, targets=targets, predict_above=above, draws=options.draws
    )
    fit = fit_scaling(settings, options.runs, out=options.out)
    found = json.loads(fit.file("fit.json").read_text())
    print(json.dumps(found, indent=1) if options.json else "\n".join(_fit_lines(found)))
    if not options.json:
        print(f"report:  {fit.path / 'report.html'}")
    return 0


def _fit_lines(found: dict[str, Any]) -> list[str]:
    law = found["law"]
    lines = [
        f"{found['runs']['fitted']} runs; N counts {found['counts']}; intervals are 90%",
        f"L(N, D) = {law['e']:.4g} + {law['a']:.4g} / N^{law['alpha']:.4f} + {law['b']:.4g} / D^{law['beta']:.4f}",
    ]
    for method, e in found["exponents"].items():
        lines.append(f"N* ~ C^a   {method:<11} a = {e['value']:.4f}  [{e['low']:.4f}, {e['high']:.4f}]")
    for flops, answers in found["optima"].items():
        for method, o in answers.items():
            lines.append(
                f"{flops} FLOPs  {method:<11} {sized(o['parameters'])} parameters, {sized(o['tokens'])} tokens"
            )
    for e in found["errors"]["predicted"]:
        lines.append(
            f"predicted without it: {e['parameters']:.3g} parameters, {e['tokens']:.3g} tokens: loss {e['loss']:.4f}, "
            f"by the law {e['predicted']['value']:.4f} ({100 * e['error']:+.2f}%)"
        )
    left = [abs(e["error"]) for e in found["errors"]["by_size"]]
    if left:
        lines.append(
            f"each size left out in turn: error {100 * sum(left) / len(left):.2f}% on average, {100 * max(left):.2f}% at most"
        )
    return lines + [f"warning: {w}" for w in found["warnings"]]
