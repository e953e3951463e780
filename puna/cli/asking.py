"""The verbs below `scale` that ask a law: ask, serve, downstream, mix."""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from puna.errors import ConfigError

Add = Callable[..., argparse.ArgumentParser]
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "gb": 1e9, "mb": 1e6, "t": 1e12, "tb": 1e12}


def amount_of(text: str) -> float:
    """`8B` as 8e9, `15T` as 15e12, `8GB` as 8e9. Raises `ConfigError` for what is no number above 0."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text.lower())
    if found and found[2] in _UNITS:
        try:
            value = float(found[1]) * _UNITS[found[2]]
        except ValueError:
            value = 0.0
        if 0 < value < math.inf:
            return value
    raise ConfigError(f"{text!r} is not a number above 0", hint="write 3.8e25, 8B, 15T or 24GB")


def sized(e: dict[str, float]) -> str:
    return f"{short(e['value'])} [{short(e['low'])}, {short(e['high'])}]"


def short(value: float) -> str:
    from puna.scaling.page import short

    return short(value)


def _law_of(text: str) -> Any:
    """A public law by name, or one's own by path."""
    from puna.scaling import public
    from puna.scaling.law import Law

    if text in public.LAWS:
        return public.law(text)
    if Path(text).exists():
        return Law.load(text)
    raise ConfigError(f"no law {text!r}", hint=f"a fit's folder, its law.json, or one of {', '.join(public.LAWS)}")


def _law_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--law", default="chinchilla", help="a fit's folder, or chinchilla or llama-3 (default: chinchilla)"
    )


def add_ask(verbs: Any, add_command: Add) -> None:
    sub = add_command(
        verbs, "ask", _ask, "The best size for some compute; or what a size trained on some tokens costs and gains.",
        """examples:
  puna scale ask --flops 3.8e25 --law llama-3
  puna scale ask --parameters 8B --tokens 15T --html page.html      over-training, on one page
  puna scale ask --law out/study/fit --flops 1e18""",
    )  # fmt: skip
    _law_option(sub)
    sub.add_argument("--flops", default="")
    sub.add_argument("--parameters", default="")
    sub.add_argument("--tokens", default="")
    sub.add_argument("--html", type=Path, default=None, metavar="FILE", help="with --parameters and --tokens: the page")
    sub.add_argument("--json", action="store_true")


def _ask(options: argparse.Namespace) -> int:
    law = _law_of(options.law)
    if options.flops and (options.parameters or options.tokens or options.html):
        raise ConfigError(
            "--flops asks for the best size, --parameters and --tokens for what a size costs (and --html shows that)",
            hint="ask one of them at a time",
        )
    if options.flops:
        return _ask_flops(law, amount_of(options.flops), options.json)
    if not options.parameters:
        raise ConfigError("nothing is asked", hint="give --flops, or --parameters (and --tokens)")
    parameters = amount_of(options.parameters)
    if not options.tokens:
        tokens = law.optimal_tokens(parameters)
        told = {"parameters": parameters, "optimal_tokens": tokens.to_json(), "law": law.name, "source": law.source}
        print(json.dumps(told, indent=1) if options.json else (
            f"compute-optimal tokens for {short(parameters)} parameters: {sized(tokens.to_json())} ({law.source})"))  # fmt: skip
        return 0
    return _ask_both(law, parameters, amount_of(options.tokens), options)


def _ask_flops(law: Any, flops: float, as_json: bool) -> int:
    o = law.optimum(flops)
    loss = o.loss.to_json() if o.loss else None
    if as_json:
        told = {"flops": flops, "parameters": o.parameters.to_json(), "tokens": o.tokens.to_json(), "loss": loss}
        print(json.dumps({**told, "law": law.name, "source": law.source, "warnings": o.warnings}, indent=1))
        return 0
    print(f"{flops:.3g} FLOPs: {sized(o.parameters.to_json())} parameters, {sized(o.tokens.to_json())} tokens")
    if loss:
        print(f"loss {loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}] nats per token")
    print(f"by {law.name}: {law.source}; N counts {law.counts}; 90% intervals")
    print("\n".join(f"warning: {w}" for w in o.warnings), end="\n" if o.warnings else "")
    return 0


