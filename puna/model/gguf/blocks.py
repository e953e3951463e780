"""The block types of GGUF: how 1, 32 or 256 neighbouring weights of a row are packed, and how they are read.

    type   bytes  weights  layout (d, m, dmin: float16)               a weight is
    F32        4        1  float32
    F16        2        1  float16
    BF16       2        1  bfloat16
    Q8_0      34       32  d, 32 int8                                 d * q
    Q4_0      18       32  d, 16 nibbles' bytes                       d * (q - 8)
    Q4_1      20       32  d, m, 16 nibbles' bytes                    d * q + m
    Q5_0      22       32  d, 4 fifth bits, 16 nibbles' bytes         d * (q - 16)
    Q5_1      24       32  d, m, 4 fifth bits, 16 nibbles' bytes      d * q + m
    Q2_K      84      256  16 scales, 64 two bits, d, dmin            d * s * q - dmin * t         16 groups of 16
    Q3_K     110      256  32 third bits, 64 two bits, 12 s, d        d * (s - 32) * (q - 4)       16 groups of 16
    Q4_K     144      256  d, dmin, 12 s and t, 128 nibbles' bytes    d * s * q - dmin * t          8 groups of 32
    Q5_K     176      256  d, dmin, 12 s and t, 32 fifth bits, 128    d * s * q - dmin * t          8 groups of 32
    Q6_K     210      256  128 nibbles, 64 two bits, 16 int8 s, d     d * s * (q - 32)             16 groups of 16

The K types have two levels: each group of a block has a small scale `s` (and an offset `t`) of 4, 6 or 8 bits, in
units of the block's own `d` (and `dmin`). A byte's low bits come first: byte j of a 32-block's nibbles has weight j in
its low and weight j + 16 in its high half. In a K block the bits of 32 (Q6_K: 64) neighbouring weights lie in as many
bytes at one shift, the next weights at the next shift.

A quantised type is told as its *parts*, for uint8 (blocks, bytes): whole numbers, a scale for each group of neighbours,
and for some an offset. A weight is `scale * number + offset`, in float32, rounded after each operation as the reference
does it, so that the result is the reference's bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """Some blocks, taken apart: numbers (blocks, groups, size) float32, scales and offsets (blocks, groups) float32."""

    numbers: Tensor
    scales: Tensor
    offsets: Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """A way to pack `weights` weights into `bytes` bytes; `code` stands for it in a file."""

    name: str
    code: int
    weights: int
    bytes: int
    plain: torch.dtype | None = None
    parts: Callable[[Tensor], Parts] | None = None

    def decode(self, raw: Tensor) -> Tensor:
        """uint8 (blocks, bytes) as weights (blocks, weights): float32, or the plain type itself."""
        if self.parts is None:
            return raw.view(self.plain)
        numbers, scales, offsets = self.parts(raw)
        weights = scales[..., None] * numbers
        return (weights if offsets is None else weights + offsets[..., None]).flatten(1)


def _halves(raw: Tensor) -> Tensor:
    """float16 numbers in bytes (blocks, 2 n), as float32 (blocks, n)."""
    return raw.contiguous().view(torch.float16).float()


def _spread(raw: Tensor, bits: int, width: int) -> Tensor:
    """Numbers of `bits` bits, of which `width` neighbours lie in as many bytes at one shift: (blocks, all), in order."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    parts = raw.reshape(len(raw), -1, 1, width) >> shifts  # (blocks, stretches, shifts, width)
    return (parts & (2**bits - 1)).flatten(1)


def _grouped(numbers: Tensor, groups: int) -> Tensor:
    """(blocks, all) as float32 (blocks, groups, all / groups)."""
    return numbers.reshape(len(numbers), groups, -1).float()


def _q8_0(raw: Tensor) -> Parts:
    return Parts(_grouped(raw[:, 2:].view(torch.int8), 1), _halves(raw[:, :2]))


def _q4_0(raw: Tensor) -> Parts:
    return Parts(_grouped(_spread(raw[:, 2:], 4, 16), 1) - 8, _halves(raw[:, :2]))


def _q4_1(raw: Tensor) -> Parts:
    return Parts(_grouped(_spread(raw[:, 4:], 4, 16), 1), _halves(raw[:, :2]), _halves(raw[:, 2:4]))


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    """(blocks, 1, 32) from one bit each, eight to a byte, and nibbles."""
    return _grouped(_spread(high, 1, 1) << 4 | _spread(low, 4, 16), 1)


