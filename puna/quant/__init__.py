"""Smaller weights: integers with a scale per group (`groups.py`), made by the stage `quantise`, read by `load_quantised`."""

from puna.quant.forms import QuantConfig
from puna.quant.load import is_quantised, load_quantised
from puna.quant.stage import quantise

__all__ = ["QuantConfig", "is_quantised", "load_quantised", "quantise"]
