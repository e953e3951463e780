"""The shared library of the C++ kernels: which functions it has, whether it can be used, and how one is called.

It is built when the package is installed, if there is a C++ compiler. Without it `available()` is False and `why_not()`
says what is missing; whoever needs speed then takes PyTorch's operations, at PyTorch's speed.

The best instruction set that the processor has is chosen at run time. PUNA_INSTRUCTIONS names another ("AVX2", "plain
C++"), to compare or to look for a fault.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from puna.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray | Tensor

PLAIN = "plain C++"  # the instruction set of any processor
FILE = Path(__file__).with_name("libpuna.so")

_FILL = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int, c_int64)
_VERSION = 9  # of functions and layouts: `puna_version` in interface.cpp, changed together
_SIGNATURES = {
    "puna_version": (c_int, ()),
    "puna_layout": (c_int, ()),
    "puna_instructions": (c_char_p, ()),
    "puna_choose": (c_int, (c_char_p,)),
    "puna_team": (c_void_p, (c_int,)),
    "puna_team_free": (None, (c_void_p,)),
    "puna_matrix": (c_void_p, (c_int, c_int, c_int, c_int64, c_int64, c_int64)),
    "puna_matrix_laid": (c_void_p, (c_int, c_int, c_int64, c_int64, c_int64, c_int, c_int64)),
    "puna_matrix_free": (None, (c_void_p,)),
    "puna_matrix_bytes": (c_int64, (c_void_p,)),
    "puna_matrix_floats": (c_int, (*_FILL, c_void_p, c_int)),
    "puna_matrix_codes": (c_int, (*_FILL, c_void_p)),
    "puna_matrix_scales": (c_int, (*_FILL, c_void_p, c_int)),
    "puna_matrix_blocks": (c_int, _FILL),
    "puna_embed": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "puna_multiply": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "puna_rms_norm": (None, (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p)),
    "puna_rotate": (None, (c_void_p, c_void_p, c_int64, c_int64)),
    "puna_gate": (None, (c_void_p, c_void_p, c_int64)),
    "puna_top": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p)),
    "puna_encode": (c_float, (c_void_p, c_int, c_void_p, c_int, c_int64, c_void_p)),
    "puna_cache": (c_void_p, (c_int, c_int64, c_int64, c_int64, c_int64)),
    "puna_cache_free": (None, (c_void_p,)),
    "puna_cache_forget": (None, (c_void_p,)),
    "puna_cache_block_bytes": (c_int64, (c_void_p,)),
    "puna_cache_copy": (None, (c_void_p, c_int64, c_int64)),
    "puna_cache_write": (None, (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "puna_attend": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "puna_model": (c_void_p, (c_void_p, c_float, c_void_p, c_int)),
    "puna_model_free": (None, (c_void_p,)),
    "puna_model_team": (c_void_p, (c_void_p,)),
    "puna_model_layer": (None, (c_void_p, c_int64, POINTER(c_void_p), c_void_p, c_void_p)),
    "puna_model_ends": (None, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "puna_model_adapter": (c_int64, (c_void_p,)),
    "puna_model_adapt": (None, (c_void_p, c_int64, c_int64, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p)),
    "puna_forward": (None, (c_void_p, c_void_p, c_int64, *(c_void_p,) * 9, c_int)),
    "puna_train_norm": (None, (c_int, *(c_int64,) * 2, *(c_void_p,) * 3, c_float, *(c_void_p,) * 3)),
    "puna_train_norm_back": (None, (c_int, *(c_int64,) * 2, *(c_void_p,) * 7)),
    "puna_train_split": (None, (c_int, *(c_int64,) * 5, *(c_void_p,) * 3, c_float, *(c_void_p,) * 3)),
    "puna_train_join": (None, (c_int, *(c_int64,) * 5, *(c_void_p,) * 5, c_float, c_void_p)),
    "puna_train_heads": (None, (c_int, *(c_int64,) * 4, c_void_p, c_int, c_void_p)),
    "puna_train_softmax": (None, (c_int, *(c_int64,) * 5, *(c_void_p,) * 3)),
    "puna_train_swiglu": (None, (c_int, *(c_int64,) * 2, *(c_void_p,) * 2)),
    "puna_train_swiglu_back": (None, (c_int, *(c_int64,) * 2, *(c_void_p,) * 2)),
    "puna_train_loss": (None, (c_int, *(c_int64,) * 2, *(c_void_p,) * 3, c_int, c_void_p)),
    "puna_train_pack": (None, (c_int, c_void_p, *(c_int64,) * 4, *(c_void_p,) * 2)),
    "puna_train_product": (None, (c_int, *(c_int64,) * 3, *(c_void_p,) * 3)),
    "puna_train_product_swiglu": (None, (c_int, *(c_int64,) * 3, *(c_void_p,) * 4)),
    "puna_train_product_swiglu_back": (None, (c_int, *(c_int64,) * 3, *(c_void_p,) * 3)),
    "puna_train_product_norm": (None, (c_int, *(c_int64,) * 3, *(c_void_p,) * 4, c_float, *(c_void_p,) * 3)),
    "puna_train_product_norm_back": (None, (c_int, *(c_int64,) * 3, *(c_void_p,) * 8)),
    "puna_train_outer": (None, (c_int, *(c_int64,) * 3, *(c_void_p,) * 2, c_int, c_void_p)),
    "puna_train_attend": (None, (c_int, *(c_int64,) * 5, *(c_void_p,) * 4, c_float, *(c_void_p,) * 4)),
}


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if sys.byteorder != "little":
        return "the kernels are written for little-endian processors"
    if not FILE.is_file():
        return "they were not built: install the package again with a C++ compiler (g++ or clang++) on the machine"
    try:
        library = ctypes.CDLL(str(FILE))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{FILE.name} cannot be used ({error}): install the package again"
    if (version := library.puna_version()) != _VERSION:
        return f"{FILE.name} is of version {version}, not {_VERSION}: install the package again"
    if (wanted := os.environ.get("PUNA_INSTRUCTIONS")) and not library.puna_choose(wanted.encode()):
        names = ", ".join(library.puna_instructions().decode().split("\n")[1:])
        raise ConfigError(f"PUNA_INSTRUCTIONS={wanted!r} cannot run on this processor", hint=f"it has: {names}")
    return library


def available() -> bool:
    """Whether the kernels can be used here."""
    return why_not() is None


def why_not() -> str | None:
    """What keeps the kernels from being used; None if nothing does. Raises `ConfigError` for a wrong PUNA_INSTRUCTIONS."""
    found = _library()
    return found if isinstance(found, str) else None


def instructions() -> list[str]:
    """The instruction sets that can be used here, the best first."""
    return call("puna_instructions").decode().split("\n")[1:]


def chosen() -> str:
    """The instruction set in use."""
    return call("puna_instructions").decode().split("\n")[0]


def layout() -> int:
    """The number of the layout that codes have in the kernels' memory; files may have it too (`quant/layout.py`)."""
    return call("puna_layout")


def choose(name: str) -> None:
    """Use another instruction set, for all calls from now on; nothing may be running. Raises `ConfigError`."""
    if not call("puna_choose", name.encode()):
        raise ConfigError(f"{name!r} cannot run on this processor", hint=f"it has: {', '.join(instructions())}")


def call(name: str, *arguments: object) -> object:
    """Call a function of the library. Raises `ConfigError` where there is none."""
    library = _library()
    if isinstance(library, str):
        raise ConfigError(f"there are no C++ kernels here: {library}")
    return getattr(library, name)(*arguments)


def address(array: Array | None, dtype: str | None = None) -> int | None:
    """The address of an array's numbers. It has to outlive the call."""
    if array is None:
        return None
    assert dtype in (None, dtype_name(array.dtype)), f"{array.dtype} is not {dtype}"
    if isinstance(array, np.ndarray):
        assert array.flags.c_contiguous
        return array.ctypes.data
    assert array.is_contiguous() and array.device.type == "cpu"
    return array.data_ptr()


def dtype_name(dtype: object) -> str:
    """What numpy and PyTorch both call a type of numbers: "float32", "bfloat16", ..."""
    return str(dtype).removeprefix("torch.")
