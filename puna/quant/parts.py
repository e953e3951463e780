"""The work in progress: one small safetensors file for each finished tensor, named as Hugging Face names it.

What is there is done, so an interrupted run goes on where it was; at the end all are laid out as the kernels read them
(`layout.py`) and joined into one file. `Written` reads them back as a model does: in Meta's names and row order,
dequantised.
"""

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from puna.model.convert import hf_name, is_rotary, to_meta_rows
from puna.model.sizes import LlamaConfig
from puna.model.tensorfile import TensorFile
from puna.model.tensorwriter import Pending, file_bytes, pending, write_tensors
from puna.model.weights import Weights
from puna.quant.forms import UNQUANTISED, Form, part_names, part_shapes
from puna.quant.groups import Packed, code_dtype, dequantise_matrix, quantise_matrix
from puna.quant.layers import Reader
from puna.quant.layout import is_laid, is_split, laid_name, laid_shape, lay

METADATA = {"format": "pt"}


def part_dtypes(name: str, shape: tuple[int, ...], form: Form) -> dict[str, torch.dtype]:
    """The types of a matrix's `part_names`; a vector is float32."""
    if len(shape) == 1:
        return {name: torch.float32}
    codes = code_dtype(form.bits)
    kinds = (torch.bfloat16,) if form.bits == UNQUANTISED else (codes, torch.float16, torch.float16)
    return dict(zip(part_names(name, form), kinds))


def final_tensors(config: LlamaConfig, forms: dict[str, Form]) -> dict[str, dict[str, tuple[torch.dtype, tuple]]]:
    """What stands for each of Meta's tensors in the joined file: names there, with types and shapes.

    `forms` are by Hugging Face's names.
    """
    found = {}
    for meta, shape in config.shapes().items():
        name, form = hf_name(meta), forms[hf_name(meta)]
        if is_laid(shape, form):
            found[meta] = {laid_name(name): (torch.uint8, laid_shape(shape, form))}
        else:
            kinds = part_dtypes(name, shape, form)
            found[meta] = {part: (kinds[part], size) for part, size in part_shapes(name, shape, form).items()}
    return found


def weights_file_bytes(config: LlamaConfig, forms: dict[str, Form]) -> int:
    """The size of the joined file; `forms` by Hugging Face's names."""
    found = final_tensors(config, forms).values()
    return file_bytes({name: entry for tensors in found for name, entry in tensors.items()}, METADATA)


def write_nearest(weights: Weights, name: str, form: Form, out: Path) -> None:
    """One tensor into a file of its own, each weight to its nearest code, a few megabytes at a time."""
    if len(weights.shape(name)) == 1:
        write_tensors(out, {name: pending(weights.read(name), torch.float32)}, {})
        return
    parts: list[tuple[Tensor, ...]] = []
    wrong = whole = 0.0
    for _, piece in weights.pieces(name):
        piece = piece.float()
        if form.bits == UNQUANTISED:
            made: tuple[Tensor, ...] = (piece.bfloat16(),)
            again = made[0].float()
        else:
            packed = quantise_matrix(piece, form.bits, form.group_size, offset=form.offset)
            made, again = packed.tensors, dequantise_matrix(packed)
        parts.append(made)
        wrong += float((piece - again).double().square().sum())
        whole += float(piece.double().square().sum())
    _write(out, name, form, [torch.cat(rows) for rows in zip(*parts)], wrong / max(whole, 1e-30), "nearest")


def write_packed(weight: Tensor, packed: Packed, name: str, form: Form, way: str, out: Path) -> None:
    """A matrix that was quantised as a whole, all in Hugging Face's row order."""
    wrong = (weight.float() - dequantise_matrix(packed)).square().sum(dtype=torch.float64)
    whole = weight.float().square().sum(dtype=torch.float64).clamp_min(1e-30)
    _write(out, name, form, packed.tensors, float(wrong / whole), way)


def _write(out: Path, name: str, form: Form, tensors: Iterable[Tensor], error: float, way: str) -> None:
    named = {part: pending(tensor) for part, tensor in zip(part_names(name, form), tensors)}
    write_tensors(out, named, {"relative_error": f"{math.sqrt(error):.6g}", "rounded": way})


class Written:
    """The finished tensors of a folder as a `layers.Reader`; those that are not there come from `otherwise`."""

    def __init__(self, folder: Path, config: LlamaConfig, forms: dict[str, Form], otherwise: Reader):
        self.folder, self.config, self.forms, self.otherwise = folder, config, forms, otherwise
        self.shapes = config.shapes()

    def __call__(self, name: str) -> Tensor:
        theirs = hf_name(name)
        if not (self.folder / theirs).is_file():
            return self.otherwise(name)
        with TensorFile(self.folder / theirs) as file:
            if theirs in file.entries:
                made = file.read(theirs).float()
            else:
                made = dequantise_matrix(_packed(file, theirs, self.forms[theirs], self.shapes[name][1]))
        return to_meta_rows(made, self.config.head_dim) if is_rotary(name) else made


def assemble(
    work: Path, config: LlamaConfig, forms: dict[str, Form], out: Path
) -> tuple[dict[str, float], dict[str, str], int]:
    """Join all tensors of `work` into one file: each matrix's error, how it was rounded, and the bytes of all tensors."""
    tensors: dict[str, Pending] = {}
    errors: dict[str, float] = {}
    ways: dict[str, str] = {}
    for meta, parts in final_tensors(config, forms).items():
        name = hf_name(meta)
        with TensorFile(work / name) as file:
            if "relative_error" in file.metadata:
                errors[name] = float(file.metadata["relative_error"])
                ways[name] = file.metadata["rounded"]
        for part, (dtype, shape) in parts.items():
            if part == laid_name(name):
                make = partial(_laid, work, config, meta, forms[name])
            else:
                make = partial(_read, work / name, part)
            tensors[part] = (dtype, shape, make)
    write_tensors(out, tensors, METADATA)
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape, _ in tensors.values())
    return dict(sorted(errors.items())), dict(sorted(ways.items())), size


def _read(part: Path, name: str) -> Tensor:
    with TensorFile(part) as file:
        return file.read(name)


def _packed(file: TensorFile, name: str, form: Form, columns: int) -> Packed:
    codes, scales, *offsets = (file.read(part) for part in part_names(name, form))
    return Packed(codes, scales, columns, form.bits, form.group_size, offsets[0] if offsets else None)


def _laid(work: Path, config: LlamaConfig, name: str, form: Form) -> Tensor:
    """The matrix that Meta calls `name`, laid out."""
    with TensorFile(work / hf_name(name)) as file:
        packed = _packed(file, hf_name(name), form, config.shapes()[name][1])
    if is_rotary(name):
        packed = packed.with_rows(lambda rows: to_meta_rows(rows, config.head_dim))
    return lay(packed, split=is_split(name, form, config.tied))
