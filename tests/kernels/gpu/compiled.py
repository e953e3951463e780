"""Compiles every kernel for a GPU that need not be there, at the shapes of an 8B model: `python compiled.py [capability]`.

Triton carries its own assembler. Whatever the kernels' callers would launch is compiled instead, down to machine code;
one line is printed for each: the kernel, the type it reads, its shared memory in bytes.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from puna.kernels.fp8_linear import CODES
from puna.kernels.paged_attention import Ragged
from puna.kernels.triton import paged_attention, quant_linear, rms_norm, rotary_cache, swiglu

TARGET = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
KINDS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


def compiled(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """In place of a launch."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args)) | kwargs
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], hints[(i,)] = KINDS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    made = triton.compile(ASTSource(kernel, signature, constants, hints), target=TARGET, options=options)
    kinds = "/".join(dict.fromkeys(str(v.dtype).removeprefix("torch.") for v in args if isinstance(v, torch.Tensor)))
    assert len(made.asm["cubin"]) > 0
    print(kernel.__name__, kinds, made.metadata.shared)


def small(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def everything(dtype: torch.dtype) -> None:
    D, H, K, E, group = 4096, 32, 8, 128, 32
    x = torch.empty(2, D, dtype=dtype)
    rms_norm.rms_norm(x, torch.empty(D, dtype=dtype), 1e-5, x)
    rms_norm.rms_norm(x, torch.empty(D, dtype=dtype), 1e-5, None)
    swiglu.swiglu(torch.empty(2, 28672, dtype=dtype))
    pool = torch.empty(4, 16, K, E, dtype=dtype)
    half = torch.empty(2, E // 2)
    q = rotary_cache.rotary_cache(torch.empty(2, (H + 2 * K) * E, dtype=dtype), half, half, small(0, 1), pool, pool)
    for short in (1, 8):
        spans = Ragged(
            begins=small(0, 1), starts=small(0, 0), lengths=small(1, 1), table=small(0, 1)[:, None],
            chunks=small(0, 1, 2), tiles=small(0, 1, 2), short=short, most_chunks=2, most_tiles=2,
        )  # fmt: skip
        paged_attention.paged_attention(q, pool, pool, spans)
    weights = {"4": torch.empty(64, D // 2, dtype=torch.uint8), "8": torch.empty(64, D, dtype=torch.int8)}
    for codes in weights.values():
        scales = torch.empty(64, D // group, dtype=torch.float16)
        for offsets in (None, scales):
            quant_linear.expand(codes, scales, offsets, group, dtype)
            for tokens in (1, 16, 64):
                quant_linear.product(torch.empty(tokens, D, dtype=dtype), codes, scales, offsets, group)
    for tokens in (1, 16, 64):
        quant_linear.scaled_linear(
            torch.empty(tokens, D, dtype=dtype), torch.empty(64, D).to(CODES), torch.empty(64, 1)
        )
    quant_linear.plain_linear(x[:1], torch.empty(64, D, dtype=dtype))


if __name__ == "__main__":
    JITFunction.run = compiled
    everything(torch.bfloat16)