def _q5_0(raw: Tensor) -> Parts:
    return Parts(_five_bits(raw[:, 2:6], raw[:, 6:]) - 16, _halves(raw[:, :2]))


def _q5_1(raw: Tensor) -> Parts:
    return Parts(_five_bits(raw[:, 4:8], raw[:, 8:]), _halves(raw[:, :2]), _halves(raw[:, 2:4]))


def _q2_k(raw: Tensor) -> Parts:
    d, dmin = _halves(raw[:, 80:84]).split(1, dim=1)
    scales, offsets = d * (raw[:, :16] & 15).float(), dmin * (raw[:, :16] >> 4).float()
    return Parts(_grouped(_spread(raw[:, 16:80], 2, 32), 16), scales, -offsets)


def _q3_k(raw: Tensor) -> Parts:
    # A scale's low four bits are a nibble of bytes 0-7, its high two bits lie in bytes 8-11.
    scales = _spread(raw[:, 96:104], 4, 8) | _spread(raw[:, 104:108], 2, 4) << 4
    numbers = _grouped(_spread(raw[:, 32:96], 2, 32) | _spread(raw[:, :32], 1, 32) << 2, 16) - 4
    return Parts(numbers, _halves(raw[:, 108:]) * (scales.float() - 32))


def scales_and_offsets(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's `s` and `t`, uint8 (blocks, 8) each, from 12 bytes.

    Bytes 0-3 hold s of groups 0-3 in six bits, bytes 4-7 likewise t. Groups 4-7 have their low four bits in bytes 8-11
    (s low, t high) and their high two bits on top of the others.
    """
    s, t, rest = raw.split(4, dim=1)
    s = torch.cat([s & 63, rest & 15 | s >> 6 << 4], dim=1)
    t = torch.cat([t & 63, rest >> 4 | t >> 6 << 4], dim=1)
    return s, t


def _with_offsets(head: Tensor, numbers: Tensor) -> Parts:
    """Q4_K and Q5_K from their first 16 bytes and (blocks, 256) numbers."""
    d, dmin = _halves(head[:, :4]).split(1, dim=1)
    s, t = scales_and_offsets(head[:, 4:16])
    return Parts(_grouped(numbers, 8), d * s.float(), -(dmin * t.float()))


def _q4_k(raw: Tensor) -> Parts:
    return _with_offsets(raw, _spread(raw[:, 16:], 4, 32))


def _q5_k(raw: Tensor) -> Parts:
    return _with_offsets(raw, _spread(raw[:, 16:48], 1, 32) << 4 | _spread(raw[:, 48:], 4, 32))


def _q6_k(raw: Tensor) -> Parts:
    numbers = _grouped(_spread(raw[:, :128], 4, 64) | _spread(raw[:, 128:192], 2, 32) << 4, 16) - 32
    return Parts(numbers, _halves(raw[:, 208:]) * raw[:, 192:208].view(torch.int8).float())


F32 = BlockType("F32", 0, 1, 4, torch.float32)
F16 = BlockType("F16", 1, 1, 2, torch.float16)
BF16 = BlockType("BF16", 30, 1, 2, torch.bfloat16)
Q8_0 = BlockType("Q8_0", 8, 32, 34, parts=_q8_0)
Q4_0 = BlockType("Q4_0", 2, 32, 18, parts=_q4_0)
Q4_K = BlockType("Q4_K", 12, 256, 144, parts=_q4_k)
Q6_K = BlockType("Q6_K", 14, 256, 210, parts=_q6_k)
_READ = (
    F32,
    F16,
    BF16,
    Q4_0,
    BlockType("Q4_1", 3, 32, 20, parts=_q4_1),
    BlockType("Q5_0", 6, 32, 22, parts=_q5_0),
    BlockType("Q5_1", 7, 32, 24, parts=_q5_1),
    Q8_0,
    BlockType("Q2_K", 10, 256, 84, parts=_q2_k),
    BlockType("Q3_K", 11, 256, 110, parts=_q3_k),
    Q4_K,
    BlockType("Q5_K", 13, 256, 176, parts=_q5_k),
    Q6_K,
)
BLOCKS = {kind.code: kind for kind in _READ}
# Types that exist and are not read, by name, for the message.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
