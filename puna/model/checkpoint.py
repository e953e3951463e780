"""A checkpoint: a folder that is ours and Hugging Face's at once.

    model.safetensors        the weights under Hugging Face's names (`convert.py`)
    config.json              the shape, as `LlamaForCausalLM` reads it
    generation_config.json   which tokens end a text
    tokenizer.model          ranks, as tiktoken reads them
    tokenizer.json, tokenizer_config.json, special_tokens_map.json

What `transformers`, vLLM or llama.cpp's converter read is what we read ourselves: there is no second format that could
disagree. Reading accepts any such folder, in one file or in shards with an index. Rotary settings are written the way
the released Llamas have them (`rope_theta` beside `rope_scaling`) and read in that form and in the newer one
(`rope_parameters`). Saving the same weights gives the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import artifacts
from puna.errors import ArtifactError, ConfigError
from puna.model.convert import hf_name, is_rotary, to_hf_rows, to_meta_rows
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig, RopeScaling
from puna.model.tensorfile import NAMES, Pending, TensorFile, row_pieces, write_tensors
from puna.model.weights import Weights
from puna.tokenizer.bpe import MODEL_FILE, Tokenizer, write_ranks
from puna.tokenizer.export import write_hugging_face

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
QUANTISED = "puna_quantisation"  # the block of config.json that says how weights were made smaller
_PIECE_BYTES = 16 << 20  # read at a time: what loading needs beside the model itself
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FOLDER_HINT = "give a folder with config.json and model.safetensors: a checkpoint of ours or of Hugging Face"


def save_model(model: Llama, tokenizer_dir: Path | None, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` into the folder `out`, in `dtype` (the model's own by default).

    The tokenizer is taken from `tokenizer_dir`; with None the folder has weights and shape only.
    """
    dtype = dtype or model.norm.weight.dtype
    write_folder(model.config, tokenizer_dir, out, dtype)
    write_tensors(out / WEIGHTS, _hf_tensors(model, dtype), {"format": "pt"})


