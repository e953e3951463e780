"""A model into one GGUF file, tensor by tensor.

    kind     matrices                                             embedding and output   bits per weight of an 8B
    F32, F16, BF16                                                the same               32, 16, 16
    Q8_0     Q8_0                                                 Q8_0                   8.5
    Q4_0     Q4_0                                                 Q6_K                   4.8
    Q4_K_M   Q4_K, and Q6_K where it helps most: the values       Q6_K                   5.0
             and the way down in half of the layers

Norms are always float32. A row that is no multiple of a type's block (256 weights for the K types, 32 for the others)
takes the next type that fits. The settings are what llama.cpp asks for; the rotary divisors of Llama 3.1 are stored as
the tensor `rope_freqs.weight`. Equal models give equal bytes.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import ConfigError, DataError
from puna.model.gguf import blocks
from puna.model.gguf.blocks import BlockType
from puna.model.gguf.format import Pending, write_container
from puna.model.gguf.llama import ROPE_FREQS, SCALING, frequency_divisors, gguf_name
from puna.model.gguf.quantise import encode, encode_measured
from puna.model.gguf.vocabulary import Vocabulary, from_tokenizer
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.model.stored import StoredModel, weights_of
from puna.tokenizer.bpe import Tokenizer

# kind -> (its number in `general.file_type`, the type of most matrices, of embedding and output)
KINDS: dict[str, tuple[int, BlockType, BlockType]] = {
    "F32": (0, blocks.F32, blocks.F32),
    "F16": (1, blocks.F16, blocks.F16),
    "BF16": (32, blocks.BF16, blocks.BF16),
    "Q8_0": (7, blocks.Q8_0, blocks.Q8_0),
    "Q4_0": (2, blocks.Q4_0, blocks.Q6_K),
    "Q4_K_M": (15, blocks.Q4_K, blocks.Q6_K),
}
_NEXT = {blocks.Q4_K: blocks.Q4_0, blocks.Q6_K: blocks.Q8_0, blocks.Q4_0: blocks.F16, blocks.Q8_0: blocks.F16}
_PIECE_WEIGHTS = 1 << 20  # quantised at a time
_LARGEST_HALF = 65504.0


def write_gguf(model: Llama | StoredModel, tokenizer: Tokenizer | Vocabulary | None, out: Path, kind: str) -> None:
    """Write `model` to the file `out` as `kind`, one of `KINDS`. Needs some tens of megabytes beside it.

    The tokenizer is ours, or a vocabulary as GGUF has it; without one the file holds weights and shape only. Raises
    `ConfigError` for an unknown kind or a tokenizer that does not fit the model, `DataError` for weights that are not
    finite or do not fit the kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is not a kind of GGUF file written here", hint=f"give one of {', '.join(KINDS)}")
    out = Path(out)
    settings = settings_of(model.config, KINDS[kind][0], out.stem) | _vocabulary(tokenizer, model.config).settings()
    tensors = {}
    for name, weight in weights_of(model).items():
        chosen = _type_of(name, weight.shape, kind, model.config)
        tensors[gguf_name(name)] = Pending(chosen, weight.shape, _encoded(name, weight.pieces, chosen))
    if model.config.rope_scaling is not None:
        divisors = frequency_divisors(model.config)
        tensors[ROPE_FREQS] = Pending(blocks.F32, tuple(divisors.shape), [encode(divisors, blocks.F32)])
    write_container(out, settings, tensors)


def _vocabulary(tokenizer: Tokenizer | Vocabulary | None, config: LlamaConfig) -> Vocabulary:
    if tokenizer is None:
        return Vocabulary(model="no_vocab")
    if isinstance(tokenizer, Tokenizer):
        return from_tokenizer(tokenizer, config.vocab_size)
    if len(tokenizer.tokens) != config.vocab_size:
        message = f"the vocabulary has {len(tokenizer.tokens):,} tokens, the model {config.vocab_size:,}"
        raise ConfigError(message, hint="give the vocabulary it was trained with, filled up to the model's size")
    return tokenizer


def settings_of(config: LlamaConfig, file_type: int, name: str) -> dict[str, Any]:
    llama = {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    general = {
        "architecture": "llama",
        "type": "model",
        "name": name,
        "file_type": file_type,
        "quantization_version": 2,
    }
    scaling = {} if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
    return (
        {f"general.{key}": value for key, value in general.items()}
        | {f"llama.{key}": value for key, value in llama.items()}
        | {f"{SCALING}.{key}": value for key, value in scaling.items()}
    )


def _type_of(name: str, shape: tuple[int, ...], kind: str, config: LlamaConfig) -> BlockType:
    """The type of a tensor, by Meta's name."""
    if len(shape) == 1:
        return blocks.F32
    _, chosen, outside = KINDS[kind]
    if not name.startswith("layers."):
        chosen = outside
    elif kind == "Q4_K_M" and ("attention.wv" in name or "feed_forward.w2" in name):
        chosen = blocks.Q6_K if _helps(int(name.split(".")[1]), config.n_layers) else chosen
    while shape[1] % chosen.weights:
        chosen = _NEXT[chosen]
    return chosen


def _helps(layer: int, layers: int) -> bool:
    """Whether more bits in this layer pay: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _encoded(name: str, pieces: Callable[[], Iterator[Tensor]], kind: BlockType) -> Iterator[Tensor]:
    """A tensor's blocks, a piece at a time."""
    most = torch.finfo(torch.float32).max if kind in (blocks.F32, blocks.BF16) else _LARGEST_HALF
    for rows in pieces():
        for piece in rows.split(max(1, _PIECE_WEIGHTS // rows[0].numel())):
            made, largest = encode_measured(piece.to("cpu"), kind)
            if not largest <= most:
                hint = "look at how the model was trained, or write BF16 if its weights are as large as they should be"
                raise DataError(f"{name} has a weight that {kind.name} cannot hold: at most {most:,.0f}", hint=hint)
            yield made
