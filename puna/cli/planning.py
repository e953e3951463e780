"""The verb `plan`: what size, how long, on which machine. Here the planner and the scaling laws are joined."""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.config import require
from puna.errors import ConfigError

if TYPE_CHECKING:
    from puna.model.sizes import LlamaConfig
    from puna.planner.plan import Plan
    from puna.planner.wish import Wish

Add = Callable[..., argparse.ArgumentParser]
VOCABULARY = 128_256  # of Llama 3's tokenizer


def add(commands: Any, add_command: Add) -> None:
    """Add the verb to the command line."""
    sub = add_command(
        commands,
        "plan",
        _plan,
        "What size, how many tokens, which layout, how long, how much: before there is a run.",
        """examples:
  puna plan --gpus 64xH100 --days 14
  puna plan --gpus 64xH100 --days 14 --serve-tokens 2e12 --fits 24GB --price 2.5
  puna plan 8b --tokens 15e12 --gpus 2048xH100           what that costs, and what it buys
  puna plan 70b --gpus 256xH100 --days 30 --explain      with the formula and the source of every figure
  puna plan --gpus 64xH100 --days 14 --html plan.html --recipe run.json

A wish that is impossible is answered with the nearest possible one. Machines: H100, H200, A100, B200, CPU, and those of
--hardware FILE (TOML or JSON; puna/planner/hardware.toml shows the fields). --calibrate measures the machine at hand.""",
    )
    sub.add_argument("size", nargs="?", default=None, help="8b, 70b, llama-3.1-405b, 1.3e9 ...; left out: it is chosen")
    sub.add_argument("--gpus", default=None, metavar="COUNTxNAME", help="64xH100; default 1xCPU")
    sub.add_argument("--days", default=None, help="the devices are yours for")
    sub.add_argument("--tokens", default=None, help="to train on: 15e12, 300B")
    sub.add_argument("--serve-tokens", default="0", metavar="TOKENS", help="to be generated in the model's life")
    sub.add_argument("--fits", default=None, metavar="SIZE", help="24GB: the device that must hold the served model")
    sub.add_argument(
        "--bits", type=int, choices=(4, 8, 16), default=None, help="of the served weights; default: the most that fit"
    )
    sub.add_argument("--context", default="8192", help="tokens of a served sequence")
    sub.add_argument("--sequence-length", default="8192", help="tokens, in training")
    sub.add_argument("--precision", choices=("bf16", "fp8", "fp32"), default="bf16", help="of the products")
    sub.add_argument(
        "--software",
        choices=("puna", "tuned"),
        default="puna",
        help="whose trainer: `puna pretrain`, or one with all fused",
    )
    sub.add_argument(
        "--vocabulary", type=int, default=VOCABULARY, help="words of the tokenizer, where a size is chosen"
    )
    sub.add_argument("--price", default=None, help="of a device-hour, in any currency")
    sub.add_argument("--start", default=None, metavar="DATE", help="2027-01-31: then the end is a date as well")
    sub.add_argument("--tolerance", default="0.01", help="share of the loss given up for cheaper serving")
    sub.add_argument("--law", default="chinchilla", help="a public law's name, or what `puna scale` wrote")
    sub.add_argument("--hardware", type=Path, default=None, metavar="FILE", help="machines of your own")
    sub.add_argument(
        "--calibrate", type=Path, default=None, metavar="FILE", help="measure this machine into FILE, then stop"
    )
    sub.add_argument("--explain", action="store_true", help="formula and source of every figure")
    sub.add_argument("--json", action="store_true", help="all figures, to stdout")
    sub.add_argument("--html", type=Path, default=None, metavar="FILE", help="the same as a page with plots")
    sub.add_argument(
        "--recipe", type=Path, default=None, metavar="FILE", help="write the settings that `puna pretrain` takes"
    )


