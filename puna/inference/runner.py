"""Which runner computes: the one place that knows there is more than one."""

import os
from typing import Literal

import torch

from puna import log
from puna.config import require
from puna.inference import cuda_runner
from puna.inference.pool import bytes_per_token
from puna.inference.spans import BLOCK_TOKENS, Runner
from puna.inference.torch_runner import TorchRunner
from puna.model.llama import Llama

Choice = Literal["auto", "native", "cuda", "torch", "invariant"]
CACHE_BYTES = 2 << 30
_said: set[str] = set()


def make_runner(
    model: Llama,
    *,
    cache_bytes: int | None = None,
    blocks: int | None = None,
    kv: str = "model",
    choice: Choice = "auto",
) -> Runner:
    """What computes `model`, with a cache of `blocks` or `cache_bytes`; `kv` is how keys and values are kept.

    `native` are our kernels for the CPU (`native.py`), `cuda` those for a GPU (`cuda_runner.py`), `torch` the reference,
    `invariant` the reference token by token. `auto` takes the kernels where they can be had and says so in one line
    where they cannot. Without `cache_bytes` the cache of `cuda` is most of the free memory; elsewhere it is 2 GiB, or
    what one sequence of the full context takes if that is more, but at most half of the memory (which is touched only
    as it is needed). Raises `ConfigError` for a budget below a block.
    """
    on_gpu = model.norm.weight.device.type == "cuda"
    if choice == "cuda" or (choice == "auto" and on_gpu):
        why = cuda_runner.unfit(model, kv)
        if why is None:
            return _cuda(model, blocks, cache_bytes)
        require(choice == "auto", f"the GPU kernels cannot be used: {why}", hint="runner='auto'")
        _say_once(f"GPU kernels are not used ({why}): computing with PyTorch")
    if blocks is None:
        blocks = _blocks(model, cache_bytes, kv)
    if choice == "native" or (choice == "auto" and not on_gpu):
        why = _unfit(model)
        if why is None:
            from puna.inference.native import NativeRunner

            cached = torch.int8 if kv == "int8" else model.norm.weight.dtype
            return NativeRunner(model, blocks, threads=torch.get_num_threads(), kv=cached)
        require(choice == "auto", f"the native kernels cannot be used: {why}", hint="runner='torch'")
        _say_once(f"native kernels are not used ({why}): computing with PyTorch")
    return TorchRunner(model, blocks=blocks, kv=kv, invariant=choice == "invariant")


def _cuda(model: Llama, blocks: int | None, cache_bytes: int | None) -> Runner:
    weight = model.norm.weight
    if blocks is None and cache_bytes is None:
        cache_bytes = cuda_runner.cache_bytes_of(_memory(weight.device), model.config, weight.dtype)
    return cuda_runner.CudaRunner(model, blocks=blocks or _blocks(model, cache_bytes, "model"))


def _unfit(model: Llama) -> str | None:
    """Why the native kernels cannot run `model` here; None if they can."""
    if model.norm.weight.device.type != "cpu":
        return f"the model is on {model.norm.weight.device}"
    try:
        from puna.inference import native
    except ImportError as error:
        return str(error)
    return native.unfit(model)


def _blocks(model: Llama, cache_bytes: int | None, kv: str) -> int:
    weight = model.norm.weight
    per_block = bytes_per_token(model.config, weight.dtype, kv) * BLOCK_TOKENS
    if cache_bytes is None:
        whole = -(-model.config.context // BLOCK_TOKENS) * per_block
        cache_bytes = min(max(CACHE_BYTES, whole), _memory(weight.device) // 2)
    too_little = f"cache_bytes={cache_bytes:,} is less than a block of the cache takes: {per_block:,}"
    require(cache_bytes >= per_block, too_little)
    return cache_bytes // per_block


def _memory(device: torch.device) -> int:
    """Bytes: those of the machine, or those that are free on a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on every system
        return 4 * CACHE_BYTES


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        log.info(line)
