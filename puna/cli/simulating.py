"""The verb that asks what faults will cost before there is a cluster: `simulate`."""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.errors import ConfigError, DataError

Add = Callable[..., argparse.ArgumentParser]
PRESETS = ("trainer", "llama3")
POLICIES = ("save", "spikes", "detect", "restart", "eviction", "straggler")
KNOB_SEEDS, SWEEP_SEEDS = 3, 6


def add(commands: Any, add_command: Add) -> None:
    """Add the verb to the command line."""
    sub = add_command(
        commands,
        "simulate",
        _simulate,
        "Simulate a training run on many GPUs for months: how much of the time trains, and what to change first.",
        """Failures come at the rates that Meta published for Llama 3: 419 in 54 days on 16,384 GPUs. What is not
published is assumed; the page says which assumptions matter. --settings prints all of them.

presets:
  trainer   the policies that puna's trainer has by default (default)
  llama3    what is published about Llama 3 405B's run, and a cautious guess at the rest

examples:
  puna simulate --gpus 16384 --days 54
  puna simulate --preset llama3 --sweep checkpoint restart --html run.html
  puna simulate --gpus 1024 --days 30 --step-s 4.1 --sweep spares=0,2,4,8 --quick
  puna simulate --gpus 100000 --days 120 save.every_steps=100 times.start_s=90 --json""",
    )
    sub.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="any setting of the scenario")
    sub.add_argument("--gpus", default=None, help="GPUs that train (default: 16,384)")
    sub.add_argument("--days", type=float, default=None, help="how long (default: 54)")
    sub.add_argument("--step-s", type=float, default=None, help="seconds of a step, undisturbed (default: 6.22)")
    sub.add_argument(
        "--spares", type=int, default=None, help="spare nodes (default: as many per node as at 16,384 GPUs)"
    )
    sub.add_argument("--preset", choices=PRESETS, default="trainer")
    sub.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="a scenario as JSON, instead of a preset"
    )
    sub.add_argument(
        "--policies", type=Path, default=None, metavar="FILE", help="take the policies from a recipe's JSON"
    )
    sub.add_argument("--failures", type=Path, default=None, metavar="FILE", help="your own table of failures, as JSON")
    sub.add_argument("--seeds", type=int, default=20, help="runs to simulate (default: 20)")
    sub.add_argument(
        "--sweep", nargs="+", default=(), metavar="NAME[=V,V…]",
        help="vary checkpoint, spares, detection or restart, at usual values or at yours",
    )  # fmt: skip
    sub.add_argument("--quick", action="store_true", help="do not try what to change first")
    sub.add_argument("--html", type=Path, default=None, metavar="FILE", help="the same as a page, with plots")
    sub.add_argument("--json", action="store_true", help="all numbers, to stdout")
    sub.add_argument("--print-settings", action="store_true", help="print the scenario, simulate nothing")


def _simulate(options: argparse.Namespace) -> int:
    from puna import config, log
    from puna.artifacts import write_atomic
    from puna.cli.paths import writable
    from puna.planner import reliability, reliability_page

    scenario = _scenario(options)
    if options.print_settings:
        print(json.dumps(config.to_json(scenario), indent=1))
        return 0
    if options.seeds < 1:
        raise ConfigError(f"--seeds {options.seeds} must be positive", hint="20 give an interval")
    writable("--html", options.html)
    sweeps = [_axis_and_values(text, scenario) for text in options.sweep]
    work = _Work(scenario)
    try:
        work.do(options.seeds, sweeps, knobs=not options.quick)
        interrupted = False
    except KeyboardInterrupt:
        if not work.runs:
            raise
        interrupted = True
    value = reliability.collect(work.study, turned=work.turned, sweeps=work.swept)
    if options.html is not None:
        write_atomic(options.html, reliability_page.page(value))
    print(json.dumps(value, indent=1) if options.json else reliability.text(value))
    if options.html is not None:
        log.info(f"{options.html}: the same as a page")
    if interrupted:
        log.warn("interrupted: this is what was simulated until then")
    return 130 if interrupted else 0


