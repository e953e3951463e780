"""LoRA adapters on a model in plain PyTorch: what they add to its modules while it reads a step's tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from puna.inference.adapters import Adapter, tokens_of_adapters
from puna.inference.spans import Span
from puna.model.llama import Llama

# Meta's name of a module -> (A, s B), in the type and on the device of the model.
Factors = dict[str, tuple[Tensor, Tensor]]


def factors_like(adapter: Adapter, weight: Tensor) -> Factors:
    """The adapter's matrices in the type and on the device of `weight`."""
    pairs = adapter.factors.items()
    return {name: tuple(torch.from_numpy(part).to(weight) for part in pair) for name, pair in pairs}


@contextmanager
def apply_adapters(model: Llama, adapters: Sequence[Factors], spans: Sequence[Span]) -> Iterator[None]:
    """Within, `model` adds to each span's tokens what the span's adapter says; tokens are one row (1, N)."""
    hooks = []
    try:
        for index, tokens in tokens_of_adapters(spans).items():
            at = torch.tensor(tokens, device=model.norm.weight.device)
            for name, (a, b) in adapters[index].items():
                hooks.append(model.get_submodule(name).register_forward_hook(_adding(at, a, b)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(at: Tensor, a: Tensor, b: Tensor):
    def hook(_module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        output[0, at] += inputs[0][0, at] @ a.T @ b.T
        return output

    return hook
