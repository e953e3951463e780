"""Do two checkpoints compute the same? And if not, from which layer on?

Both models read the same tokens, drawn from a seed. After each layer the two residual streams are compared by

    difference(layer) = rms(a - b) / rms(a)

which float32's own noise keeps near 1e-6, rounding to bfloat16 near 1e-2, and a wrong rotation or a swapped matrix near
1. The first layer above the tolerance is where to look: 0 is the embedding, i is the i-th block, and `logits` alone
means the final norm or the output matrix. What a user feels is told beside it: the largest difference of a logit, and how
often both models prefer the same token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from puna.config import require
from puna.errors import ArtifactError
from puna.model.llama import Llama, attend_with
from puna.model.sizes import LlamaConfig

# What may differ between two models whose layers can still be compared one by one.
_MAY_DIFFER = {"context", "tied", "norm_eps", "rope_theta", "rope_scaling"}


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What the models are asked."""

    prompts: int = 4
    tokens: int = 128  # of each prompt
    tolerance: float = 1e-3  # of the relative difference of a layer
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.prompts > 0 and self.tokens > 1, "prompts must be positive and tokens above 1")
        require(self.tolerance > 0, f"tolerance={self.tolerance} must be positive")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two models are apart."""

    layers: tuple[float, ...]  # relative differences: embedding, then each block
    logits: float  # likewise of the logits
    largest_logit_difference: float
    same_choice: float  # the share of places where both prefer the same token
    tolerance: float
    notes: tuple[str, ...] = ()  # fields of the configuration that differ

    @property
    def same(self) -> bool:
        """Whether everything stays within the tolerance."""
        return self.first_divergence is None

    @property
    def first_divergence(self) -> str | None:
        """`embedding`, `layer 3` (from 1), `logits`, or None."""
        for number, difference in enumerate(self.layers):
            if not difference <= self.tolerance:  # nor is what is not a number within it
                return f"layer {number}" if number else "embedding"
        return None if self.logits <= self.tolerance else "logits"


def compare(a: Llama, b: Llama, config: VerifyConfig) -> Comparison:
    """Run both on the same tokens, in the precision that they have. Raises `ArtifactError` if their shapes differ."""
    notes = _same_shape(a.config, b.config)
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(a.config.vocab_size, (config.prompts, config.tokens), generator=generator)
    with torch.no_grad():
        streams = zip(_trace(a, tokens), _trace(b, tokens), strict=True)
        differences, largest, chosen = [], 0.0, 1.0
        for first, second in streams:  # the last pair are the logits
            first, second = first.float(), second.float()
            differences.append(_relative(first, second))
            largest = (first - second).abs().max().item()
            chosen = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    return Comparison(
        layers=tuple(differences[:-1]),
        logits=differences[-1],
        largest_logit_difference=largest,
        same_choice=chosen,
        tolerance=config.tolerance,
        notes=notes,
    )


def _same_shape(a: LlamaConfig, b: LlamaConfig) -> tuple[str, ...]:
    differing = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(a)}
    differing = {name: pair for name, pair in differing.items() if pair[0] != pair[1]}
    told = [f"{name}: {first} and {second}" for name, (first, second) in differing.items()]
    if differing.keys() - _MAY_DIFFER:
        hint = "only models of one shape can compute the same"
        raise ArtifactError(f"the shapes differ: {'; '.join(told)}", hint=hint)
    return tuple(told)


def _relative(a: Tensor, b: Tensor) -> float:
    scale = a.square().mean().sqrt().clamp_min(1e-30)
    return ((a - b).square().mean().sqrt() / scale).item()


def _trace(model: Llama, tokens: Tensor) -> list[Tensor]:
    """The residual stream after the embedding and after each block, then the logits."""
    seen: list[Tensor] = []
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with _watched(model, seen.append):
        logits = model(tokens, positions, attend_with(None))
    return [*seen, logits]


@contextmanager
def _watched(model: Llama, see: Callable[[Tensor], None]) -> Iterator[None]:
    places = [model.tok_embeddings, *model.layers]
    handles = [place.register_forward_hook(lambda _module, _inputs, output: see(output)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
