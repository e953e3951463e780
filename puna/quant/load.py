"""A quantised model back in memory, in one of two forms.

packed      matrices stay integers and are expanded each time they are used (`modules.py`): the memory of the file.
expanded    matrices are expanded once: an ordinary `Llama`, with an ordinary model's memory and speed.

The engine's C++ kernels multiply the integers themselves (`stored.QuantisedFile`). Where PyTorch computes, packed costs an
expansion of all weights for each step. A small model gains nothing from that, so `expand=None` expands what then takes
less than `EXPAND_BELOW` and keeps the rest packed. Both forms compute with the same numbers.
"""

from pathlib import Path

import torch
from torch import nn

from puna.model.checkpoint import empty_model
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.quant.groups import Packed, dequantise_matrix
from puna.quant.modules import QuantEmbedding, QuantLinear, QuantMatrix
from puna.quant.stored import QuantisedFile

EXPAND_BELOW = 1 << 30  # bytes


def load_quantised(path: Path, dtype: torch.dtype = torch.float32, *, expand: bool | None = None) -> Llama:
    """The quantised model in the folder `path`, computing in `dtype`, packed or expanded (see above).

    Raises `ArtifactError` for a folder that is no quantised model, and for missing or damaged tensors.
    """
    with QuantisedFile(path) as file:
        if expand is None:
            expand = file.config.parameters * dtype.itemsize < EXPAND_BELOW
        return _expanded(file, dtype) if expand else _packed(file, dtype)


def _skeleton(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def _expanded(file: QuantisedFile, dtype: torch.dtype) -> Llama:
    model = empty_model(file.config, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stored = file.weight(name)
            weight.copy_(dequantise_matrix(stored, dtype) if isinstance(stored, Packed) else stored)
    return model


def _packed(file: QuantisedFile, dtype: torch.dtype) -> Llama:
    model = _skeleton(file.config)
    for name, _ in list(model.named_parameters()):
        path, _, _ = name.rpartition(".")
        owner, _, last = path.rpartition(".")
        stored = file.weight(name)
        if isinstance(stored, Packed):
            form = QuantEmbedding if name.startswith("tok_embeddings") else QuantLinear
            setattr(model.get_submodule(owner), last, form(QuantMatrix(stored, dtype)))
        else:
            model.get_submodule(path).weight = nn.Parameter(stored.to(dtype), requires_grad=False)
    if file.config.tied:
        embedding = model.tok_embeddings
        if isinstance(embedding, QuantEmbedding):
            model.output = QuantLinear(embedding.matrix)
        else:
            model.output.weight = embedding.weight
    return model
