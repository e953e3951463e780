"""Pairs for the parity matrix: what DPO and reward models learn from, in random tokens, and one process that computes in float32.

The rows are as long as their batch's longest, so ranks fill them up differently; what a layout computes must not show it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from puna.model.llama import Llama
from puna.model.reward import RewardModel
from puna.model.sizes import LlamaConfig
from puna.parallel.whole import WholeReading
from puna.train.objectives.dpo import DpoData, DpoObjective, Side
from puna.train.objectives.reward import RewardData, RewardObjective


def pairs_data(variant: str, config: LlamaConfig, pairs: int, seed: int) -> DpoData:
    """Random pairs: a prompt in common, and two answers, of which all but the last token are contrasted."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()

    def side(prompt: list[int]) -> Side:
        answer = draw(3, config.context // 2)
        before, counted = [0.0] * len(prompt), [1.0] * (len(answer) - 1)
        return Side(ids=prompt + answer, contrast=[*before, *counted, 0.0], likelihood=[*before, *counted, 1.0])

    made = []
    for _ in range(pairs):
        prompt = draw(2, config.context // 2)
        made.append((side(prompt), side(prompt)))
    if variant == "reward":
        return RewardData(RewardObjective(sequence_length=config.context, pairs=pairs), made, seed)
    return DpoData(DpoObjective(sequence_length=config.context, pairs=pairs, beta=0.5), made, seed)


def unsettle(data: DpoData, seed: int) -> None:
    """As if the model had left its reference behind: at the start each pair has the same gradient."""
    if data.reference is not None:
        noise = torch.randn(data.reference.shape, generator=torch.Generator().manual_seed(seed))
        data.reference = data.reference + 3 * noise


def whole_model(config: LlamaConfig, variant: str, seed: int) -> nn.Module:
    """One process's."""
    llama = Llama(config).init_weights(seed)
    if variant != "reward":
        return llama
    model = RewardModel(llama)
    with torch.no_grad():
        model.head.weight.copy_(drawn_head(config, seed))
    return model


def drawn_head(config: LlamaConfig, seed: int) -> Tensor:
    """A head that lets gradients through to the body."""
    return torch.randn(1, config.dim, generator=torch.Generator().manual_seed(seed)) / config.dim**0.5


class Exact:
    """What the reference is scored by in one process, in float32."""

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def read(self, ask: Callable[..., Tensor], count: int, batch: Callable[[int], Any]) -> list[Tensor]:
        """As a placement does."""
        return [ask(WholeReading(self.model, given.rows), given) for given in map(batch, range(count))]
