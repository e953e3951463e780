"""Quantise a checkpoint: weights only, group by group, matrix by matrix.

The result is a model folder like the checkpoint's, in which each matrix is two tensors, `….codes` and `….scales`, in
Hugging Face's names and row order, and config.json says how under `puna_quantisation`. Norms stay as they are. The
embedding and the output matrix have bits of their own: they are what small models are most sensitive to, and in large
ones a small part of the whole.

Each matrix's result is kept until the end, so that an interrupted run goes on where it was, and no more than one matrix
is in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from puna.artifacts import WORK, Artifact, stage
from puna.config import require, to_json
from puna.log import track
from puna.model.checkpoint import QUANTISED, WEIGHTS, WeightFiles, load_config, write_folder
from puna.model.convert import meta_name
from puna.model.tensorfile import Pending, TensorFile, pending, write_tensors
from puna.quant.groups import dequantise_matrix, quantise_matrix
from puna.tokenizer.carry import has_tokenizer

UNQUANTISED = 16


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How weights become integers (`groups.py`)."""

    bits: Literal[4, 8] = 4
    group_size: int = 32  # weights that share a scale
    embedding_bits: Literal[4, 8, 16] = 8  # of the embedding and the output; 16 keeps them as bfloat16

    def __post_init__(self) -> None:
        require(self.group_size > 0, f"group_size={self.group_size} must be positive", hint="32, 64 and 128 are usual")

    def bits_of(self, name: str) -> int:
        """The bits of the matrix that Meta calls `name`."""
        return self.embedding_bits if name.startswith(("tok_embeddings", "output")) else self.bits


@stage("quantised")
def quantise(config: QuantConfig, checkpoint: Artifact | Path, *, out: Path) -> dict[str, Any]:
    """Write the quantised form of `checkpoint` into `out`.

    Metrics: `parameters`, `bytes` of the weights and `checkpoint_bytes` of those they were made from,
    `bits_per_weight` over everything, and `relative_error` of each matrix: rms(w - w') / rms(w).
    Raises `ArtifactError` for a damaged checkpoint, `DataError` for weights that are not finite.
    """
    source = checkpoint.path if isinstance(checkpoint, Artifact) else Path(checkpoint)
    shape = load_config(source)
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with WeightFiles(source) as files:
        names = sorted(n for n in files.names if meta_name(n) and not (shape.tied and n == "lm_head.weight"))
        for name in track(names, "quantise", unit="matrices"):
            if not (work / name).exists():
                _quantise_one(config, files, name, work / name)
        checkpoint_bytes = sum(files.bytes(name) for name in names)
    tokenizer = source if has_tokenizer(source) else None
    write_folder(shape, tokenizer, out, torch.bfloat16, {QUANTISED: to_json(config)})
    errors, size = _assemble([work / name for name in names], out / WEIGHTS)
    return {
        "parameters": shape.parameters,
        "bytes": size,
        "checkpoint_bytes": checkpoint_bytes,
        "bits_per_weight": 8 * size / shape.parameters,
        "relative_error": errors,
    }


def part_names(name: str) -> tuple[str, str]:
    """The names of the codes and scales of the matrix `name`."""
    stem = name.removesuffix("weight")
    return stem + "codes", stem + "scales"


def _quantise_one(config: QuantConfig, files: WeightFiles, name: str, out: Path) -> None:
    """Quantise one tensor into a file of its own."""
    weight, bits = files.read(name), config.bits_of(meta_name(name))
    if weight.ndim == 1:
        write_tensors(out, {name: pending(weight, torch.float32)}, {})
    elif bits == UNQUANTISED:
        _write_with_error(out, {name: pending(weight, torch.bfloat16)}, weight, weight.bfloat16())
    else:
        packed = quantise_matrix(weight, bits, config.group_size)
        codes, scales = part_names(name)
        parts = {codes: pending(packed.codes), scales: pending(packed.scales)}
        _write_with_error(out, parts, weight, dequantise_matrix(packed))


def _write_with_error(out: Path, parts: Mapping[str, Pending], weight: torch.Tensor, again: torch.Tensor) -> None:
    weight = weight.float()
    error = (weight - again.float()).square().mean().sqrt() / weight.square().mean().sqrt().clamp_min(1e-12)
    write_tensors(out, parts, {"relative_error": f"{float(error):.6g}"})


def _assemble(parts: list[Path], out: Path) -> tuple[dict[str, float], int]:
    """Join the tensors of all files into one; returns each matrix's error and the bytes of all tensors."""
    tensors: dict[str, Pending] = {}
    errors: dict[str, float] = {}
    size = 0
    for part in parts:
        with TensorFile(part) as file:
            if "relative_error" in file.metadata:
                errors[part.name] = float(file.metadata["relative_error"])
            for name, entry in file.entries.items():
                tensors[name] = (entry.dtype, entry.shape, lambda part=part, name=name: _read(part, name))
                size += entry.bytes
    write_tensors(out, tensors, {"format": "pt"})
    return errors, size


def _read(part: Path, name: str) -> torch.Tensor:
    with TensorFile(part) as file:
        return file.read(name)
