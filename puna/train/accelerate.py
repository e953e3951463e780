"""What makes a whole model's step faster or smaller, as choices outside the model.

    fused       on a CPU with our kernels: forward and backward written out (`fused.py`)
    compiled    each block through torch.compile: one graph serves all layers, so it compiles once
    recompute   activations made again in the backward pass instead of kept:
                "selective" keeps what matrix products and attention made, and makes the cheap rest again;
                "full" keeps only the input of each block, for a quarter more arithmetic
    float8      the layers' products in 8-bit floating point, by torchao, scaled row by row: NVIDIA from Ada on

None of them changes a parameter or its name, so a checkpoint made with any can go on with any other.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.config import require
from puna.errors import MissingExtra
from puna.model.llama import Block, Llama
from puna.model.sizes import LlamaConfig
from puna.train.fused import fuse

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_mm.default,
}


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How a step is computed; what it computes is the same but for rounding."""

    fused: bool = True
    compiled: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    float8: bool = False


def accelerate(model: nn.Module, config: SpeedConfig, device: torch.device) -> nn.Module:
    """`model`, changed in place. Raises `ConfigError` for what this machine cannot do, `MissingExtra` without torchao."""
    if config.float8:
        require_float8(device)
        to_float8(model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if config.recompute != "none":
        for block in blocks:
            _recompute(block, selective=config.recompute == "selective")
    if config.compiled:
        for block in blocks:
            block.compile(dynamic=False)
    plain = config.recompute == "none" and not config.compiled and not config.float8
    return fuse(model) if config.fused and plain and device.type == "cpu" else model


def recomputed_flops_per_token(config: LlamaConfig, sequence_length: int, recompute: str) -> int:
    """Operations per token that are done a second time: the layers' forward pass, if everything is recomputed."""
    if recompute != "full":
        return 0
    output = 2 * config.vocab_size * config.dim
    return config.train_flops_per_token(sequence_length) // 3 - output


def require_float8(device: torch.device) -> None:
    """Raises `ConfigError` unless `device` multiplies 8-bit floating-point matrices."""
    what, able = "a CPU", False
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        what, able = (
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})",
            (major, minor) >= (8, 9),
        )
    require(
        able,
        f"speed.float8=true needs a GPU that multiplies 8-bit floats, and this run is on {what}",
        hint="take an NVIDIA GPU of compute capability 8.9 or more (L4, H100, ...), or leave float8 off",
    )


def to_float8(model: nn.Module, **options: Any) -> None:
    """Let the layers' matrices multiply in float8 (row-wise scales); embedding, output and norms stay. For training."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise MissingExtra("torchao", "float8") from None

    def suits(module: nn.Module, name: str) -> bool:
        sizes = module.in_features % 16 == 0 and module.out_features % 16 == 0
        return "layers." in name and sizes

    recipe = Float8LinearConfig(**options) if options else Float8LinearConfig.from_recipe_name("rowwise")
    for llama in [module for module in model.modules() if isinstance(module, Llama)]:
        convert_to_float8_training(llama, module_filter_fn=suits, config=recipe)


def _recompute(block: Block, *, selective: bool) -> None:
    """Let the block's forward pass forget its activations."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy) if selective else None
    more = {"context_fn": contexts} if contexts else {}
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **more)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