class LawForesight:
    """`planner.wish.Foresight`, answered by a scaling law and the family's rules."""

    def __init__(self, law: Any, vocabulary: int = VOCABULARY):
        from puna.scaling import public
        from puna.scaling.family import counted

        self.law, self.vocabulary = law, vocabulary
        self.name, self.source = law.name, law.source
        self.formula = f"{law.e:g} + {law.a:g} / N^{law.alpha:g} + {law.b:g} / D^{law.beta:g}, N: {law.counts} weights"
        self._count = lambda config: getattr(counted(config), law.counts)
        self._accuracy = public.mmlu() if law.name == "chinchilla" else None
        self.benchmark = self._accuracy.name if self._accuracy else ""
        self.accuracy_source = self._accuracy.source if self._accuracy else ""
        self._shapes: dict[tuple[float, int], LlamaConfig] = {}

    def loss(self, config: "LlamaConfig", tokens: float) -> tuple[float, float, float]:
        return tuple(self.law.loss(self._count(config), tokens))

    def accuracy(self, loss: tuple[float, float, float]) -> tuple[float, float, float]:
        from puna.scaling.law import Estimate

        return tuple(self._accuracy.at(Estimate(*loss)))

    def optimal_tokens(self, config: "LlamaConfig") -> float:
        return self.law.optimal_tokens(self._count(config)).value

    def optimal_parameters(self, flops: float) -> float:
        return self.law.optimum(flops).parameters.value

    def learning_rate(self, config: "LlamaConfig", tokens: float) -> float:
        from puna.scaling.family import recipe_for

        return float(f"{recipe_for(config, tokens, config.context).learning_rate:.3g}")

    def shape(self, parameters: float, context: int) -> "LlamaConfig":
        from puna.scaling.family import of_size

        key = (float(f"{parameters:.3g}"), context)
        if key not in self._shapes:
            self._shapes[key] = of_size(key[0], vocab_size=self.vocabulary, context=context)
        return self._shapes[key]


def _plan(options: argparse.Namespace) -> int:
    from puna.cli.paths import writable

    for option, path in (("--calibrate", options.calibrate), ("--html", options.html), ("--recipe", options.recipe)):
        writable(option, path)
    if options.calibrate is not None:
        return _calibrate(options.calibrate)
    from puna.planner import sheet
    from puna.planner.plan import plan

    if not 256 <= options.vocabulary <= 1 << 24:
        raise ConfigError(f"--vocabulary {options.vocabulary} is not a tokenizer's", hint="give 256 to 16,777,216")
    wish, foresight = _wish(options), _foresight(options.law, options.vocabulary)
    made = plan(wish, foresight)
    found = sheet.sections(made, foresight)
    _write(options, made, found, foresight)
    if options.json:
        print(json.dumps(sheet.to_json(made, found), indent=1))
    else:
        print(sheet.text(found, explain=options.explain))
    return 0


def _wish(options: argparse.Namespace) -> "Wish":
    from puna.planner.hardware import cluster
    from puna.planner.serving import BITS
    from puna.planner.wish import Wish

    count, device = cluster(options.gpus or "1xCPU", options.hardware)
    length = _whole("--sequence-length", options.sequence_length)
    size, parameters = _size(options.size, length, options.vocabulary)
    return Wish(
        devices=count,
        device=device,
        days=_number("--days", options.days),
        tokens=_number("--tokens", options.tokens),
        size=size,
        parameters=parameters,
        serve_tokens=_number("--serve-tokens", options.serve_tokens),
        fits_bytes=_bytes(options.fits),
        bits=(options.bits,) if options.bits else BITS,
        serve_context=_whole("--context", options.context),
        sequence_length=length,
        precision=options.precision,
        software=options.software,
        start=_date(options.start),
        price=_number("--price", options.price),
        tolerance=_number("--tolerance", options.tolerance),
    )


def _foresight(name: str, vocabulary: int) -> LawForesight:
    from puna.scaling import public
    from puna.scaling.law import Law

    if name not in public.LAWS and not Path(name).exists():
        hint = f"give what `puna scale fit` wrote, or one of {', '.join(public.LAWS)}"
        raise ConfigError(f"no law {name!r}", hint=hint)
    law = public.law(name) if name in public.LAWS else Law.load(name)
    if not isinstance(law, Law):
        hint = "take chinchilla, or a law that `puna scale` fitted"
        raise ConfigError(f"the law {name!r} says what is optimal, but no losses", hint=hint)
    return LawForesight(law, vocabulary)


