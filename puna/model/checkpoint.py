"""A checkpoint: a folder that is ours and Hugging Face's at once.

    model.safetensors        the weights under Hugging Face's names (`convert.py`)
    config.json              the shape, as `LlamaForCausalLM` reads it
    generation_config.json   which tokens end a text
    tokenizer.model          ranks, as tiktoken reads them
    tokenizer.json, tokenizer_config.json, special_tokens_map.json

What `transformers`, vLLM or llama.cpp's converter read is what we read ourselves: there is no second format that could
disagree. `folder.py` reads what a folder says of its model. Rotary settings are written the way the released Llamas have
them (`rope_theta` beside `rope_scaling`). Saving the same weights gives the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import artifacts
from puna.errors import ArtifactError, ConfigError, PunaError
from puna.model.convert import hf_name, is_rotary, to_hf_rows, to_meta_rows
from puna.model.dtypes import NAMES
from puna.model.folder import CONFIG, QUANTISED, WEIGHTS, WeightFiles, load_config, read_json
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.model.stored import StoredModel, Weight, weights_of
from puna.model.tensorwriter import Pending, write_tensors
from puna.model.weights import Weights
from puna.tokenizer.carry import carry
from puna.tokenizer.load import AnyTokenizer, load_tokenizer

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def save_model(
    model: Llama | StoredModel,
    tokenizer: Path | AnyTokenizer | None,
    out: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `model` into the folder `out`, in `dtype` (the model's own by default).

    The tokenizer is that of the folder `tokenizer`, or itself one; with None the folder has weights and shape only.
    """
    dtype = dtype or (model.dtype if isinstance(model, StoredModel) else model.norm.weight.dtype)
    write_folder(model.config, tokenizer, out, dtype)
    write_tensors(out / WEIGHTS, _hf_tensors(model, dtype), {"format": "pt"})


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model in the folder `path`, its weights in `dtype`, on the CPU.

    Files of an artifact are checked against its manifest first. Needs the model's memory and a few megabytes more.
    Raises `ArtifactError` for a folder that is no model, and for missing, unexpected, misshapen or damaged tensors.
    """
    if QUANTISED in read_json(path, CONFIG):
        raise ArtifactError(f"{path} holds a quantised model", hint="load it with puna.quant.load_quantised")
    config = load_config(path)
    with WeightFiles(path) as files:
        files.expect_llama(config)  # before memory is asked for
        model = empty_model(config, dtype)
        fill(model, files)
    return model


def empty_model(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """A model whose weights are allocated and hold nothing yet. Raises `PunaError` where there is no memory for it."""
    with torch.device("meta"):
        model = Llama(config)
    try:
        model = model.to(dtype).to_empty(device="cpu")
    except (RuntimeError, MemoryError):
        size = f"{config.parameters:,} parameters, {config.parameters * dtype.itemsize / 1e9:,.1f} GB"
        hint = "puna inspect says what it takes in other formats"
        raise PunaError(f"there is no memory for a model of {size}", hint=hint) from None
    if config.tied:
        model.output.weight = model.tok_embeddings.weight
    return model


def fill(model: Llama, files: Weights) -> None:
    """Give `model` the weights of `files`, converting type and rotary order on the way.

    Those that need no change are not copied: the model has the file's pages, and its own of what it writes to. So its
    files must not be changed in place while it lives; ours are replaced, never rewritten.
    """
    wanted = {hf_name(name): (name, weight) for name, weight in model.named_parameters()}
    files.expect({name: tuple(weight.shape) for name, (_, weight) in wanted.items()})
    with torch.no_grad():
        for theirs, (ours, weight) in wanted.items():
            same = isinstance(files, WeightFiles) and not is_rotary(ours) and files.form(theirs) == NAMES[weight.dtype]
            if same and (pages := files.mapped(theirs)) is not None:
                weight.data = pages
                continue
            head_dim = model.config.head_dim if is_rotary(ours) else 1
            for start, piece in files.pieces(theirs, head_dim):
                piece = to_meta_rows(piece, head_dim) if is_rotary(ours) else piece
                weight[start : start + len(piece)].copy_(piece)


def write_folder(
    config: LlamaConfig,
    tokenizer: Path | AnyTokenizer | None,
    out: Path,
    dtype: torch.dtype,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Everything of a model folder but the weights; `extra` is added to config.json."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        ids = _write_tokenizer(tokenizer, config, out)
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


def _hf_tensors(model: Llama | StoredModel, dtype: torch.dtype) -> dict[str, Pending]:
    head_dim = model.config.head_dim

    def rows(name: str, weight: Weight) -> Tensor:
        whole = weight.whole(dtype)
        return to_hf_rows(whole, head_dim) if is_rotary(name) else whole

    weights = weights_of(model)
    return {hf_name(n): (dtype, w.shape, lambda n=n, w=w: rows(n, w)) for n, w in weights.items()}


def _write_tokenizer(source: Path | AnyTokenizer, config: LlamaConfig, out: Path) -> dict[str, Any]:
    """Write the tokenizer, with the ids of its source; returns the special ids for config.json."""
    tokenizer = load_tokenizer(source) if isinstance(source, Path) else source
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size:,} tokens, the model has {config.vocab_size:,}"
        whose = f"the tokenizer in {source}" if isinstance(source, Path) else "the tokenizer"
        raise ConfigError(f"{whose} has {sizes}", hint="give the tokenizer it was trained with")
    carry(source, out, context=config.context)
    pad = None if tokenizer.pad == tokenizer.eos else tokenizer.pad
    return {"bos_token_id": tokenizer.bos, "eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": pad}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    artifacts.write_atomic(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
