"""A run's model in its place: drawn anew or read from a checkpoint, on this machine's device."""

from torch import nn

from puna.artifacts import Artifact
from puna.config import require
from puna.model.checkpoint import load_model
from puna.model.headstart import give_head_start
from puna.model.llama import Llama
from puna.parallel.placement import Placement
from puna.parallel.whole import Whole
from puna.train import hardware
from puna.train.objectives.reward import RewardModel
from puna.train.settings import TrainConfig


def place(config: TrainConfig, base: Artifact | None) -> Placement:
    """The model that `config` and `base` mean, ready to be trained. Raises `ConfigError` if they mean none."""
    return Whole(starting_model(config, base), hardware.device())


def starting_model(config: TrainConfig, base: Artifact | None) -> nn.Module:
    """The whole model, on the CPU."""
    if base is None:
        hint = "give a base checkpoint or set `model`"
        require(config.model is not None, "there is nothing to start from: no base and no model size", hint=hint)
        model = Llama(config.model).init_weights(config.seed)
        if config.head_start:
            give_head_start(model, config.seed)
    else:
        model = load_model(base.path)
    model.train()
    return RewardModel(model) if config.reward else model