def load_config(path: Path) -> LlamaConfig:
    """The shape of the model in the folder `path`. Raises `ArtifactError` if it is not a dense Llama's."""
    return _parse_config(read_json(path, CONFIG), path / CONFIG)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in the folder `path`, its weights in `dtype`, on the CPU.

    Files of an artifact are checked against its manifest first. Needs the model's memory and a few megabytes more.
    Raises `ArtifactError` for a folder that is no model, and for missing, unexpected, misshapen or damaged tensors.
    """
    if QUANTISED in read_json(path, CONFIG):
        raise ArtifactError(f"{path} holds a quantised model", hint="load it with puna.quant.load_quantised")
    model = empty_model(load_config(path), dtype)
    with WeightFiles(path) as files:
        fill(model, files)
    return model


def empty_model(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """A model whose weights are allocated and hold nothing yet."""
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device="cpu")
    if config.tied:
        model.output.weight = model.tok_embeddings.weight
    return model


def fill(model: Llama, files: Weights) -> None:
    """Copy the weights from `files` into `model`, converting type and rotary order on the way."""
    wanted = {hf_name(name): (name, weight) for name, weight in model.named_parameters()}
    files.expect({name: tuple(weight.shape) for name, (_, weight) in wanted.items()})
    with torch.no_grad():
        for theirs, (ours, weight) in wanted.items():
            head_dim = model.config.head_dim if is_rotary(ours) else 1
            for start, piece in files.pieces(theirs, head_dim):
                piece = to_meta_rows(piece, head_dim) if is_rotary(ours) else piece
                weight[start : start + len(piece)].copy_(piece)


class WeightFiles:
    """The safetensors files of a folder, as one set of tensors. Use as a context."""

    def __init__(self, path: Path):
        self.path = path
        self._stack = ExitStack()
        with ExitStack() as opened:
            self._home: dict[str, TensorFile] = {}
            for name in _weight_file_names(path):
                file = opened.enter_context(TensorFile(verified_file(path, name)))
                self._home.update(dict.fromkeys(file.entries, file))
            self._stack = opened.pop_all()

    def __enter__(self) -> "WeightFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name].entries[name].shape

    def bytes(self, name: str) -> int:
        return self._home[name].entries[name].bytes

    def form(self, name: str) -> str:
        """How its numbers are stored: `F32`, `BF16`, …"""
        return NAMES[self._home[name].entries[name].dtype]

    def read(self, name: str) -> Tensor:
        """A whole tensor, as stored."""
        return self._home[name].read(name)

    def pieces(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """A tensor as (first row, rows), each piece a multiple of `multiple` rows and a few megabytes long."""
        file = self._home[name]
        for start, stop in row_pieces(file.entries[name], multiple, _PIECE_BYTES):
            yield start, file.read(name, start, stop)

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `ArtifactError` unless exactly these tensors are there, in these shapes."""
        spare = {"lm_head.weight"}  # a tied model's output matrix, stored a second time by some writers
        missing = sorted(shapes.keys() - self.names)
        unknown = sorted(n for n in self.names - shapes.keys() - spare if not n.endswith("rotary_emb.inv_freq"))
        for names, what in ((missing, "lacks"), (unknown, "has unexpected")):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                hint = "config.json and the weights do not belong together, or this is not a dense Llama"
                raise ArtifactError(f"{self.path} {what} tensors: {', '.join(names[:3])}{more}", hint=hint)
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
    if not (path / name).is_file():
        what = f"has no {name}" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {what}", hint=_FOLDER_HINT)
    return path / name


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of the model folder `path`. Raises `ArtifactError` if it cannot be read as one."""
    file = verified_file(path, name)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not JSON: {error}", hint="fetch the file again") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{file} is not a JSON object", hint=_FOLDER_HINT)
    return data


def write_folder(
    config: LlamaConfig,
    tokenizer_dir: Path | None,
    out: Path,
    dtype: torch.dtype,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Everything of a model folder but the weights; `extra` is added to config.json."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer_dir is not None:
        ids = _write_tokenizer(tokenizer_dir, config, out)
    _write_json(out / CONFIG, hf_config(config, dtype) | ids | dict(extra or {}))
    _write_json(out / "generation_config.json", {"_from_model_config": True, **ids})


def hf_config(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The shape as the fields of `transformers.LlamaConfig`."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": _DTYPE_NAMES.get(dtype, "float32"),
    }


def _parse_config(data: Mapping[str, Any], file: Path) -> LlamaConfig:
    fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in fixed.items():
        if data.get(key, value) != value:
            hint = f"only dense Llamas can be read ({key} {value!r})"
            raise ArtifactError(f"{file}: {key} is {data[key]!r}", hint=hint)
    try:
        heads = data["num_attention_heads"]
        return LlamaConfig(
            dim=data["hidden_size"],
            n_layers=data["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=data.get("num_key_value_heads") or heads,
            head_dim=data.get("head_dim") or data["hidden_size"] // heads,
            ffn_dim=data["intermediate_size"],
            vocab_size=data["vocab_size"],
            context=data["max_position_embeddings"],
            norm_eps=data.get("rms_norm_eps", 1e-6),
            tied=data.get("tie_word_embeddings", False),
            **_parse_rope(data, file),
        )
    except KeyError as error:
        raise ArtifactError(f"{file} has no {error.args[0]!r}", hint=_FOLDER_HINT) from None
    except (TypeError, ZeroDivisionError, ConfigError) as error:
        raise ArtifactError(f"{file} does not describe a Llama: {error}", hint=_FOLDER_HINT) from None


def _parse_rope(data: Mapping[str, Any], file: Path) -> dict[str, Any]:
    settings = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = float(settings.get("rope_theta") or data.get("rope_theta") or 10_000.0)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        hint = "rotary positions can be plain ('default') or Llama 3.1's ('llama3')"
        raise ArtifactError(f"{file}: rotary scaling {kind!r} is not a Llama's", hint=hint)
    scaling = RopeScaling(
        factor=float(settings["factor"]),
        low_freq_factor=float(settings["low_freq_factor"]),
        high_freq_factor=float(settings["high_freq_factor"]),
        original_context=int(settings["original_max_position_embeddings"]),
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _hf_tensors(model: Llama, dtype: torch.dtype) -> dict[str, Pending]:
    head_dim = model.config.head_dim

    def rows(name: str, weight: Tensor) -> Tensor:
        weight = weight.detach().to(dtype)
        return to_hf_rows(weight, head_dim) if is_rotary(name) else weight

    parameters = dict(model.named_parameters())  # a tied output appears once, as the embedding
    return {hf_name(n): (dtype, tuple(w.shape), lambda n=n, w=w: rows(n, w)) for n, w in parameters.items()}


def _weight_file_names(path: Path) -> list[str]:
    if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
        return [WEIGHTS]
    names = read_json(path, INDEX).get("weight_map")
    if not isinstance(names, dict) or any("/" in str(n) for n in names.values()):
        raise ArtifactError(f"{path / INDEX} has no usable weight_map", hint="fetch the file again")
    return sorted(set(names.values()))


def _write_tokenizer(tokenizer_dir: Path, config: LlamaConfig, out: Path) -> dict[str, Any]:
    """Write the tokenizer in both forms; returns the special ids for config.json."""
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} tokens, the model has {config.vocab_size:,}"
        raise ConfigError(
            f"the tokenizer in {tokenizer_dir} has {sizes}", hint="give the tokenizer it was trained with"
        )
    write_ranks(out / MODEL_FILE, tokenizer.ranks)
    write_hugging_face(out, tokenizer, context=config.context)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    artifacts.write_atomic(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
