"""Which runner computes: the one place that knows there is more than one.

PyTorch takes longer to import than a small model to answer. So it is imported where it computes, and not before: the C++
kernels take a checkpoint and answer without it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from puna import log
from puna.config import require
from puna.inference.room import bytes_per_token, cache_blocks, check_kind
from puna.inference.spans import BLOCK_TOKENS, Runner
from puna.kernels.native import dtype_name
from puna.kernels.threads import threads
from puna.model.convert import hf_name
from puna.model.detect import kind_of
from puna.model.opening import Dtype, checkpoint_config, open_checkpoint
from puna.model.sizes import LlamaConfig

if TYPE_CHECKING:
    from puna.model.llama import Llama

Choice = Literal["auto", "native", "cuda", "torch", "invariant"]
_LARGE = 1_000_000_000  # parameters
_said: set[str] = set()


def make_runner(
    model: "Llama",
    *,
    cache_bytes: int | None = None,
    blocks: int | None = None,
    kv: str = "model",
    choice: Choice = "auto",
    packed: bool = True,
) -> Runner:
    """What computes `model`, with a cache of `blocks` or `cache_bytes`; `kv` is how keys and values are kept.

    `native` are our kernels for the CPU (`native.py`), `cuda` those for a GPU (`cuda_runner.py`), `torch` the reference,
    `invariant` the reference token by token. `auto` takes the kernels where they can be had and says so in one line
    where they cannot. Without a wish the cache of `cuda` is most of the free memory, elsewhere what `room.cache_blocks`
    says. `packed` lets `native` keep bfloat16 in 12 bits, which changes no result. Raises `ConfigError` for a budget
    below a block or beyond the memory.
    """
    check_kind(kv)
    model = model.eval().requires_grad_(False)
    weight = model.norm.weight
    device = weight.device
    if _usable("native", choice, device.type, lambda: _unfit(model.config, device.type)):
        from puna.inference.native import NativeRunner

        settings = {"threads": threads(), "kv": kv, "blocks": blocks, "cache_bytes": cache_bytes}
        return NativeRunner.of(model, packed=packed, **settings)
    from puna.inference.pool import memory_of

    on_gpu = _usable("cuda", choice, device.type, lambda: _unfit_for_gpu(model, kv))
    if on_gpu:
        from puna.inference import cuda_runner
    if on_gpu and blocks is None and cache_bytes is None:
        cache_bytes = cuda_runner.cache_bytes_of(memory_of(device), model.config, weight.dtype)
    per_block = bytes_per_token(model.config, weight.dtype.itemsize, kv) * BLOCK_TOKENS
    blocks = cache_blocks(model.config, per_block, memory_of(device), blocks=blocks, cache_bytes=cache_bytes)
    if on_gpu:
        return cuda_runner.CudaRunner(model, blocks=blocks)
    from puna.inference.torch_runner import TorchRunner

    return TorchRunner(model, blocks=blocks, kv=kv, invariant=choice == "invariant")


def open_runner(
    path: Path,
    *,
    dtype: Dtype | None = None,
    device: str = "cpu",
    cache_bytes: int | None = None,
    blocks: int | None = None,
    kv: str = "model",
    choice: Choice = "auto",
    packed: bool = True,
) -> Runner:
    """What computes the checkpoint at `path`, of any format; numbers are computed with as `dtype`.

    None is bfloat16 for what was stored in 16 bits and has a billion parameters or more, else float32. Like
    `make_runner`, without a model in memory between where the kernels take it. Raises `ArtifactError`.
    """
    check_kind(kv)
    dtype = dtype_name(dtype or _usual_dtype(path))
    config, place = checkpoint_config(path), device.split(":")[0]
    if _usable("native", choice, place, lambda: _unfit(config, place)):
        from puna.inference.native import NativeRunner

        settings = {"threads": threads(), "kv": kv, "blocks": blocks, "cache_bytes": cache_bytes}
        return NativeRunner.load(path, dtype=dtype, packed=packed, **settings)
    model = _model_of(path, dtype).to(device)
    return make_runner(model, cache_bytes=cache_bytes, blocks=blocks, kv=kv, choice=choice)


def _model_of(path: Path, dtype: str) -> "Llama":
    """The checkpoint as a model in PyTorch."""
    count = threads()
    import torch

    from puna.model.opening import load_checkpoint
    from puna.quant import load_quantised

    torch.set_num_threads(count)
    load = load_quantised if kind_of(path) == "quantised" else load_checkpoint
    return load(path, getattr(torch, dtype))


def _unfit_for_gpu(model: "Llama", kv: str) -> str | None:
    from puna.inference import cuda_runner

    return cuda_runner.unfit(model, kv)


def _usual_dtype(path: Path) -> str:
    if kind_of(path) == "quantised":
        return "float32"
    with open_checkpoint(path) as opened:
        stored = opened.weights.form(hf_name("layers.0.feed_forward.w1.weight"))
        return "bfloat16" if stored in ("BF16", "F16") and opened.config.parameters >= _LARGE else "float32"


def _usable(kernels: Literal["native", "cuda"], choice: Choice, device: str, unfit) -> bool:
    """Whether these kernels are to compute: asked for by name, or `auto` on their device and nothing in the way.

    Raises `ConfigError` if they were asked for by name and cannot.
    """
    at_home = device == ("cpu" if kernels == "native" else "cuda")
    if choice != kernels and not (choice == "auto" and at_home):
        return False
    why = unfit()
    if why is None:
        return True
    require(choice == "auto", f"the {kernels} kernels cannot be used: {why}", hint="runner='auto'")
    if why not in _said:
        _said.add(why)
        log.info(f"{kernels} kernels are not used ({why}): computing with PyTorch")
    return False


def _unfit(config: LlamaConfig, device: str) -> str | None:
    if device != "cpu":
        return f"the model is on {device}"
    from puna.inference import native

    return native.unfit(config)
