"""The reward model's shape: a Llama with one number per dialog instead of a vocabulary (arXiv 2407.21783, 4.1.2)."""

from torch import nn

from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig

BODY = "llama."  # what the names of a reward model's weights begin with, but for the head's


class RewardModel(nn.Module):
    """A Llama's body and a linear head. The body's output matrix is kept, and not used."""

    def __init__(self, llama: Llama):
        super().__init__()
        self.llama = llama
        self.head = reward_head(llama.config)

    @property
    def config(self) -> LlamaConfig:
        return self.llama.config


def reward_head(config: LlamaConfig) -> nn.Linear:
    """A head that gives every dialog zero."""
    head = nn.Linear(config.dim, 1, bias=False)
    nn.init.zeros_(head.weight)
    return head
