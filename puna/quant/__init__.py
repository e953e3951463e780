"""Smaller weights: integers with a scale per group (`groups.py`), made by the stage `quantise`, read by `load_quantised`."""

from typing import Any

from puna.quant.forms import QuantConfig
from puna.quant.stored import is_quantised

__all__ = ["QuantConfig", "is_quantised", "load_quantised", "quantise"]


def __getattr__(name: str) -> Any:
    """What needs PyTorch, when it is asked for: who only opens quantised weights does not wait for it."""
    if name == "quantise":
        from puna.quant.stage import quantise

        return quantise
    if name == "load_quantised":
        from puna.quant.load import load_quantised

        return load_quantised
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
