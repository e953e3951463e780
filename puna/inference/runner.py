"""Which runner computes: the one place that knows there is more than one."""

from pathlib import Path
from typing import Literal

import torch

from puna import log
from puna.config import require
from puna.inference.pool import KINDS, bytes_per_token, cache_blocks, memory_of
from puna.inference.spans import BLOCK_TOKENS, Runner
from puna.inference.torch_runner import TorchRunner
from puna.model.llama import Llama
from puna.model.opening import checkpoint_config, load_checkpoint
from puna.model.sizes import LlamaConfig

Choice = Literal["auto", "native", "torch", "invariant"]
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

    `native` are our kernels for the CPU (`native.py`), `torch` the reference, `invariant` the reference token by token.
    `auto` takes the kernels where they can be had and says so in one line where they cannot. `pool.cache_blocks` says
    how large the cache is without a wish. Raises `ConfigError` for a budget below a block.
    """
    _check(kv)
    weight = model.norm.weight
    if _take_native(model.config, weight.device, choice):
        from puna.inference.native import NativeRunner

        return NativeRunner.of(model, threads=torch.get_num_threads(), kv=kv, blocks=blocks, cache_bytes=cache_bytes)
    if blocks is None:
        per_block = bytes_per_token(model.config, weight.dtype, kv) * BLOCK_TOKENS
        blocks = cache_blocks(model.config, per_block, cache_bytes, memory_of(weight.device))
    return TorchRunner(model, blocks=blocks, kv=kv, invariant=choice == "invariant")


def open_runner(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cache_bytes: int | None = None,
    kv: str = "model",
    choice: Choice = "auto",
) -> Runner:
    """What computes the checkpoint at `path`, of any format; numbers are computed with as `dtype`.

    Like `make_runner`, without a model in memory between where the kernels take it. Raises `ArtifactError`.
    """
    _check(kv)
    if _take_native(checkpoint_config(path), torch.device(device), choice):
        from puna.inference.native import NativeRunner

        threads = torch.get_num_threads()
        return NativeRunner.load(path, dtype=dtype, threads=threads, kv=kv, cache_bytes=cache_bytes)
    return make_runner(_load(path, dtype).to(device), cache_bytes=cache_bytes, kv=kv, choice=choice)


def _load(path: Path, dtype: torch.dtype) -> Llama:
    from puna.model.detect import kind_of
    from puna.quant import load_quantised

    model = load_quantised(path, dtype) if kind_of(path) == "quantised" else load_checkpoint(path, dtype)
    return model.eval().requires_grad_(False)


def _check(kv: str) -> None:
    require(kv in KINDS, f"kv={kv!r} is not a way to keep keys and values", hint=f"known: {', '.join(KINDS)}")


def _take_native(config: LlamaConfig, device: torch.device, choice: Choice) -> bool:
    """Whether the kernels are to compute. Raises `ConfigError` if they were asked for and cannot."""
    if choice not in ("auto", "native"):
        return False
    why = _unfit(config, device)
    if why is None:
        return True
    require(choice == "auto", f"the native kernels cannot be used: {why}", hint="runner='torch'")
    _say_once(f"native kernels are not used ({why}): computing with PyTorch")
    return False


def _unfit(config: LlamaConfig, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the model is on {device}"
    from puna.inference import native

    return native.unfit(config)


def _say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        log.info(line)
