"""Muon: the momentum of a matrix, replaced by the nearest matrix whose singular values are all one (Jordan et al. 2024).

    m  <-  momentum m + (1 - momentum) g                 g the gradient; kept as the parameter lies
    X   =  (1 - momentum) g + momentum m                 Nesterov; in bfloat16 from here on
    X  <-  X / |X|,  then five times  a X + (b G + c G G) X,  G = X X^T        Newton and Schulz
    W  <-  (1 - rate decay) W - 0.2 sqrt(larger side) rate X

The polynomial's a, b, c make small singular values grow fast and leave all between 0.7 and 1.2, which is near enough.
The factor (arXiv 2502.16982) makes updates as large as AdamW's, so that one learning rate serves both.

Everything but the third line is done on what a rank holds. The third needs whole matrices, and where a layout cuts them it is
done by one rank for each, which gets X and sends the result back in bfloat16, as one process would have them: so for the
same gradients the update has the same bits on every layout (`puna.parallel.dealt`). The state is the momentum alone,
which is cut as the weights are, and moves between layouts as they do.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from puna.parallel.placement import Placement

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Updates of the matrices `named`, which are parameters of `placement`. `step` is called by all its ranks together."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        placement: Placement,
        *,
        rate: float,
        weight_decay: float,
        momentum: float,
    ):
        # equal shapes together: ranks that own a matrix each are done at the same time
        ordered = sorted(named, key=lambda pair: (-pair[1].numel(), tuple(pair[1].shape), pair[0]))
        super().__init__(ordered, {"lr": rate, "weight_decay": weight_decay, "momentum": momentum})
        self._placement = placement

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all matrices that have a gradient."""
        for group in self.param_groups:
            held = dict(zip(group["param_names"], group["params"], strict=True))
            directions = self._placement.change_wholes(self._momenta(held, group["momentum"]), orthogonal)
            for name, direction in directions:
                own, larger = self._plain(name, held[name]), max(held[name].shape)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.add_(direction, alpha=-group["lr"] * (0.2 * math.sqrt(larger)))

    def _momenta(self, held: dict[str, nn.Parameter], momentum: float) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of X, matrix by matrix, while the momentum moves on."""
        for name, parameter in held.items():
            if parameter.grad is None:
                continue
            state: dict[str, Any] = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            gradient, kept = self._plain(name, parameter.grad), self._plain(name, state["momentum_buffer"])
            kept.lerp_(gradient, 1 - momentum)
            yield name, gradient.lerp(kept, momentum).bfloat16()

    def _plain(self, name: str, tensor: Tensor) -> Tensor:
        """What this rank holds of a tensor that lies as the parameter `name` does, sharing memory."""
        return self._placement.pieces({name: tensor})[0][name]


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one, for a bfloat16 matrix, which is written over."""
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=LEAST_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
