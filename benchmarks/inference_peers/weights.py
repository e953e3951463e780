"""One model of random weights, in every format, tensor by tensor.

Each weight is  base * s * code,  with `code` a whole number in -7 ... 7, `s` one in 8 ... 15 for each group of 32 weights
of a row, and `base` a power of two. Such a number is exact in bfloat16 (seven bits), in Q4_0, Q8_0 and Q6_K, and in our
own 4 and 8 bits: all files hold the same model, no quantiser has to search, and all engines should say the same.

    hf            bfloat16, a Hugging Face folder: ours, transformers, torchao, OpenVINO
    bf16.gguf     BF16
    q8_0.gguf     Q8_0, embedding and output too
    q4_0.gguf     Q4_0, embedding and output Q6_K, as llama.cpp's own quantiser has it
    int8, int4    our quantised folders, laid out, groups of 32; embedding and output 8 bits. 8-bit codes use their whole
                  range, as a quantiser's do: 16 * code with base * s / 16
    int8-128      8 bits in groups of 128: s * code with base. torchao's and OpenVINO's 8 bits have a scale per row, so this
                  is the one to hold beside them
"""

import dataclasses
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from puna.config import to_json
from puna.model.checkpoint import write_folder
from puna.model.convert import hf_name, is_rotary, to_hf_rows
from puna.model.folder import CONFIG, QUANTISED, WEIGHTS
from puna.model.gguf import blocks
from puna.model.gguf.format import Container, Pending, write_container
from puna.model.gguf.llama import ROPE_FREQS, frequency_divisors, gguf_name
from puna.model.gguf.write import KINDS, settings_of
from puna.model.sizes import SIZES, LlamaConfig
from puna.model.tensorfile import TensorFile
from puna.model.tensorwriter import write_tensors
from puna.quant.forms import Form, QuantConfig
from puna.quant.groups import Packed, pack4, pack6
from puna.quant.layout import is_split, laid_name, laid_shape, lay

SHAPES = {"1b": SIZES["llama-3.2-1b"], "8b": SIZES["llama-3.1-8b"], "tiny": SIZES["llama-3.2-1b"]}
GROUP = 32
_PIECE = 1 << 23  # weights made at a time
QUANTISATIONS = {
    "int8": QuantConfig(bits=8, group_size=GROUP), "int8-128": QuantConfig(bits=8, group_size=128),
    "int4": QuantConfig(bits=4, group_size=GROUP),
}  # fmt: skip


def shape(name: str) -> LlamaConfig:
    """A size by its short name; `tiny` is for trying the script itself."""
    config = SHAPES[name]
    if name == "tiny":
        small = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512, "vocab_size": 2048}
        config = dataclasses.replace(config, **small)
    return config


def write(config: LlamaConfig, form: str, out: Path) -> None:
    """Write the model of `config` as `form` to `out`; nothing if it is there."""
    if out.is_file() or ((out / CONFIG).is_file() and (form == "hf" or _is_laid(out))):
        return
    if form.endswith(".gguf"):
        _write_gguf(config, form.removesuffix(".gguf").upper(), out)
    else:
        _write_folder(config, form, out)


def _is_laid(folder: Path) -> bool:
    with TensorFile(folder / WEIGHTS) as file:
        return any(name.endswith(".laid") for name in file.entries)


def read_per_token(path: Path) -> int:
    """Bytes of a file's matrices that one decoding step reads: of an embedding of its own it is only a row."""
    if path.is_file():
        with Container(path) as file:
            sizes = {name: info.bytes for name, info in file.tensors.items() if len(info.shape) > 1}
    else:
        with TensorFile(path / WEIGHTS) as file:
            sizes = {name: entry.bytes for name, entry in file.entries.items() if len(entry.shape) > 1}
    if any(name.startswith(("output.", "lm_head.")) for name in sizes):
        sizes = {n: size for n, size in sizes.items() if not n.startswith(("token_embd.", "model.embed_tokens."))}
    return sum(sizes.values())


PACK = {4: pack4, 6: pack6, 8: lambda codes: 16 * codes}
SHARE = {8: 1 / 16}  # of a scale