class _Work:
    """What was simulated so far, so that Ctrl-C loses nothing."""

    def __init__(self, scenario: Any):
        self.scenario = scenario
        self.runs: list = []
        self.turned: list = []
        self.swept: list = []

    @property
    def study(self) -> Any:
        from puna.planner.study import Study

        return Study(scenario=self.scenario, runs=tuple(self.runs))

    def do(self, seeds: int, sweeps: Sequence[tuple[str, Sequence[float]]], *, knobs: bool) -> None:
        """Simulate the scenario, then the sweeps, then each knob."""
        from puna import log
        from puna.planner.knobs import KNOBS, turned
        from puna.planner.simulator import simulate
        from puna.planner.study import AXES, Sweep, sweep

        few, fewer = range(min(SWEEP_SEEDS, seeds)), range(min(KNOB_SEEDS, seeds))
        total = seeds + sum(len(values) for _, values in sweeps) * len(few) + knobs * 2 * len(KNOBS) * len(fewer)
        with log.progress("simulating", total, unit="runs") as task:
            for seed in range(seeds):
                self.runs.append(simulate(self.scenario, seed))
                task.advance()
            for name, values in sweeps:
                self.swept.append(Sweep(name=name, unit=AXES[name].unit))
                for point in sweep(self.scenario, AXES[name], values, few):
                    self.swept[-1] = replace(self.swept[-1], points=(*self.swept[-1].points, point))
                    task.advance(len(few))
            for turn in turned(self.scenario, KNOBS, fewer) if knobs else ():
                self.turned.append(turn)
                task.advance(2 * len(fewer))


# --- from the command line to a scenario


def _scenario(options: argparse.Namespace) -> Any:
    from puna import config
    from puna.planner import scenario as scenarios
    from puna.planner.failures import read_table

    if options.config is not None:
        scenario = config.from_json(scenarios.Scenario, _json(options.config, "a scenario"))
    else:
        scenario = scenarios.llama3() if options.preset == "llama3" else scenarios.Scenario()
    if options.policies is not None:
        scenario = _with_policies(scenario, options.policies)
    if options.failures is not None:
        scenario = replace(scenario, failures=read_table(options.failures))
    if options.gpus is not None:
        scenario = scenarios.on(scenario, _whole(options.gpus, "--gpus"))
    given = {"days": options.days, "step_s": options.step_s, "spares": options.spares}
    scenario = replace(scenario, **{name: value for name, value in given.items() if value is not None})
    return config.override(scenario, options.settings)


def _whole(text: str, name: str) -> int:
    try:
        return int(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise ConfigError(f"{name} {text!r} is not a whole number", hint=f"write {name} 16384") from None


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not {what}: {error}", hint="give a JSON file") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is not {what}", hint="its outermost value must be an object: {...}")
    return found


def _with_policies(scenario: Any, path: Path) -> Any:
    """The policies of a recipe, from its `resilience` settings, or from a file that holds only those."""
    from puna import config

    found = _json(path, "a recipe")
    found = found.get("resilience", found)
    mine = {name: found[name] for name in POLICIES if isinstance(found, dict) and name in found}
    if not mine:
        raise ConfigError(
            f"{path} holds no policies", hint=f"known: {', '.join(POLICIES)}, alone or under 'resilience'"
        )
    kinds = {name: type(getattr(scenario, name)) for name in mine}
    return replace(scenario, **{name: config.from_json(kinds[name], value) for name, value in mine.items()})


def _axis_and_values(text: str, scenario: Any) -> tuple[str, Sequence[float]]:
    from puna.planner.study import AXES

    name, given, values = text.partition("=")
    if name not in AXES:
        raise ConfigError(f"there is no sweep {name!r}", hint=f"known: {', '.join(AXES)}")
    if not given:
        return name, AXES[name].values(scenario)
    found = tuple(_numbers(values.split(","), text))
    odd = [v for v in found if AXES[name].unit != "s" and v != int(v)]
    if odd:
        raise ConfigError(f"{text!r}: {odd[0]:g} {AXES[name].unit} is not a whole number", hint="write spares=0,4,16")
    return name, found


def _numbers(texts: Iterable[str], whole: str) -> Iterable[float]:
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ConfigError(f"{whole!r}: {text!r} is not a number of 0 or more", hint="write spares=0,4,16")
        yield value
