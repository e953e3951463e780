"""A folder as Meta released it, read as one set of tensors.

    params.json  consolidated.00.pth  consolidated.01.pth ...  tokenizer.model

The files are the memory of the machines that the model was run on, side by side ("model parallel"). Each has every
tensor's name, and of most tensors a part, in the order of the files:

    wq wk wv w1 w3 output    rows        (out / N, in)      side by side along dimension 0
    wo w2                    columns     (out, in / N)      along dimension 1
    tok_embeddings           columns in Llama 1 and 2, rows from Llama 3 on; the shapes tell
    norms                    a copy in every file
    wk wv, more files than key/value heads: neighbouring files hold copies of the same heads

The parts are put together while rows are read, a few megabytes at a time, so that loading needs the model's memory and
little more. Copies are compared: files of two models, mixed, are found here. Rotary frequencies (`rope.freqs`) can be
computed and are ignored.

Meta's names and rotary order are our model's own. `load_meta` therefore copies as it reads; `MetaFiles` offers the same
tensors under Hugging Face's names and in their order, the interface of `checkpoint.WeightFiles`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import log
from puna.errors import ArtifactError
from puna.model.checkpoint import empty_model
from puna.model.convert import hf_name, is_rotary, to_hf_rows
from puna.model.dtypes import NAMES
from puna.model.folder import read_json, verified_file
from puna.model.llama import Llama
from puna.model.meta.params import PARAMS, Facts, parse_params
from puna.model.meta.torchfile import FREQUENCIES, TorchFile
from puna.model.sizes import LlamaConfig
from puna.model.tensorfile import TensorEntry, row_pieces

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
_PIECE_BYTES = 4 << 20  # of a merged tensor, read at a time
_MOST_PARAMS_BYTES = 1 << 20
_WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
_MAY_REPEAT = ("attention.wk.weight", "attention.wv.weight")
_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_HINT = "params.json and the weights do not belong together, or this is not a dense Llama"
_MIXED = "the files are of different models, or one is damaged: fetch the folder again"


@dataclass(frozen=True)
class _Merge:
    """How a tensor's parts make a whole: side by side along `axis`, each part in `copies` neighbouring files."""

    axis: int
    copies: int


