"""Quantise a checkpoint: weights only, group by group, matrix by matrix.

The result is a model folder like the checkpoint's, in which each matrix is two tensors, `….codes` and `….scales`, in
Hugging Face's names and row order, and config.json says how under `puna_quantisation`. Norms stay as they are. The
embedding and the output matrix have bits of their own: they are what small models are most sensitive to, and in large
ones a small part of the whole.

Each matrix's result is kept until the end, so that an interrupted run goes on where it was, and no more than one packed
matrix is in memory, whatever format the weights come from.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from puna.artifacts import WORK, Artifact, stage
from puna.config import require, to_json
from puna.log import track
from puna.model.checkpoint import QUANTISED, WEIGHTS
from puna.model.conversion import write_folder_of
from puna.model.convert import hf_name, meta_name
from puna.model.opening import open_checkpoint
from puna.model.sizes import tensor_shapes
from puna.model.tensorfile import Pending, TensorFile, pending, write_tensors
from puna.model.weights import Weights
from puna.quant.groups import dequantise_matrix, quantise_matrix

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
    """Write the quantised form of `checkpoint`, of any format that `model.opening` knows, into `out`.

    Metrics: `parameters`, `bytes` of the weights and `checkpoint_bytes` of those they were made from,
    `bits_per_weight` over everything, and `relative_error` of each matrix: rms(w - w') / rms(w).
    Raises `ArtifactError` for a damaged checkpoint, `DataError` for weights that are not finite.
    """
    source = checkpoint.path if isinstance(checkpoint, Artifact) else Path(checkpoint)
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(source) as opened:
        shape, weights = opened.config, opened.weights
        shapes = {hf_name(name): size for name, size in tensor_shapes(shape).items()}
        weights.expect(shapes)
        for name in track(sorted(shapes), "quantise", unit="matrices"):
            if not (work / name).exists():
                _quantise_one(config, weights, name, work / name)
        checkpoint_bytes = sum(weights.bytes(name) for name in shapes)
    write_folder_of(source, shape, out, torch.bfloat16, {QUANTISED: to_json(config)})
    errors, size = _assemble([work / name for name in sorted(shapes)], out / WEIGHTS)
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


def _quantise_one(config: QuantConfig, weights: Weights, name: str, out: Path) -> None:
    """Quantise one tensor into a file of its own, a few megabytes of it at a time."""
    bits = config.bits_of(meta_name(name))
    if len(weights.shape(name)) == 1:
        write_tensors(out, {name: pending(weights.read(name), torch.float32)}, {})
        return
    parts: list[tuple[Tensor, ...]] = []
    wrong = whole = 0.0
    for _, piece in weights.pieces(name):
        piece = piece.float()
        if bits == UNQUANTISED:
            made, again = (piece.bfloat16(),), piece.bfloat16().float()
        else:
            packed = quantise_matrix(piece, bits, config.group_size)
            made, again = (packed.codes, packed.scales), dequantise_matrix(packed)
        parts.append(made)
        wrong += float((piece - again).double().square().sum())
        whole += float(piece.double().square().sum())
    names = (name,) if bits == UNQUANTISED else part_names(name)
    joined = {part: pending(torch.cat(rows)) for part, rows in zip(names, zip(*parts))}
    write_tensors(out, joined, {"relative_error": f"{math.sqrt(wrong / max(whole, 1e-30)):.6g}"})


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
