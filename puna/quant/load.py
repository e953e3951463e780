"""A quantised model back in memory, in one of two forms.

packed      matrices stay integers and are expanded each time they are used (`modules.py`): the memory of the file.
expanded    matrices are expanded once: an ordinary `Llama`, with an ordinary model's memory and speed.

Without kernels that multiply integers directly, packed costs an expansion of all weights for each step. A small model
gains nothing from that, so `expand=None` expands what then takes less than `EXPAND_BELOW` and keeps the rest packed.
Both forms compute with the same numbers.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from puna.config import from_json
from puna.errors import ArtifactError, ConfigError
from puna.model.checkpoint import CONFIG, QUANTISED, WeightFiles, empty_model, load_config, read_json
from puna.model.convert import hf_name, is_rotary, to_meta_rows
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.quant.forms import UNQUANTISED, QuantConfig
from puna.quant.groups import Packed, code_dtype, dequantise_matrix
from puna.quant.modules import QuantEmbedding, QuantLinear, QuantMatrix
from puna.quant.parts import part_names, part_shapes

EXPAND_BELOW = 1 << 30  # bytes


def is_quantised(path: Path) -> bool:
    """Whether the model folder `path` holds a quantised model. Raises `ArtifactError` if it holds none at all."""
    return QUANTISED in read_json(path, CONFIG)


def load_quant_config(path: Path) -> QuantConfig:
    """How the model in the folder `path` was quantised. Raises `ArtifactError` if it was not."""
    data = read_json(path, CONFIG).get(QUANTISED)
    if data is None:
        raise ArtifactError(f"{path} is not a quantised model", hint="load it with puna.model.checkpoint.load_model")
    try:
        return from_json(QuantConfig, data)
    except ConfigError as error:
        raise ArtifactError(
            f"{path / CONFIG}: {error.message}", hint="made by another version? Quantise again"
        ) from None


def load_quantised(path: Path, dtype: torch.dtype = torch.float32, *, expand: bool | None = None) -> Llama:
    """The quantised model in the folder `path`, computing in `dtype`, packed or expanded (see above).

    Raises `ArtifactError` for a folder that is no quantised model, and for missing or damaged tensors.
    """
    config, quant = load_config(path), load_quant_config(path)
    if expand is None:
        expand = config.parameters * dtype.itemsize < EXPAND_BELOW
    with WeightFiles(path) as files:
        files.expect_depth(config)
        files.expect(_shapes(config, quant))
        source = _Source(files, config, quant)
        return _expanded(source, dtype) if expand else _packed(source, dtype)


class _Source:
    """The stored tensors under Meta's names and in Meta's row order."""

    def __init__(self, files: WeightFiles, config: LlamaConfig, quant: QuantConfig):
        self.files, self.config, self.quant = files, config, quant

    def plain(self, name: str) -> Tensor:
        return self._ordered(name, self.files.read(hf_name(name)))

    def packed(self, name: str, columns: int) -> Packed:
        form = self.quant.form_of(name)
        parts = (self._ordered(name, self.files.read(part)) for part in part_names(hf_name(name), form))
        codes, scales, *offsets = parts
        if codes.dtype != code_dtype(form.bits) or any(t.dtype != torch.float16 for t in (scales, *offsets)):
            found = f"{self.files.path}: {hf_name(name)} is stored as {codes.dtype} with {scales.dtype}"
            raise ArtifactError(found, hint="config.json and the weights do not belong together")
        return Packed(codes, scales, columns, form.bits, form.group_size, offsets[0] if offsets else None)

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        return to_meta_rows(rows, self.config.head_dim) if is_rotary(name) else rows


def _shapes(config: LlamaConfig, quant: QuantConfig) -> dict[str, tuple[int, ...]]:
    """What the file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in config.shapes().items():
        shapes.update(part_shapes(hf_name(name), shape, quant.form_of(name)))
    return shapes


def _skeleton(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def _expanded(source: _Source, dtype: torch.dtype) -> Llama:
    model = empty_model(source.config, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 or source.quant.bits_of(name) == UNQUANTISED:
                weight.copy_(source.plain(name))
            else:
                weight.copy_(dequantise_matrix(source.packed(name, weight.shape[1]), dtype))
    return model


def _packed(source: _Source, dtype: torch.dtype) -> Llama:
    model = _skeleton(source.config)
    for name, weight in list(model.named_parameters()):
        path, _, _ = name.rpartition(".")
        owner, _, last = path.rpartition(".")
        if weight.ndim == 1 or source.quant.bits_of(name) == UNQUANTISED:
            weight = nn.Parameter(source.plain(name).to(dtype), requires_grad=False)
            model.get_submodule(path).weight = weight
        else:
            matrix = QuantMatrix(source.packed(name, weight.shape[1]), dtype)
            form = QuantEmbedding if name.startswith("tok_embeddings") else QuantLinear
            setattr(model.get_submodule(owner), last, form(matrix))
    if source.config.tied:
        embedding = model.tok_embeddings
        if isinstance(embedding, QuantEmbedding):
            model.output = QuantLinear(embedding.matrix)
        else:
            model.output.weight = embedding.weight
    return model
