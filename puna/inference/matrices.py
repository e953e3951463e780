"""The model's matrices as the GPU runner multiplies by them: neighbours joined, each kind by its own kernel.

Matrices that read the same vector (wq, wk, wv; w1, w3) become one: fewer, larger products. Nothing is held twice: the
modules they came from keep views into the joined one, so the model goes on working.

    Dense     weights as they are
    Grouped   integers with a scale per group, from a quantised checkpoint
    Fp8       8-bit floating-point weights with a scale per row, made here from dense ones
    Apart     neighbours of different kinds, one after the other
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puna.kernels.fp8_linear import fp8_linear, quantise_rows
from puna.kernels.linear import linear
from puna.kernels.quant_linear import quant_linear
from puna.quant.modules import QuantLinear

_FP8_COLUMNS = 128  # the kernels take whole pieces of so many


class Dense:
    """x W^T."""

    def __init__(self, modules: Sequence[nn.Linear]):
        self.weight = modules[0].weight.data
        if len(modules) > 1:
            self.weight = torch.cat([module.weight.data for module in modules])
            for module, rows in zip(modules, self.weight.split([len(m.weight) for m in modules])):
                module.weight = nn.Parameter(rows, requires_grad=False)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Fp8:
    """x W^T with W rounded to 8-bit floating-point numbers."""

    def __init__(self, modules: Sequence[nn.Linear]):
        parts = [quantise_rows(module.weight.data) for module in modules]
        self.codes, self.scales = (torch.cat(tensors) for tensors in zip(*parts))

    def __call__(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.codes, self.scales)


class Grouped:
    """x W^T with W in integers."""

    def __init__(self, modules: Sequence[QuantLinear]):
        matrices = [module.matrix for module in modules]
        for matrix in matrices:
            matrix.widen()
        self.group = matrices[0].form[2]
        self._joined: dict[str, Tensor] = {}
        for name, first in matrices[0].named_buffers():
            tensors = [matrix.get_buffer(name) for matrix in matrices]
            whole = first if len(tensors) == 1 else torch.cat(tensors)
            for matrix, rows in zip(matrices, whole.split([len(t) for t in tensors])):
                setattr(matrix, name, rows)
            self._joined[name] = whole

    def __call__(self, x: Tensor) -> Tensor:
        parts = self._joined
        return quant_linear(x, parts["codes"], parts["scales"], parts.get("offsets"), self.group)


class Apart:
    """Several, side by side."""

    def __init__(self, matrices: Sequence[Dense | Grouped | Fp8]):
        self.matrices = matrices

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([matrix(x) for matrix in self.matrices], -1)


Matrix = Dense | Fp8 | Grouped | Apart


def joined(modules: Sequence[nn.Module], *, fp8: bool = False) -> Matrix:
    """One matrix for `modules`, `nn.Linear` or `QuantLinear`, one below the other; `fp8` rounds dense ones."""
    kinds = {_kind(module) for module in modules}
    if len(kinds) > 1:
        return Apart([joined([module], fp8=fp8) for module in modules])
    if isinstance(modules[0], QuantLinear):
        return Grouped(modules)
    return (Fp8 if fp8 and modules[0].weight.shape[1] % _FP8_COLUMNS == 0 else Dense)(modules)


def _kind(module: nn.Module) -> tuple:
    if isinstance(module, QuantLinear):
        return (*module.matrix.form, *(name for name, _ in module.matrix.named_buffers()))
    return ("dense", module.weight.dtype)


def rows_of(module: nn.Module) -> int:
    """How many numbers the matrix of `module` makes."""
    return len(module.matrix.codes if isinstance(module, QuantLinear) else module.weight)
