"""What a model folder of Hugging Face's form says of its model: its shape, and where its tensors lie.

Accepted is any such folder, in one file or in shards with an index (`checkpoint.py` lists the files). Rotary settings are
read as the released Llamas have them (`rope_theta` beside `rope_scaling`) and in the newer form (`rope_parameters`).
Headers need no PyTorch; tensors come as its tensors, or as bytes whose place is told.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puna import artifacts
from puna.errors import ArtifactError, ConfigError, shown
from puna.model.convert import hf_name
from puna.model.sizes import LlamaConfig, RopeScaling
from puna.model.tensorfile import TensorFile, row_pieces, unique_keys

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
QUANTISED = "puna_quantisation"  # the block of config.json that says how weights were made smaller
_SHARD = re.compile(r"[\w. +-]{1,200}\.safetensors")  # the name of a file beside the index, and no path
_MOST_JSON_BYTES = 16 << 20  # of a file that describes a model; the index of the 405B model has 0.1 million
_PIECE_BYTES = 4 << 20  # read at a time: what loading needs beside the model itself
_FORMS = ("F32", "BF16", "F16", "F64")
_INDEX_HINT = "the files and their index do not belong together: fetch the model again"
_FOLDER_HINT = "give a folder with config.json and model.safetensors: a checkpoint of ours or of Hugging Face"


def load_config(path: Path) -> LlamaConfig:
    """The shape of the model in the folder `path`. Raises `ArtifactError` if it is not a dense Llama's."""
    return _parse_config(read_json(path, CONFIG), path / CONFIG)


class WeightFiles:
    """The safetensors files of a folder, as one set of tensors. Use as a context."""

    def __init__(self, path: Path):
        self.path = path
        self._stack = ExitStack()
        with ExitStack() as opened:
            self._home: dict[str, TensorFile] = {}
            for name, promised in _weight_files(path).items():
                file = opened.enter_context(TensorFile(verified_file(path, name)))
                self._add(file, promised)
            self._stack = opened.pop_all()

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _add(self, file: TensorFile, promised: set[str]) -> None:
        twice = next((name for name in file.entries if name in self._home), None)
        if twice is not None:
            both = f"{self._home[twice].path.name} and {file.path.name}"
            raise ArtifactError(f"{self.path}: {both} both hold the tensor {shown(twice)}", hint=_INDEX_HINT)
        absent = min(promised - file.entries.keys(), default=None)
        if absent is not None:
            raise ArtifactError(f"{file.path} lacks {shown(absent)}, which {INDEX} says it holds", hint=_INDEX_HINT)
        self._home.update(dict.fromkeys(file.entries, file))

    @property
    def names(self) -> set[str]:
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name].entries[name].shape

    def bytes(self, name: str) -> int:
        return self._home[name].entries[name].bytes

    def form(self, name: str) -> str:
        """How its numbers are stored: `F32`, `BF16`, …"""
        return self._home[name].entries[name].form

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes lie: a file descriptor, open as long as this is, and the first byte."""
        return self._home[name].place(name)

    def mapped(self, name: str) -> "Tensor | None":
        """A whole tensor as the file's own pages, if it can be had so; see `TensorFile.mapped`."""
        return self._home[name].mapped(name)

    def read(self, name: str) -> "Tensor":
        """A whole tensor, as stored."""
        return self._home[name].read(name)

    def numbers(self, name: str) -> np.ndarray:
        """A whole tensor of floats as float32, without PyTorch."""
        return self._home[name].numbers(name)

    def pieces(self, name: str, multiple: int = 1) -> "Iterator[tuple[int, Tensor]]":
        """A tensor as (first row, rows), each piece a multiple of `multiple` rows and a few megabytes long."""
        file = self._home[name]
        for start, stop in row_pieces(file.entries[name], multiple, _PIECE_BYTES):
            yield start, file.read(name, start, stop)

    def expect_llama(self, config: LlamaConfig) -> None:
        """Raises `ArtifactError` unless these are the weights of a Llama of this shape."""
        self.expect_depth(config)
        self.expect({hf_name(name): shape for name, shape in config.shapes().items()})
        whole = min((name for name in self._home if self.form(name) not in _FORMS), default=None)
        if whole is not None:
            what = f"{self._home[whole].path}: {shown(whole)} is of type {self.form(whole)}"
            raise ArtifactError(what, hint=f"the weights of a Llama are of type {', '.join(_FORMS)}")

    def expect_depth(self, config: LlamaConfig) -> None:
        """Raises `ArtifactError` if `config` claims more layers than there are tensors: nothing is made of such a claim."""
        if config.n_layers > len(self._home):
            what = f"{self.path} has {len(self._home):,} tensors, {CONFIG} claims {config.n_layers:,} layers"
            raise ArtifactError(what, hint="is config.json another model's?")

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `ArtifactError` unless exactly these tensors are there, in these shapes."""
        spare = {"lm_head.weight"}  # a tied model's output matrix, stored a second time by some writers
        missing = sorted(shapes.keys() - self.names)
        unknown = sorted(n for n in self.names - shapes.keys() - spare if not n.endswith("rotary_emb.inv_freq"))
        for names, what in ((missing, "lacks"), (unknown, "has unexpected")):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                hint = "config.json and the weights do not belong together, or this is not a dense Llama"
                raise ArtifactError(f"{self.path} {what} tensors: {', '.join(map(shown, names[:3]))}{more}", hint=hint)
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                found = f"{self.path}: tensor {name!r} has shape {list(self.shape(name))}"
                raise ArtifactError(
                    f"{found}, config.json asks for {list(shape)}", hint="is config.json another model's?"
                )


def verified_file(path: Path, name: str) -> Path:
    """The file `name` of the model folder `path`, checked against the manifest if the folder is an artifact.

    Raises `ArtifactError` if it is missing or damaged.
    """
    if (path / artifacts.MANIFEST).is_file():
        return artifacts.load(path, "checkpoint", "quantised").file(name)
    if (path / artifacts.BEGUN).is_file():
        raise ArtifactError(f"{path} is not complete: its stage was interrupted", hint="run the same command again")
    if os.path.lexists(path / name):
        artifacts.open_regular(path / name).close()
    else:
        what = f"has no {name}" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {what}", hint=_FOLDER_HINT)
    return path / name


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of the model folder `path`. Raises `ArtifactError` if it cannot be read as one."""
    file = verified_file(path, name)
    with artifacts.open_regular(file) as opened:
        text = opened.read(_MOST_JSON_BYTES + 1)
    if len(text) > _MOST_JSON_BYTES:
        size = f"{file.stat().st_size:,} bytes, at most {_MOST_JSON_BYTES:,} are read"
        raise ArtifactError(f"{file} has {size}", hint="a model's has a few thousand")
    try:
        data = json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not JSON: {str(error)[:200]}", hint="fetch the file again") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{file} is not a JSON object", hint=_FOLDER_HINT)
    return data