class Rows:
    """The random matrix `name`: its codes (rows, columns) int8 and its groups' `s` (rows, columns / 32) int8."""

    def __init__(self, name: str, size: tuple[int, int]):
        self.name, self.size = name, size
        self.base = 2.0 ** (-13 if name.endswith(("wo.weight", "w2.weight")) else -11)  # deviation 0.006 and 0.026

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes and scales of neighbouring rows; the same each time."""
        rows, columns = self.size
        step = max(1, _PIECE // columns)
        for start in range(0, rows, step):
            dice = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{start}".encode()))
            count = min(step, rows - start)
            words = torch.randint(-(2**63), 2**63 - 1, (count, columns // 8), generator=dice)
            codes = (words.view(torch.int8) & 15) - 8
            codes *= codes != -8  # none leans to one side
            yield codes, torch.randint(8, 16, (count, columns // GROUP), generator=dice, dtype=torch.int8)

    def whole(self) -> tuple[Tensor, Tensor]:
        codes, scales = zip(*self.pieces())
        return torch.cat(codes), torch.cat(scales)

    def numbers(self, codes: Tensor, scales: Tensor) -> Tensor:
        """bfloat16, exact."""
        spread = (scales.bfloat16() * self.base)[..., None]
        return (codes.unflatten(1, (-1, GROUP)).bfloat16() * spread).flatten(1)


def _write_gguf(config: LlamaConfig, kind: str, out: Path) -> None:
    number, chosen, outside = KINDS[kind]
    tensors = {}
    for name, size in config.shapes().items():
        if len(size) == 1:
            tensors[gguf_name(name)] = Pending(blocks.F32, size, [torch.ones(size).view(torch.uint8)])
        else:
            block = chosen if name.startswith("layers.") else outside
            tensors[gguf_name(name)] = Pending(block, size, _blocks(Rows(name, size), block))
    if config.rope_scaling is not None:
        divisors = frequency_divisors(config)
        tensors[ROPE_FREQS] = Pending(blocks.F32, tuple(divisors.shape), [divisors.view(torch.uint8)])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_container(out, settings_of(config, number, out.stem) | {"tokenizer.ggml.model": "no_vocab"}, tensors)


def _blocks(matrix: Rows, block: blocks.BlockType) -> Iterator[Tensor]:
    make = {blocks.BF16: _bf16, blocks.Q8_0: _q8_0, blocks.Q4_0: _q4_0, blocks.Q6_K: _q6_k}[block]
    for codes, scales in matrix.pieces():
        yield make(matrix, codes, scales)


def _bf16(matrix: Rows, codes: Tensor, scales: Tensor) -> Tensor:
    return matrix.numbers(codes, scales).view(torch.uint8)


def _half(matrix: Rows, scales: Tensor) -> Tensor:
    return (scales.half() * matrix.base).view(-1, 1).view(torch.uint8)


def _q8_0(matrix: Rows, codes: Tensor, scales: Tensor) -> Tensor:
    return torch.cat([_half(matrix, scales), codes.view(torch.uint8).view(-1, 32)], 1)


def _q4_0(matrix: Rows, codes: Tensor, scales: Tensor) -> Tensor:
    q = (codes + 8).view(torch.uint8).view(-1, 2, 16)
    return torch.cat([_half(matrix, scales), q[:, 0] | q[:, 1] << 4], 1)


def _q6_k(matrix: Rows, codes: Tensor, scales: Tensor) -> Tensor:
    """Groups of 16 in blocks of 256: d is the base, and each group of 32 tells its `s` twice."""
    q = (codes + 32).view(torch.uint8).view(-1, 2, 4, 32)  # halves of 128, four runs of 32
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = (q >> 4 << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]).sum(2, dtype=torch.uint8)
    s = scales.view(-1, 8).repeat_interleave(2, 1).view(torch.uint8)
    d = torch.tensor([matrix.base]).half().view(torch.uint8).expand(len(q), 2)
    return torch.cat([low.flatten(1), high.flatten(1), s, d], 1)


def _write_folder(config: LlamaConfig, form: str, out: Path) -> None:
    quant = QUANTISATIONS.get(form)
    tensors = {}
    for name, size in config.shapes().items():
        theirs = hf_name(name)
        if len(size) == 1:
            kind = torch.bfloat16 if quant is None else torch.float32
            tensors[theirs] = (kind, size, lambda size=size: torch.ones(size))
        elif quant is None:
            matrix = Rows(name, size)
            tensors[theirs] = (torch.bfloat16, size, partial(_ordered, config, matrix))
        else:
            made = quant.form_of(name)
            tensors[laid_name(theirs)] = (torch.uint8, laid_shape(size, made), partial(_laid, config, name, size, made))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.partial")
    write_folder(config, None, unfinished, torch.bfloat16, {QUANTISED: to_json(quant)} if quant else None)
    write_tensors(unfinished / WEIGHTS, tensors, {"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)  # of an older form
    unfinished.rename(out)


def _laid(config: LlamaConfig, name: str, size: tuple[int, int], form: Form) -> Tensor:
    """The matrix as codes, as the kernels read them."""
    matrix = Rows(name, size)
    made = _wide if form.group_size != GROUP else _narrow
    codes, scales = zip(*(made(form, matrix.base, c, s) for c, s in matrix.pieces()))
    packed = Packed(torch.cat(codes), torch.cat(scales), size[1], form.bits, form.group_size)
    return lay(packed, split=is_split(name, form, config.tied))


def _narrow(form: Form, base: float, codes: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return PACK[form.bits](codes), s.half() * (base * SHARE.get(form.bits, 1))


def _wide(form: Form, base: float, codes: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Several groups under one scale; 8 bits hold what differs between them."""
    scales = torch.full((len(codes), codes.shape[1] // form.group_size), base).half()
    return codes * s.repeat_interleave(GROUP, 1), scales


def _ordered(config: LlamaConfig, matrix: Rows) -> Tensor:
    """The matrix's numbers in Hugging Face's order of rows."""
    numbers = torch.cat([matrix.numbers(codes, scales) for codes, scales in matrix.pieces()])
    return to_hf_rows(numbers, config.head_dim) if is_rotary(matrix.name) else numbers
