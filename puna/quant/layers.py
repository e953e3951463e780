"""A model of any size, run over a text sample one layer at a time.

The whole sample is carried through a layer before the next is read, so that memory is one layer and the sample's hidden
states, whatever the model. A *reader* gives tensors by Meta's names, in Meta's row order, as float32:

    Stored(weights, config)    those of a checkpoint
    parts.Written(...)         the same as far as they are quantised already
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.convert import hf_name, is_rotary, to_meta_rows
from puna.model.llama import Block, attend_with, rope_rotation
from puna.model.sizes import LlamaConfig
from puna.model.weights import Weights

EMBEDDING, NORM, OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"
TOKENS_AT_ONCE = 2048  # of the sample, through a layer: bounds the activations
_LOGITS_AT_ONCE = 1 << 24


class Reader(Protocol):
    """Tensors by Meta's names."""

    def __call__(self, name: str) -> Tensor: ...


class Stored:
    """The tensors of a checkpoint."""

    def __init__(self, weights: Weights, config: LlamaConfig):
        self.weights, self.config = weights, config

    def __call__(self, name: str) -> Tensor:
        tensor = self.weights.read(hf_name(name)).float()
        return to_meta_rows(tensor, self.config.head_dim) if is_rotary(name) else tensor


def output_name(config: LlamaConfig) -> str:
    """The tensor that makes logits."""
    return EMBEDDING if config.tied else OUTPUT


def matrices_of(block: Block, index: int) -> dict[str, nn.Linear]:
    """A layer's matrices by Meta's names."""
    return {f"layers.{index}.{n}.weight": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def block_of(reader: Reader, config: LlamaConfig, index: int) -> Block:
    """Layer `index` with its weights."""
    with torch.device("meta"):
        block = Block(config, index)
    for name, _ in list(block.named_parameters()):
        path, _, leaf = name.rpartition(".")
        weight = nn.Parameter(reader(f"layers.{index}.{name}"), requires_grad=False)
        setattr(block.get_submodule(path), leaf, weight)
    block.attention.index = 0  # its own cache, if it had one: there is none here
    return block


def embed(reader: Reader, tokens: Tensor) -> Tensor:
    """The hidden states (N, T, D) before the first layer."""
    return F.embedding(tokens, reader(EMBEDDING))


def batches(count: int, length: int) -> Iterator[slice]:
    """Rows of the sample that go through a layer together."""
    step = max(1, TOKENS_AT_ONCE // length)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rotation_of(config: LlamaConfig, length: int) -> Tensor:
    """The rotation of positions 0 ... length - 1, for any number of rows."""
    return rope_rotation(config, torch.arange(length)[None])


@torch.no_grad()
def through(block: Block, hidden: Tensor, rotation: Tensor) -> None:
    """Carry the sample through a layer, in place."""
    for rows in batches(*hidden.shape[:2]):
        hidden[rows] = block(hidden[rows], rotation, attend_with(None))


def normalised(reader: Reader, config: LlamaConfig, hidden: Tensor) -> Tensor:
    """What the output matrix is multiplied with."""
    return F.rms_norm(hidden, (config.dim,), reader(NORM), config.norm_eps)


def positions_at_once(config: LlamaConfig) -> int:
    """How many positions' logits are held at a time."""
    return max(1, _LOGITS_AT_ONCE // config.vocab_size)
