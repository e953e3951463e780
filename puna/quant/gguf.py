"""GGUF's quantised blocks as codes with a scale and an offset per group: the form that products are computed in.

Each of its types is whole numbers times a scale, some with an offset (`blocks.py`). Numbers of up to four bits become
4-bit codes, those of up to six 6-bit ones, the others 8-bit ones; groups stay as long as they are (16 or 32). Scales and offsets are rounded to float16:
those of Q4_0, Q5_0 and Q8_0 are float16 in the file, so nothing changes; where a K type multiplies two numbers for a
scale, a weight may move by 2^-11 of its group's range.
"""

import torch
from torch import Tensor

from puna.model.gguf.blocks import BlockType
from puna.quant.groups import Packed, pack

_NARROW = ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K")  # at most four bits a weight
_MIDDLE = ("Q5_0", "Q5_1", "Q5_K", "Q6_K")  # at most six
_UNSIGNED = ("Q4_1", "Q4_K")  # numbers 0 to 15, where 4-bit codes are -8 to 7


def packed_from_gguf(kind: BlockType, raw: Tensor) -> Packed:
    """Rows of a matrix, uint8 (rows, bytes) as they lie in the file, as codes. `kind` is a quantised type."""
    assert kind.parts is not None, kind.name
    numbers, scales, offsets = kind.parts(raw.reshape(-1, kind.bytes))
    rows, size = len(raw), numbers.shape[-1]
    bits = 4 if kind.name in _NARROW else 6 if kind.name in _MIDDLE else 8
    if kind.name in _UNSIGNED:
        numbers, offsets = numbers - 8, offsets + 8 * scales
    codes = numbers.to(torch.int8).view(rows, -1)
    scales = scales.reshape(rows, -1).half()
    offsets = None if offsets is None else offsets.reshape(rows, -1).half()
    return pack(codes, scales, offsets, bits, size)