def _ask_both(law: Any, parameters: float, tokens: float, options: argparse.Namespace) -> int:
    from puna.artifacts import write_atomic
    from puna.cli.paths import writable
    from puna.scaling.law import Law
    from puna.scaling.overtraining import compared
    from puna.scaling.page import overtraining_page, overtraining_rows

    writable("--html", options.html)
    if not isinstance(law, Law):
        raise ConfigError(f"the law {law.name!r} knows no losses", hint="ask it by --flops, or give another --law")
    found = compared(law, parameters, tokens)
    rows = overtraining_rows(found)
    if options.html:
        title = f"{short(parameters)} parameters on {short(tokens)} tokens"
        write_atomic(options.html, overtraining_page(law, found, title))
    if options.json:
        print(json.dumps({"law": law.name, "source": law.source, **dict(rows)}, indent=1))
        return 0
    print(f"by {law.name}: {law.source}; 90% intervals")
    for name, value in rows:
        print(f"  {name:<58}{value}")
    if options.html:
        print(f"page:    {options.html}")
    return 0


def add_serve(verbs: Any, add_command: Add) -> None:
    sub = add_command(
        verbs, "serve", _serve, "The size that is cheapest to train and to serve at a wanted quality.",
        """The quality is a loss by the law, or that of a model: --like 8B,15T.

examples:
  puna scale serve --like 8B,15T --read 1T --write 1T
  puna scale serve --loss 2.05 --write 2e12 --fits 8GB --batch 1
  puna scale serve --like 8B,15T --write 1T --quantised out/int4""",
    )  # fmt: skip
    _law_option(sub)
    quality = sub.add_mutually_exclusive_group(required=True)
    quality.add_argument("--loss", type=float, default=None, help="nats per token, by the law")
    quality.add_argument("--like", default="", metavar="PARAMETERS,TOKENS")
    sub.add_argument("--read", default="", metavar="TOKENS", help="prompts, over the model's life")
    sub.add_argument("--write", default="", metavar="TOKENS", help="answers, over the model's life")
    sub.add_argument("--fits", default="", metavar="SIZE", help="memory it must run in, e.g. 8GB")
    sub.add_argument("--batch", type=int, default=32, help="sequences written together")
    sub.add_argument("--context", type=int, default=2048, help="tokens of each in the cache")
    sub.add_argument(
        "--quantised", type=Path, nargs="+", default=(), help="quantised checkpoints: their measured loss is used"
    )
    sub.add_argument("--json", action="store_true")


def _serve(options: argparse.Namespace) -> int:
    from puna.scaling import serving
    from puna.scaling.law import Law

    law = _law_of(options.law)
    if not isinstance(law, Law):
        raise ConfigError(f"the law {law.name!r} knows no losses", hint="give another --law")
    loss = options.loss
    if options.like:
        given = options.like.split(",")
        if len(given) != 2:
            raise ConfigError(f"--like {options.like!r} is not PARAMETERS,TOKENS", hint="write --like 8B,15T")
        loss = law.loss(*(amount_of(x) for x in given)).value
    wish = serving.Wish(
        loss=loss,
        read_tokens=amount_of(options.read) if options.read else 0.0,
        written_tokens=amount_of(options.write) if options.write else 0.0,
        fits_bytes=amount_of(options.fits) if options.fits else 0.0,
        batch=options.batch, context=options.context,
    )  # fmt: skip
    found = serving.cheapest(law, wish, precisions=_precisions(options.quantised))
    print(json.dumps(_answer_json(found), indent=1) if options.json else "\n".join(_answer_lines(found, wish)))
    return 0


def _precisions(paths: Sequence[Path]) -> Sequence[Any]:
    from puna import artifacts
    from puna.scaling import serving

    if not paths:
        return serving.PRECISIONS
    made = [serving.measured(artifacts.load(p, "quantised").metrics, p.name) for p in paths]
    return [serving.PRECISIONS[0], *made]


def _answer_lines(found: Any, wish: Any) -> list[str]:
    best = found.best
    lines = [
        f"for a loss of {wish.loss:.4f}: {sized(found.parameters.to_json())} parameters on "
        f"{sized(found.tokens.to_json())} tokens, served in {best.precision.name}",
        f"{'':<8}{'parameters':>12}{'tokens':>10}{'training':>12}{'serving':>12}{'both':>12}{'memory':>10}   (device hours)",
    ]
    for c in sorted(found.by_precision, key=lambda c: c.cost):
        lines.append(
            f"{c.precision.name:<8}{short(c.parameters):>12}{short(c.tokens):>10}{c.train_cost:>12,.4g}{c.serve_cost:>12,.4g}"
            f"{c.cost:>12,.4g}{c.memory_bytes / 1e9:>7.1f} GB"
        )
    lines.append(f"{100 * found.saved:.0f}% less than the compute-optimal size for this loss, served in bf16")
    return lines + [f"warning: {w}" for w in found.warnings]


