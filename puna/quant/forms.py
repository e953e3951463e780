"""How each matrix is stored: a *form*, and the configuration that gives every matrix one.

    4/64          4 bits, a scale for each 64 weights
    4/64/offset   likewise, and an offset beside the scale
    16            bfloat16

In a file a matrix is its codes, its scales and perhaps its offsets (`groups.py` says what these are): `part_names`.

A uniform quantisation says `bits`, `group_size` and `embedding_bits`; a mixed one lists `matrices` that differ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from puna.config import require
from puna.errors import ConfigError

UNQUANTISED = 16
NORM_BYTES = 4  # of a weight of a norm, kept as float32


@dataclass(frozen=True)
class Form:
    """Bits of a weight, how many share a scale, and whether there are offsets. Plain bfloat16 is `Form(16)`."""

    bits: int
    group_size: int = 0
    offset: bool = False

    def __str__(self) -> str:
        if self.bits == UNQUANTISED:
            return "16"
        return f"{self.bits}/{self.group_size}" + "/offset" * self.offset

    @classmethod
    def parse(cls, text: str) -> "Form":
        """The form that `str` wrote. Raises `ConfigError`."""
        bits, *rest = text.split("/")
        if text == "16":
            return cls(UNQUANTISED)
        grouped = rest and rest[0].isdecimal() and int(rest[0]) > 0 and rest[1:] in ([], ["offset"])
        require(
            bits in ("4", "6", "8") and grouped, f"{text!r} is not a form of a matrix", hint="4/64, 8/32/offset, or 16"
        )
        return cls(int(bits), int(rest[0]), len(rest) == 2)

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` in this form; vectors (norms) are float32 in any."""
        if len(shape) == 1:
            return NORM_BYTES * shape[0]
        if self.bits == UNQUANTISED:
            return 2 * math.prod(shape)
        rows, columns = shape
        return rows * (code_bytes(columns, self.bits) + (4 if self.offset else 2) * -(-columns // self.group_size))


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How weights become integers (`groups.py`), and how much text is spent on choosing and judging them."""

    bits: Literal[4, 6, 8] = 4
    group_size: int = 32  # weights that share a scale
    embedding_bits: Literal[0, 4, 6, 8, 16] = 8  # of embedding and output; 16: bfloat16; 0: 8, or 6 beside 4 bits
    symmetric: bool = True  # scales alone; false: an offset beside each
    calibrate: bool = False  # correct rounding errors by what a text sample puts into each matrix (`gptq.py`)
    calibration_tokens: int = 131_072
    budget: str = ""  # "4.8GB" or "4.5bpw": choose each matrix's form by its measured sensitivity (`budget.py`)
    sensitivity_tokens: int = 8192  # that sensitivity is measured on
    quality_tokens: int = 16_384  # that the loss is measured on; 0: it is not
    matrices: dict[str, str] = field(default_factory=dict)  # Meta's name -> form, where it is not the one above

    def __post_init__(self) -> None:
        require(self.group_size > 0, f"group_size={self.group_size} must be positive", hint="32, 64 and 128 are usual")
        for name in ("calibration_tokens", "sensitivity_tokens"):
            require(getattr(self, name) > 1, f"{name}={getattr(self, name)} must be above 1")
        require(self.quality_tokens >= 0, f"quality_tokens={self.quality_tokens} must not be negative")
        for form in self.matrices.values():
            Form.parse(form)
        if self.budget:
            parse_budget(self.budget)

    def bits_of(self, name: str) -> int:
        """The bits of the matrix that Meta calls `name`."""
        return self.form_of(name).bits

    def form_of(self, name: str) -> Form:
        """The form of the matrix that Meta calls `name`."""
        if name in self.matrices:
            return Form.parse(self.matrices[name])
        ends = self.embedding_bits or (6 if self.bits == 4 else 8)
        bits = ends if name.startswith(("tok_embeddings", "output")) else self.bits
        return Form(bits) if bits == UNQUANTISED else Form(bits, self.group_size, not self.symmetric)

    def with_forms(self, forms: Mapping[str, Form]) -> "QuantConfig":
        """This configuration with these forms, each listed that is not the uniform one."""
        plain = replace(self, matrices={})
        listed = {name: str(form) for name, form in sorted(forms.items()) if plain.form_of(name) != form}
        return replace(self, matrices=listed)


def parse_budget(text: str) -> tuple[float, Literal["bytes", "bpw"]]:
    """`4.8GB` as (4.8e9, "bytes"), `4.5bpw` (bits per weight) as (4.5, "bpw"). Raises `ConfigError`."""
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "bpw": 1.0}
    number, unit = text.strip(), ""
    while number and not number[-1].isdecimal():
        number, unit = number[:-1], number[-1] + unit
    unit = unit.strip().lower()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if value <= 0 or not math.isfinite(value) or unit not in units:
        hint = f"a number and one of {', '.join(units)}: 4.8GB, 4.5bpw"
        raise ConfigError(f"the budget {text!r} is not a size", hint=hint)
    return value * units[unit], "bpw" if unit == "bpw" else "bytes"


def packed_shapes(rows: int, columns: int, bits: int, group_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of codes and scales for a matrix."""
    return (rows, code_bytes(columns, bits)), (rows, -(-columns // group_size))


def code_bytes(columns: int, bits: int) -> int:
    """What the codes of a row take."""
    return columns if bits == 8 else -(-columns // 16) * 12 if bits == 6 else -(-columns // 2)


def part_names(name: str, form: Form) -> tuple[str, ...]:
    """The names of the tensors that stand for the matrix `name` in `form`."""
    if form.bits == UNQUANTISED:
        return (name,)
    stem = name.removesuffix("weight")
    return (stem + "codes", stem + "scales", stem + "offsets")[: 3 if form.offset else 2]


def part_shapes(name: str, shape: tuple[int, ...], form: Form) -> dict[str, tuple[int, ...]]:
    """Those tensors' shapes; a vector is stored as it is."""
    if len(shape) == 1 or form.bits == UNQUANTISED:
        return {name: shape}
    codes, scales = packed_shapes(*shape, form.bits, form.group_size)
    return dict(zip(part_names(name, form), (codes, scales, scales)))
