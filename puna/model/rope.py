"""How fast each rotary pair turns, in numpy: `llama.rope_frequencies` for who has no PyTorch in memory.

The numbers are the same to the last bit, which the tests hold for every published size.
"""

import math

import numpy as np

from puna.model.sizes import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """The angle per position of each rotary pair, (E/2,) float32, after Llama 3.1's scaling if the config has it."""
    one = np.float32(1)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = one / np.power(float(config.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    s = config.rope_scaling
    if s is None:
        return frequencies
    turns = np.float32(s.original_context) / (np.float32(2 * math.pi) / frequencies)
    blend = (turns - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
    blend = blend.clip(np.float32(0), one)
    return (one - blend) * frequencies / np.float32(s.factor) + blend * frequencies