class MetaFiles:
    """The weights of a folder in Meta's format. Use as a context.

    `config` is the model's shape, `notes` are sentences for the user about what had to be concluded. Tensors go by
    Hugging Face's names and row order, except in `meta_pieces`. Opening reads a few hundred kilobytes.
    Raises `ArtifactError` for a folder that is none, and for missing, unexpected, misshapen or damaged tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stack = ExitStack()
        params = _read_params(path)
        with ExitStack() as opened:
            self._files = [opened.enter_context(TorchFile(verified_file(path, n))) for n in shard_names(path)]
            self._merges: dict[str, _Merge] = {}
            self.config, self.notes = parse_params(params, path / PARAMS, self._facts(params.get("dim")))
            self._shapes = self._check(tensor_shapes(self._bounded(self.config)))
            self._hf = {hf_name(name): name for name in self._shapes}
            self._stack = opened.pop_all()

    def __enter__(self) -> "MetaFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return set(self._hf)

    @property
    def shards(self) -> int:
        """Number of files."""
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self._hf[name]]

    def form(self, name: str) -> str:
        """How the values of a tensor are stored: `BF16`, `F32`, ..."""
        return self._entry(self._hf[name]).form

    def bytes(self, name: str) -> int:
        return self._entry(self._hf[name]).bytes

    def read(self, name: str) -> Tensor:
        """A whole tensor, as stored, in Hugging Face's order."""
        ours = self._hf[name]
        return self._to_hf(ours, self._rows(ours, 0, self._shapes[ours][0]))

    def pieces(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """A tensor as (first row, rows), each piece a multiple of `multiple` rows and a few megabytes long."""
        ours = self._hf[name]
        head_dim = self.config.head_dim if is_rotary(ours) else 1
        whole = multiple if multiple % head_dim == 0 else multiple * head_dim
        for start, stop in row_pieces(self._entry(ours), whole, _PIECE_BYTES):
            yield start, self._to_hf(ours, self._rows(ours, start, stop))

    def meta_pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The tensor that Meta calls `name` as (first row, rows), in Meta's order."""
        for start, stop in row_pieces(self._entry(name), 1, _PIECE_BYTES):
            yield start, self._rows(name, start, stop)

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `ArtifactError` unless exactly these tensors (Hugging Face's names) are there, in these shapes."""
        spare = {hf_name(OUTPUT)} if self.config.tied else set()
        found = {name: self.shape(name) for name in self.names}
        differ = sorted(n for n in found.keys() | shapes.keys() if found.get(n) != shapes.get(n) and n not in spare)
        if differ:
            name = differ[0]
            says = f"is {list(found[name])}" if name in found else "is missing"
            asked = f"{list(shapes[name])} was expected" if name in shapes else "it was not expected"
            raise ArtifactError(f"{self.path}: tensor {name!r} {says}, {asked}", hint=_HINT)

    def _entry(self, name: str) -> TensorEntry:
        return TensorEntry(NAMES[self._files[0].tensors[name].storage.dtype], self._shapes[name], 0)

    def _to_hf(self, name: str, rows: Tensor) -> Tensor:
        return to_hf_rows(rows, self.config.head_dim) if is_rotary(name) else rows

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the merged tensor, in Meta's order."""
        merge = self._merges[name]
        parts = range(0, self.shards, merge.copies)
        if merge.axis == 1:
            return torch.cat([self._agreed(name, part, merge.copies, start, stop) for part in parts], dim=1)
        each = self._shapes[name][0] // len(parts)
        found = []
        for number, part in enumerate(parts):
            first, last = max(start - number * each, 0), min(stop - number * each, each)
            if first < last:
                found.append(self._agreed(name, part, merge.copies, first, last))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _agreed(self, name: str, part: int, copies: int, start: int, stop: int) -> Tensor:
        """Rows of a part, the same in each of the files `part` ... that hold a copy."""
        rows = self._files[part].read(name, start, stop)
        for file in self._files[part + 1 : part + copies]:
            if not _same_bits(rows, file.read(name, start, stop)):
                both = f"{self._files[part].path.name} and {file.path.name}"
                raise ArtifactError(f"{self.path}: {both} differ in {name!r}, of which both hold a copy", hint=_MIXED)
        return rows

    def _facts(self, dim: object) -> Facts:
        """What the weights tell about the shape; `dim` is what params.json says."""
        first = self._files[0].tensors
        embedding = first.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise ArtifactError(f"{self.path} lacks tensors: {EMBEDDING}", hint=_HINT)
        rows, columns = embedding.shape
        vocab_size = rows * (self.shards if columns == dim else 1)
        per_layer = any(n.startswith("layers.") and n.endswith(FREQUENCIES) for n in first)
        return Facts(vocab_size, tied=self._is_tied(), frequencies_per_layer=per_layer)

    def _is_tied(self) -> bool:
        """Whether the output matrix is missing or, in every file, the embedding once more.

        Where the archive has checksums, they and the first rows decide, so that opening stays fast.
        """
        for file in self._files:
            here = file.tensors.get(EMBEDDING), file.tensors.get(OUTPUT)
            if None in here or here[0] == here[1]:
                continue
            if here[0].shape != here[1].shape or here[0].storage.dtype != here[1].storage.dtype:
                return False
            sums = file.checksum(EMBEDDING), file.checksum(OUTPUT)
            if None not in sums and sums[0] != sums[1]:
                return False
            entry = TensorEntry(NAMES[here[0].storage.dtype], here[0].shape, 0)
            for start, stop in row_pieces(entry, 1, _PIECE_BYTES):
                if not _same_bits(file.read(EMBEDDING, start, stop), file.read(OUTPUT, start, stop)):
                    return False
                if None not in sums:
                    break
        return True

    def _bounded(self, config: LlamaConfig) -> LlamaConfig:
        """`config`, once its depth is known to be the files'."""
        found = {name.split(".")[1] for name in self._files[0].tensors if name.startswith("layers.")}
        if len(found) != config.n_layers:
            what = f"{self.path} has {len(found)} layers, {PARAMS} says {config.n_layers}"
            raise ArtifactError(what, hint=_HINT)
        return config

    def _check(self, wanted: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of the merged tensors that are there; each file was found to hold its part of each."""
        if self.config.tied and not any(OUTPUT in file.tensors for file in self._files):
            del wanted[OUTPUT]
        for file in self._files:
            there = {name for name in file.tensors if not name.endswith(FREQUENCIES)}
            for names, what in ((wanted.keys() - there, "lacks"), (there - wanted.keys(), "has unexpected")):
                if names:
                    listed = ", ".join(repr(name[:80]) for name in sorted(names)[:3])
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    raise ArtifactError(f"{file.path} {what} tensors: {listed}{more}", hint=_HINT)
        for name, shape in wanted.items():
            self._merges[name] = self._plan(name, shape)
        return wanted

    def _plan(self, name: str, shape: tuple[int, ...]) -> _Merge:
        first = self._files[0].tensors[name]
        for file in self._files:
            ref = file.tensors[name]
            if ref.storage.dtype not in _WEIGHT_TYPES:
                kinds = ", ".join(str(t).removeprefix("torch.") for t in _WEIGHT_TYPES)
                found = str(ref.storage.dtype).removeprefix("torch.")
                raise ArtifactError(f"{file.path}: {name!r} is of type {found}", hint=f"read here: {kinds}")
            if (ref.shape, ref.storage.dtype) != (first.shape, first.storage.dtype):
                raise ArtifactError(f"{file.path}: {name!r} is not the part that the other files have", hint=_MIXED)
        merge = _merge_of(name, first.shape, shape, self.shards, self.config.n_kv_heads)
        if merge is None:
            parts = f"{list(first.shape)} in each of {self.shards} files" if self.shards > 1 else list(first.shape)
            what = f"tensor {name!r} is {parts}, {PARAMS} asks for {list(shape)} in all"
            raise ArtifactError(f"{self.path}: {what}", hint=_HINT)
        return merge


def load_meta(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in the Meta folder `path`, its weights in `dtype`, on the CPU. What had to be concluded is logged.

    Needs the model's memory and a few megabytes more. Raises `ArtifactError` as `MetaFiles` does.
    """
    with MetaFiles(path) as files:
        for note in files.notes:
            log.info(note)
        model = empty_model(files.config, dtype)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                for start, piece in files.meta_pieces(name):
                    weight[start : start + len(piece)].copy_(piece)
    return model


def _read_params(path: Path) -> dict[str, Any]:
    file = path / PARAMS
    if not file.is_file():
        original = " (in a repository of Hugging Face, the folder `original`)" if path.is_dir() else ""
        what = f"{path} has no {PARAMS}" if path.is_dir() else f"{path} is not a folder"
        raise ArtifactError(what, hint=f"give the folder with {PARAMS} and consolidated.00.pth{original}")
    if file.stat().st_size > _MOST_PARAMS_BYTES:
        raise ArtifactError(f"{file} has {file.stat().st_size:,} bytes", hint="a true one has a few hundred")
    return read_json(path, PARAMS)


def shard_names(path: Path) -> list[str]:
    """The weight files of a Meta folder, in order. Raises `ArtifactError` if there is none or one is missing."""
    found = sorted((int(m[1]), m[0]) for m in map(_FILE.fullmatch, (p.name for p in path.iterdir())) if m)
    if not found:
        raise ArtifactError(f"{path} has {PARAMS}, but no consolidated.00.pth", hint="fetch the weights too")
    missing = sorted(set(range(found[-1][0] + 1)) - {number for number, _ in found})
    if missing:
        what = f"{path} has consolidated.{found[-1][0]:02}.pth, but no consolidated.{missing[0]:02}.pth"
        raise ArtifactError(what, hint="fetch the missing file: each holds a part of every tensor")
    return [name for _, name in found]


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by Meta's name; an output matrix is listed also for a tied model."""
    return config.shapes() | {OUTPUT: (config.vocab_size, config.dim)}


def _merge_of(name: str, part: tuple[int, ...], whole: tuple[int, ...], shards: int, kv_heads: int) -> _Merge | None:
    """How `shards` tensors of shape `part` make one of shape `whole`; None if they do not."""
    if len(whole) == 1:
        return _Merge(axis=0, copies=shards) if part == whole else None
    if len(part) != 2 or min(part) == 0:
        return None
    by_columns = name.endswith(_BY_COLUMNS) or (name == EMBEDDING and part[1] != whole[1])
    axis = 1 if by_columns else 0
    if part[1 - axis] != whole[1 - axis] or whole[axis] % part[axis]:
        return None
    different = whole[axis] // part[axis]
    copies = shards // different
    repeats = copies == 1 or (shards > kv_heads and name.endswith(_MAY_REPEAT))
    return _Merge(axis, copies) if different * copies == shards and repeats else None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that also holds for NaN; both are contiguous copies of ours."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