def _date(text: str | None) -> Any:
    import datetime

    try:
        return datetime.date.fromisoformat(text) if text is not None else None
    except ValueError:
        raise ConfigError(f"--start {text!r} is not a date", hint="write 2027-01-31") from None


_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def _number(option: str, text: str | None) -> float | None:
    """15e12, 300B, 2.5T, 14."""
    if text is None:
        return None
    # A comma is between thousands: 2,50 would be 250 if all were dropped.
    digits = r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|[\d_.]+"
    match = re.fullmatch(rf"([+-]?(?:{digits})(?:[eE][+-]?\d+)?)([kKmMbBgGtT]?)", text.strip())
    try:
        value = (
            float(match[1].replace(",", "").replace("_", "")) * _UNITS.get(match[2].lower(), 1) if match else math.nan
        )
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{option} {text!r} is not a number", hint="write 14, 2.5, 1.5e12, 300B or 2T")
    return value


def _whole(option: str, text: str) -> int:
    """A number of tokens in a row."""
    value = _number(option, text)
    if value != int(value):
        raise ConfigError(f"{option} {text!r} is not a whole number", hint=f"write {option} 8192")
    return int(value)


def _bytes(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"([\d.]+)\s*([kKmMgGtT]?)(i?)[bB]?", text.strip())
    try:
        base = 1024.0 if match and match[3] else 1000.0
        value = float(match[1]) * base ** " kmgt".index(match[2].lower() or " ") if match else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--fits {text!r} is not a size", hint="write 24GB, 512MB or 16GiB")
    return value


def _size(text: str | None, context: int, vocabulary: int) -> "tuple[LlamaConfig | None, float | None]":
    """A size of the table by its name or ending; or the Llama nearest to so many parameters, and how many were asked for."""
    if text is None:
        return None, None
    from puna.model.sizes import SIZES

    name = text.lower()
    for wanted in (name, f"llama-3.1-{name}", f"llama-3.2-{name}", f"llama-2-{name}", f"llama-1-{name}"):
        if wanted in SIZES:
            return SIZES[wanted], None
    try:
        parameters = _number("size", text)
    except ConfigError:
        hint = f"a number of parameters (1.3B), or one of {', '.join(SIZES)}"
        raise ConfigError(f"no size is called {text!r}", hint=hint) from None
    if not 1e5 <= parameters <= 1e14:
        raise ConfigError(f"a Llama of {parameters:g} parameters is not planned", hint="give 1e5 to 1e14")
    from puna.scaling.family import of_size

    require(context > 0, f"--sequence-length {context} must be above 0")
    # Sizes are made by the weights in their matrices; who says 1.3B means all weights, the input embedding among them.
    tried = (of_size(parameters * 0.96**i, vocab_size=vocabulary, context=context) for i in range(24))
    return min(tried, key=lambda config: abs(math.log(config.parameters / parameters))), parameters


def _write(options: argparse.Namespace, made: "Plan", found: list, foresight: LawForesight) -> None:
    from puna import log
    from puna.artifacts import write_atomic

    if options.html:
        from puna.planner.drawn import page

        write_atomic(options.html, page(made, found, foresight))
        log.info(f"{options.html}: the plan as a page")
    if options.recipe:
        from puna.planner.recipe import recipe

        write_atomic(options.recipe, json.dumps(recipe(made, foresight), indent=1) + "\n")
        log.info(f"{options.recipe}: settings for `puna pretrain {options.recipe}`")


def _calibrate(path: Path) -> int:
    from puna.planner.calibrate import measure, save
    from puna.planner.hardware import devices

    if path.exists():
        devices(path)  # a file that is not one is refused before anything is measured
    save(measure(), path)
    found = devices(path)["here"]
    speeds = ", ".join(f"{precision} {speed / 1e12:.3g}" for precision, speed in found.matmul.items())
    print(f"{path}: this machine as `here`: products {speeds} TFLOP/s, reading {found.read / 1e9:.3g} GB/s")
    print(f"plan with it: puna plan --gpus 1xhere --hardware {path} --days 1")
    return 0