def _answer_json(found: Any) -> dict[str, Any]:
    def told(c: Any) -> dict[str, Any]:
        return {
            "precision": c.precision.name, "parameters": c.parameters, "tokens": c.tokens, "train_hours": c.train_cost,
            "serve_hours": c.serve_cost, "memory_bytes": c.memory_bytes,
        }  # fmt: skip

    return {
        "best": told(found.best), "parameters": found.parameters.to_json(), "tokens": found.tokens.to_json(),
        "saved": found.saved, "by_precision": [told(c) for c in found.by_precision], "warnings": found.warnings,
    }  # fmt: skip


def add_downstream(verbs: Any, add_command: Add) -> None:
    sub = add_command(
        verbs, "downstream", _downstream, "From compute to accuracy on a task, by the law that predicts hidden models better.",
        """A line of the CSV is flops,nll,accuracy: NLL of the correct answer per character; accuracy a share. Models with an
empty flops only help the second stage.

example:
  puna scale downstream arc.csv --flops 3.8e25 --chance 0.25""",
    )  # fmt: skip
    sub.add_argument("models", type=Path, help="a CSV file")
    sub.add_argument("--flops", nargs="+", required=True)
    sub.add_argument("--chance", type=float, default=0.25)
    sub.add_argument("--hidden", type=int, default=2, help="the largest models, hidden to compare the two laws")
    sub.add_argument("--json", action="store_true")


def _downstream(options: argparse.Namespace) -> int:
    from puna.scaling import downstream

    models = downstream.Scored.read(options.models, chance=options.chance)
    law, compared = downstream.fit_better(models, hidden=options.hidden)
    asked = [amount_of(f) for f in options.flops]
    if options.json:
        told = {f"{c:.4g}": {**law.at(c).to_json(), "warnings": law.warnings(c)} for c in asked}
        print(json.dumps({"law": law.name, "hidden": compared.errors, "accuracy": told}, indent=1))
        return 0
    for name, error in compared.errors.items():
        print(f"{name}: error {100 * error:.2f} points on the {compared.hidden} largest models, which it did not see")
    for c in asked:
        value = law.at(c)
        print(f"{c:.3g} FLOPs: accuracy {value.value:.3f} [{value.low:.3f}, {value.high:.3f}]  ({law.name})")
        print("\n".join(f"warning: {w}" for w in law.warnings(c)), end="\n" if law.warnings(c) else "")
    return 0


def add_mix(verbs: Any, add_command: Add) -> None:
    sub = add_command(
        verbs, "mix", _mix, "From small runs on mixtures of data to the weights to use.",
        """A line of the file: {"weights": {"web": 0.7, "code": 0.3}, "loss": 2.31}; loss may be {"TEXT": 2.31, ...}.

example:
  puna scale mix runs.jsonl --most 0.6""",
    )  # fmt: skip
    sub.add_argument("runs", type=Path, help="JSON lines")
    sub.add_argument("--most", type=float, default=1.0, help="share that one source may have")
    sub.add_argument("--json", action="store_true")


def _mix(options: argparse.Namespace) -> int:
    from puna.errors import DataError
    from puna.scaling import mixtures

    try:
        lines = [json.loads(line) for line in options.runs.read_text().splitlines() if line.strip()]
        runs = mixtures.Mixtures.of([x["weights"] for x in lines], [x["loss"] for x in lines])
    except OSError as error:
        raise DataError(f"{options.runs} cannot be read: {error}", hint="give a file of JSON lines") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = 'each line is {"weights": {"SOURCE": 0.5, ...}, "loss": 2.3}'
        raise DataError(f"{options.runs} is not a table of mixtures: {error!r}", hint=hint) from None
    law = mixtures.fit(runs)
    weights, loss = law.recommend(most=options.most)
    judged = {j.kind: {"error": j.error, "order": j.order} for j in law.judged}
    if options.json:
        print(json.dumps({"law": law.kind, "judged": judged, "weights": weights, "loss": loss.to_json()}, indent=1))
        return 0
    for kind, j in judged.items():
        mark = "  <- used" if kind == law.kind else ""
        print(f"{kind:<12}error {j['error']:.4f} nats on unseen runs, order {j['order']:.2f}{mark}")
    for source, weight in sorted(weights.items(), key=lambda w: -w[1]):
        print(f"  {source:<24}{weight:.3f}")
    print(
        f"predicted loss {loss.value:.4f} [{loss.low:.4f}, {loss.high:.4f}]; best run {(runs.loss @ law.importance).min():.4f}"
    )
    return 0
