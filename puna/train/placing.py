"""A run's model in its place: drawn anew or read from a checkpoint, on this machine's device."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn

from puna.artifacts import Artifact
from puna.config import require
from puna.model.checkpoint import load_model
from puna.model.convert import hf_name, is_rotary, to_meta_rows
from puna.model.folder import WeightFiles, load_config
from puna.model.headstart import give_head_start
from puna.model.llama import Llama
from puna.model.reward import RewardModel
from puna.parallel.placement import Placement
from puna.parallel.whole import Whole
from puna.train import hardware
from puna.train.accelerate import SpeedConfig, accelerate
from puna.train.settings import TrainConfig


def place(config: TrainConfig, base: Artifact | None) -> Placement:
    """The model that `config` and `base` mean, ready to be trained. Raises `ConfigError` if they mean none."""
    device = hardware.device()
    config.layout.check_world(dist.get_world_size() if dist.is_initialized() else 1)
    if config.layout.world == 1:
        return Whole(accelerate(starting_model(config, base), config.speed, device), device)
    from puna.parallel import sharded

    alone = config.speed == SpeedConfig(fused=config.speed.fused)
    require(
        alone, "speed.compiled, .recompute and .float8 are for one process so far", hint="leave them out, or the layout"
    )
    if base is not None:
        shape, weights = load_config(base.path), stored_weights(base)
    else:
        whole = starting_llama(config, None) if config.head_start else None
        shape, weights = config.model, whole and ((name, p.detach()) for name, p in whole.named_parameters())
    require(shape is not None, "there is nothing to start from: no base and no model size", hint="set `model`")
    if config.lm or config.sft:  # rows of one length; those of pairs are as long as the longest, and filled up
        for phase in config.phases:
            config.layout.check_model(shape, phase.sequence_length)
    reward = config.reward is not None
    return sharded.place(shape, config.layout, device=device, seed=config.seed, weights=weights, reward=reward)


def stored_weights(base: Artifact) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint in float32, one after the other, by their names in the model."""
    config = load_config(base.path)
    with WeightFiles(base.path) as files:
        files.expect_llama(config)
        for name in config.shapes():
            weight = files.read(hf_name(name)).float()
            yield name, to_meta_rows(weight, config.head_dim) if is_rotary(name) else weight


def starting_model(config: TrainConfig, base: Artifact | None) -> nn.Module:
    """The whole model, on the CPU."""
    llama = starting_llama(config, base).train()
    return RewardModel(llama) if config.reward else llama


def starting_llama(config: TrainConfig, base: Artifact | None) -> Llama:
    """The model, or a reward model's body."""
    if base is not None:
        return load_model(base.path)
    hint = "give a base checkpoint or set `model`"
    require(config.model is not None, "there is nothing to start from: no base and no model size", hint=hint)
    model = Llama(config.model).init_weights(config.seed)
    if config.head_start:
        give_head_start(model, config.seed)
    return model
