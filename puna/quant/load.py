"""A quantised model back in memory, in one of two forms.

packed      matrices stay integers and are expanded each time they are used (`modules.py`): the memory of the file.
expanded    matrices are expanded once: an ordinary `Llama`, with an ordinary model's memory and speed.

The engine's C++ kernels multiply the integers themselves (`QuantisedFile`). Where PyTorch computes, packed costs an
expansion of all weights for each step. A small model gains nothing from that, so `expand=None` expands what then takes
less than `EXPAND_BELOW` and keeps the rest packed. Both forms compute with the same numbers.
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
from puna.model.tensorfile import NAMES
from puna.quant.forms import UNQUANTISED, Form, QuantConfig
from puna.quant.groups import Packed, code_dtype, dequantise_matrix
from puna.quant.modules import QuantEmbedding, QuantLinear, QuantMatrix
from puna.quant.parts import part_names, part_shapes

EXPAND_BELOW = 1 << 30  # bytes
NUMBERS = Form(bits=UNQUANTISED)


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
    with QuantisedFile(path) as file:
        if expand is None:
            expand = file.config.parameters * dtype.itemsize < EXPAND_BELOW
        return _expanded(file, dtype) if expand else _packed(file, dtype)


class QuantisedFile:
    """The weights of a quantised folder under Meta's names and in Meta's row order. Use as a context.

    Raises `ArtifactError` for a folder that is no quantised model, and for missing or damaged tensors.
    """

    def __init__(self, path: Path):
        self.config, self.quant = load_config(path), load_quant_config(path)
        self._widths = {name: shape[-1] for name, shape in self.config.shapes().items()}
        self.files = WeightFiles(path)
        try:
            self.files.expect_depth(self.config)
            self.files.expect(_shapes(self.config, self.quant))
        except BaseException:
            self.files.__exit__()
            raise

    def __enter__(self) -> "QuantisedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.__exit__()

    def parts(self, name: str) -> tuple[Form, tuple[str, ...]]:
        """How a matrix is stored, and the tensors in `files` that stand for it: codes, scales and perhaps offsets.

        A norm, or a matrix that was not quantised, is one tensor of numbers.
        """
        form = NUMBERS if name.endswith("norm.weight") else self.quant.form_of(name)
        names = part_names(hf_name(name), form)
        if form.bits != UNQUANTISED:
            wanted = [NAMES[code_dtype(form.bits)], *["F16"] * (len(names) - 1)]
            found = [self.files.form(part) for part in names]
            if found != wanted:
                what = f"{self.files.path}: {hf_name(name)} is stored as {' and '.join(found)}"
                raise ArtifactError(what, hint="config.json and the weights do not belong together")
        return form, names

    def weight(self, name: str) -> Tensor | Packed:
        """A norm, a matrix that was not quantised, or the codes of one that was."""
        form, names = self.parts(name)
        first, *rest = (self._ordered(name, self.files.read(part)) for part in names)
        if form.bits == UNQUANTISED:
            return first
        scales, offsets = rest[0], rest[1] if len(rest) > 1 else None
        return Packed(first, scales, self._widths[name], form.bits, form.group_size, offsets)

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