def _parse_config(data: Mapping[str, Any], file: Path) -> LlamaConfig:
    fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in fixed.items():
        if data.get(key, value) != value:
            hint = f"only dense Llamas can be read ({key} {value!r})"
            raise ArtifactError(f"{file}: {key} is {shown(data[key])}", hint=hint)
    try:
        heads = data["num_attention_heads"]
        return LlamaConfig(
            dim=data["hidden_size"],
            n_layers=data["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=_given(data, "num_key_value_heads", heads),
            head_dim=data["hidden_size"] // heads if data.get("head_dim") is None else data["head_dim"],
            ffn_dim=data["intermediate_size"],
            vocab_size=data["vocab_size"],
            context=data["max_position_embeddings"],
            norm_eps=_real(data, "rms_norm_eps", 1e-6),
            tied=data.get("tie_word_embeddings", False),
            **_parse_rope(data, file),
        )
    except KeyError as error:
        raise ArtifactError(f"{file} has no {error.args[0]!r}", hint=_FOLDER_HINT) from None
    except (TypeError, ZeroDivisionError, OverflowError, ConfigError) as error:
        raise ArtifactError(f"{file} does not describe a Llama: {error}", hint=_FOLDER_HINT) from None


def _parse_rope(data: Mapping[str, Any], file: Path) -> dict[str, Any]:
    settings = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise TypeError(f"rotary positions are given as {shown(settings)}")
    theta = _real(settings, "rope_theta", _real(data, "rope_theta", 10_000.0))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        hint = "rotary positions can be plain ('default') or Llama 3.1's ('llama3')"
        raise ArtifactError(f"{file}: rotary scaling {shown(kind)} is not a Llama's", hint=hint)
    scaling = RopeScaling(
        factor=_real(settings, "factor"),
        low_freq_factor=_real(settings, "low_freq_factor"),
        high_freq_factor=_real(settings, "high_freq_factor"),
        original_context=settings["original_max_position_embeddings"],
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _given(data: Mapping[str, Any], key: str, default: Any) -> Any:
    """What `data` says, unless it says null; a zero is said."""
    return default if data.get(key) is None else data[key]


def _real(data: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """A number that may be written as a whole one."""
    value = data[key] if default is None else _given(data, key, default)
    return float(value) if type(value) is int else value


def _weight_files(path: Path) -> dict[str, set[str]]:
    """The files that hold the weights, each with the tensors that the index says it holds."""
    if os.path.lexists(path / WEIGHTS) or not os.path.lexists(path / INDEX):
        return {WEIGHTS: set()}
    listed = read_json(path, INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ArtifactError(f"{path / INDEX} has no usable weight_map", hint="fetch the file again")
    found: dict[str, set[str]] = {}
    for tensor, name in sorted(listed.items()):
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            what = f"has no usable weight_map: {shown(name)} is not the name of a file beside it"
            raise ArtifactError(f"{path / INDEX} {what}", hint="fetch the file again")
        found.setdefault(name, set()).add(tensor)
    return dict(sorted(found.items()))
