"""Does Muon change weights alike on every layout? What `parallel.py` measures in its column `muon`.

Twice: with gradients that are given, whole, and cut as the layout says, two steps must change the weights as PyTorch's own
Muon in one process does, to the bit. With gradients that the layout computes, what differs is again the order of sums; but
Muon rounds the momentum to bfloat16, and lifts its smallest directions by up to a hundred: a number that falls to the other
side of a border between two bfloat16 numbers is seen in the update. Hence a tolerance of its own.
"""

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from puna.model.llama import Llama
from puna.parallel.sharded import Sharded
from puna.parallel.whole import Whole
from puna.train.muon import Muon
from puna.train.objectives.rows import Rows
from puna.train.optimizers import OptimizerConfig, optimizers

TOLERANCE = 0.05  # of a weight's change in two steps, beside the largest change in its matrix
RATE, STEPS = 1e-2, 2
MUON = OptimizerConfig(kind="muon")


def given_gradients(placed: Sharded, seed: int) -> list[str]:
    """The matrices that Muon changes otherwise than PyTorch's does; told on the first rank."""
    whole = Llama(placed.config).init_weights(seed)
    matrices = {name: p for name, p in whole.named_parameters() if p.ndim > 1 and "layers." in name}
    theirs = torch.optim.Muon(
        matrices.values(),
        lr=RATE,
        weight_decay=MUON.weight_decay,
        momentum=MUON.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    [ours] = [made for made in optimizers(placed, MUON, RATE) if isinstance(made, Muon)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        for parameter in matrices.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for name, parameter in placed.named_parameters():
            if name in matrices:
                parameter.grad = placed.part(name, matrices[name].grad)
        ours.step()
        theirs.step()
    placed.updated()
    moved = dict(placed.join(placed.named_parameters()))
    return [name for name in moved if name in matrices and not torch.equal(moved[name], matrices[name])]


def own_gradients(placed: Sharded, data: Any, mine: Rows, rows: Rows, seed: int) -> tuple[float, str]:
    """The largest difference of a change of a weight in two steps, beside one process's, and of which matrix; on the first
    rank. Both optimizers take their steps."""
    moved = _changes(placed, data, mine)
    if not moved:
        return 0.0, ""
    alone = Whole(Llama(placed.config).init_weights(seed))
    with mock.patch("puna.parallel.whole.products_in_bf16", lambda _device: contextlib.nullcontext()):
        return difference(moved, _changes(alone, data, rows))


def _changes(placement: Any, data: Any, rows: Rows) -> dict[str, Tensor]:
    made = optimizers(placement, MUON, RATE)
    before = {name: p.clone() for name, p in placement.join((n, p.detach()) for n, p in placement.named_parameters())}
    for _ in range(STEPS):
        placement.backward(data, [rows])
        for optimizer in made:
            optimizer.step()
        placement.updated()
    after = dict(placement.join((n, p.detach()) for n, p in placement.named_parameters()))
    return {name: after[name] - before[name] for name in before if "layers." in name and after[name].ndim > 1}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of any tensor, relative to the largest number of the wanted one, and whose."""
    assert found.keys() == wanted.keys()
    each = {name: ((found[name] - w).abs().max() / w.abs().max()).item() for name, w in wanted.items()}
    worst = max(each, key=lambda name: each[name] if each[name] == each[name] else float("inf"))
    return each[worst], worst
