"""Quantise a checkpoint: weights only, group by group, matrix by matrix.

The result is a model folder like the checkpoint's, with Hugging Face's names, in which each matrix is one tensor,
`….laid`, that the C++ kernels read where it lies (`layout.py`), or, where that would waste room, two: `….codes` and
`….scales` (and `….offsets`, if it has any) in Hugging Face's row order. config.json says how under `puna_quantisation`. Norms stay as they are. The embedding and the output matrix have bits of their own: they are what small models are most
sensitive to, and in large ones a small part of the whole.

    forms      every matrix's form: a uniform one, or chosen under a budget     forms.py, sensitivity.py, budget.py
    rounding   to the nearest code, or calibrated on text                       groups.py, gptq.py, calibrate.py
    loss       against the original, on held-out text                           quality.py

Each matrix's result is kept until the end, so that an interrupted run goes on where it was, and no more than a layer is
in memory, whatever format the weights come from.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from puna import log
from puna.artifacts import WORK, Artifact, stage, write_atomic
from puna.config import to_json
from puna.errors import ArtifactError, ConfigError, DataError
from puna.model.conversion import tokenizer_of, write_folder_of
from puna.model.convert import hf_name
from puna.model.folder import CONFIG, QUANTISED, WEIGHTS
from puna.model.opening import open_checkpoint
from puna.model.sizes import LlamaConfig
from puna.quant import sensitivity
from puna.quant.budget import CHOICES, Choice, Option, choose, smallest
from puna.quant.calibrate import calibrate
from puna.quant.forms import UNQUANTISED, Form, QuantConfig, parse_budget
from puna.quant.layers import Stored
from puna.quant.layout import stored_bytes
from puna.quant.parts import Written, assemble, weights_file_bytes, write_nearest
from puna.quant.quality import measure
from puna.quant.sample import ROW, Text, rows_of, texts_of
from puna.tokenizer.load import AnyTokenizer

__all__ = ["UNQUANTISED", "QuantConfig", "quantise"]

_PLAN = "plan.json"  # in the work folder: what was chosen under a budget


@stage("quantised")
def quantise(
    config: QuantConfig, checkpoint: Artifact | Path, calibration: Text = None, heldout: Text = None, *, out: Path
) -> dict[str, Any]:
    """Write the quantised form of `checkpoint`, of any format that `model.opening` knows, into `out`.

    `calibration` is the text for calibration and for sensitivities, `heldout` that on which the loss is measured; see
    `sample.py` for what they may be. Metrics: `parameters`, `bytes` of the weights and `checkpoint_bytes` of those they
    were made from, `bits_per_weight` over everything, `relative_error` of each matrix (rms(w - w') / rms(w)), its `forms`
    where they differ, how it was `rounded`, `quality` (see `quality.py`; None without a tokenizer) and, under a budget,
    `plan`. Raises `ArtifactError` for a damaged checkpoint, `DataError` for weights that are not finite or text that is
    needed and missing, `ConfigError` for a budget that is too small.
    """
    source = checkpoint.path if isinstance(checkpoint, Artifact) else Path(checkpoint)
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(source) as opened:
        shape, weights = opened.config, opened.weights
        if len(weights.names) < shape.n_layers:
            found = f"{source} has {len(weights.names):,} tensors and claims {shape.n_layers:,} layers"
            raise ArtifactError(found, hint="is its configuration another model's?")
        shapes = {hf_name(name): size for name, size in shape.shapes().items()}
        weights.expect(shapes)
        reader, tokenizer = Stored(weights, shape), tokenizer_of(source)
        write_folder_of(source, shape, out, torch.bfloat16, {QUANTISED: to_json(config)})
        used = measured = None
        if config.calibrate:
            texts = texts_of(calibration, "calibration")
            used = rows_of(texts, _needed(tokenizer, source), config.calibration_tokens, _row(shape))
        if config.quality_tokens and tokenizer is None:
            log.warn(f"{source} has no tokenizer: what quantisation costs is not measured")
        elif config.quality_tokens:
            measured = rows_of(texts_of(heldout, "heldout"), tokenizer, config.quality_tokens, _row(shape))
        plan: dict[str, Any] = {}
        if config.budget:
            config, plan = _planned(config, shape, reader, _needed(tokenizer, source), calibration, out)
        forms = {hf_name(name): config.form_of(name) for name in shape.shapes()}
        _each_nearest(weights, forms, [n for n in forms if n not in _calibrated_names(config, shape)], work)
        if used is not None:
            calibrate(shape, weights, reader, forms, used, work)
        quality = None
        if measured is not None:
            quality = measure(shape, reader, Written(work, shape, forms, reader), measured, tokenizer.vocab_size)
        checkpoint_bytes = sum(weights.bytes(name) for name in shapes)
    errors, ways, size = assemble(work, shape, forms, out / WEIGHTS)
    return {
        "parameters": shape.parameters,
        "bytes": size,
        "checkpoint_bytes": checkpoint_bytes,
        "bits_per_weight": 8 * size / shape.parameters,
        "relative_error": errors,
        "rounded": {way: list(ways.values()).count(way) for way in sorted(set(ways.values()))},
        "quality": quality,
        **plan,
    }


def _each_nearest(weights: Any, forms: dict[str, Form], names: list[str], work: Path) -> None:
    for name in log.track(sorted(names), "quantise", unit="matrices"):
        if not (work / name).exists():
            write_nearest(weights, name, forms[name], work / name)


def _calibrated_names(config: QuantConfig, shape: LlamaConfig) -> set[str]:
    """What `calibrate` writes: the layers' matrices, and an output matrix that is not the embedding."""
    if not config.calibrate:
        return set()
    names = {n for n, size in shape.shapes().items() if len(size) == 2 and n.startswith("layers.")}
    if not shape.tied and config.bits_of("output.weight") != UNQUANTISED:
        names.add("output.weight")
    return {hf_name(name) for name in names}


def _row(shape: LlamaConfig) -> int:
    return min(ROW, shape.context)


def _needed(tokenizer: AnyTokenizer | None, source: Path) -> AnyTokenizer:
    if tokenizer is None:
        hint = "put its tokenizer.model beside the weights, or quantise without calibration and budget"
        raise DataError(f"{source} has no tokenizer, so no text can be read", hint=hint)
    return tokenizer


def _planned(
    config: QuantConfig, shape: LlamaConfig, reader: Stored, tokenizer: AnyTokenizer, text: Text, out: Path
) -> tuple[QuantConfig, dict[str, Any]]:
    """The configuration with a form for each matrix, and what was chosen, for the metrics. Made once, then remembered."""
    file = out / WORK / _PLAN
    if not file.is_file():
        sizes = shape.shapes()
        _room(
            config,
            shape,
            {n: [Option(f, stored_bytes(s, f), 0.0) for f in CHOICES] for n, s in sizes.items() if len(s) == 2},
            out,
        )
        tokens = rows_of(
            texts_of(text, "calibration"), tokenizer, config.sensitivity_tokens, min(sensitivity.ROW, shape.context)
        )
        damages = sensitivity.measure_damages(shape, reader, tokens, CHOICES)
        options = {
            n: [Option(f, stored_bytes(sizes[n], f), d) for f, d in found.items()] for n, found in damages.items()
        }
        write_atomic(file, json.dumps(_fit(config, shape, options, out)))
    plan = json.loads(file.read_text())
    config = config.with_forms({name: Form.parse(row["form"]) for name, row in plan["forms"].items()})
    _write_forms(out, config)
    return config, plan


def _room(config: QuantConfig, shape: LlamaConfig, options: dict[str, list[Option]], out: Path) -> tuple[int, int]:
    """The budget in bytes, and what of it is there for the matrices. Raises `ConfigError` if that is too little."""
    value, unit = parse_budget(config.budget)
    budget = int(value * shape.parameters / 8 if unit == "bpw" else value)
    forms = {name: min(found, key=lambda o: o.bytes).form for name, found in options.items()}
    room = budget - _around(config, shape, forms, unit, out)
    if smallest(options) > room:
        least = smallest(options) + budget - room
        size = f"{math.ceil(8e4 * least / shape.parameters) / 1e4}bpw" if unit == "bpw" else f"{least:,} bytes"
        raise ConfigError(f"the budget {config.budget} is too small", hint=f"the smallest that this can be is {size}")
    return budget, room


def _fit(config: QuantConfig, shape: LlamaConfig, options: dict[str, list[Option]], out: Path) -> dict[str, Any]:
    """Choose until everything fits: a size counts all files of the folder but the manifest, bits per weight the tensors."""
    budget, room = _room(config, shape, options, out)
    unit = parse_budget(config.budget)[1]
    while True:
        chosen = choose(options, room)
        forms = {name: choice.option.form for name, choice in chosen.items()}
        size = sum(choice.option.bytes for choice in chosen.values()) + _around(config, shape, forms, unit, out)
        if size <= budget:
            break
        room -= size - budget
    return {
        "forms": {name: _row_of(choice) for name, choice in chosen.items()},
        "predicted_kl": sum(choice.option.damage for choice in chosen.values()),
        "budget_bytes": budget,
    }


def _around(config: QuantConfig, shape: LlamaConfig, forms: dict[str, Form], unit: str, out: Path) -> int:
    """The bytes beside the matrices: norms and, of a size, the weights' header and all other files."""
    sizes = shape.shapes()
    if unit == "bpw":
        return sum(Form(UNQUANTISED).bytes(size) for size in sizes.values() if len(size) == 1)
    _write_forms(out, config.with_forms(forms))
    every = {hf_name(name): forms.get(name, Form(UNQUANTISED)) for name in sizes}
    whole = weights_file_bytes(shape, every)
    others = sum(p.stat().st_size for p in out.iterdir() if p.is_file() and p.name != WEIGHTS and p.name[0] != ".")
    return whole - sum(stored_bytes(sizes[name], form) for name, form in forms.items()) + others


def _row_of(choice: Choice) -> dict[str, Any]:
    return {
        "form": str(choice.option.form),
        "bytes": choice.option.bytes,
        "damage": choice.option.damage,
        "gain_per_mb": choice.gain,
        "next_gain_per_mb": choice.next_gain,
    }


def _write_forms(out: Path, config: QuantConfig) -> None:
    """Say in config.json how each matrix is stored."""
    data = json.loads((out / CONFIG).read_text())
    data[QUANTISED] = to_json(config)
    write_atomic(out / CONFIG, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
