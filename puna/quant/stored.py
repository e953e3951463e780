"""The folder of a quantised model, open: what it holds, and in which form. `load.py` makes a model in PyTorch of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from puna.config import from_json
from puna.errors import ArtifactError, ConfigError
from puna.model.convert import hf_name, is_rotary, to_meta_rows
from puna.model.folder import CONFIG, QUANTISED, WeightFiles, load_config, read_json
from puna.quant.forms import UNQUANTISED, Form, QuantConfig, part_names, part_shapes
from puna.quant.layout import can_be_laid, is_split, laid_name, laid_shape, unlay

if TYPE_CHECKING:
    from torch import Tensor

    from puna.quant.groups import Packed

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


class QuantisedFile:
    """The weights of a quantised folder under Meta's names and in Meta's row order. Use as a context.

    Raises `ArtifactError` for a folder that is no quantised model, and for missing or damaged tensors.
    """

    def __init__(self, path: Path):
        self.config, self.quant = load_config(path), load_quant_config(path)
        self._shapes = self.config.shapes()
        self.files = WeightFiles(path)
        try:
            self.files.expect_depth(self.config)
            self.files.expect(self._expected())
        except BaseException:
            self.files.__exit__()
            raise

    def __enter__(self) -> "QuantisedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.__exit__()

    def laid(self, name: str) -> str | None:
        """The tensor that holds the matrix `name` as the kernels read it; None if there is none, and `parts` has it."""
        tensor = laid_name(hf_name(name))
        if tensor not in self.files.names:
            return None
        if self.files.form(tensor) != "U8":
            what = f"{self.files.path}: {tensor} is stored as {self.files.form(tensor)}"
            raise ArtifactError(what, hint="its bytes are of type U8: quantise again")
        return tensor

    def split(self, name: str) -> bool:
        """Whether the halves of its codes lie apart, if it is laid out."""
        return is_split(name, self.quant.form_of(name), self.config.tied)

    def parts(self, name: str) -> tuple[Form, tuple[str, ...]]:
        """How a matrix is stored, and the tensors in `files` that stand for it: codes, scales and perhaps offsets.

        A norm, or a matrix that was not quantised, is one tensor of numbers.
        """
        form = NUMBERS if name.endswith("norm.weight") else self.quant.form_of(name)
        names = part_names(hf_name(name), form)
        if form.bits != UNQUANTISED:
            wanted = ["I8" if form.bits == 8 else "U8", *["F16"] * (len(names) - 1)]
            found = [self.files.form(part) for part in names]
            if found != wanted:
                what = f"{self.files.path}: {hf_name(name)} is stored as {' and '.join(found)}"
                raise ArtifactError(what, hint="config.json and the weights do not belong together")
        return form, names

    def weight(self, name: str) -> "Tensor | Packed":
        """A norm, a matrix that was not quantised, or the codes of one that was."""
        from puna.quant.groups import Packed

        if (tensor := self.laid(name)) is not None:
            form, laid = self.quant.form_of(name), self.files.read(tensor)
            return unlay(laid, self._shapes[name], form, split=self.split(name))
        form, names = self.parts(name)
        first, *rest = (self._ordered(name, self.files.read(part)) for part in names)
        if form.bits == UNQUANTISED:
            return first
        scales, offsets = rest[0], rest[1] if len(rest) > 1 else None
        return Packed(first, scales, self._shapes[name][1], form.bits, form.group_size, offsets)

    def _ordered(self, name: str, rows: "Tensor") -> "Tensor":
        return to_meta_rows(rows, self.config.head_dim) if is_rotary(name) else rows

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """What the file must hold: of each matrix what it begins to hold."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes.items():
            theirs, form = hf_name(name), self.quant.form_of(name)
            if laid_name(theirs) in self.files.names and can_be_laid(shape, form):
                shapes[laid_name(theirs)] = laid_shape(shape, form)
            else:
                shapes.update(part_shapes(theirs, shape, form))
        return shapes
