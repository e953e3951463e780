"""Smaller weights: integers with a scale per group (`groups.py`), made by the stage `quantise`, read by `load_quantised`."""

from typing import Any

from puna.quant.forms import QuantConfig
from puna.quant.load import is_quantised, load_quantised

__all__ = ["QuantConfig", "is_quantised", "load_quantised", "quantise"]


def __getattr__(name: str) -> Any:
    """The stage, when it is asked for: who only reads quantised weights does not wait for what making them needs."""
    if name == "quantise":
        from puna.quant.stage import quantise

        return quantise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
