"""Muon as it is written here: PyTorch's, to the bit, and what it is for."""

import pytest
import torch
from train_world import TOY

from puna.model.llama import Llama
from puna.parallel.whole import Whole
from puna.train.muon import Muon, orthogonal
from puna.train.optimizers import OptimizerConfig, optimizers


def test_it_changes_matrices_as_pytorchs_does_to_the_bit():
    one, other = (Llama(TOY).init_weights(0) for _ in range(2))
    [ours] = [o for o in optimizers(Whole(one), OptimizerConfig(kind="muon"), 1e-2) if isinstance(o, Muon)]
    matrices = [p for name, p in other.named_parameters() if p.ndim > 1 and "layers." in name]
    theirs = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_singular_values_come_out_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(x.bfloat16()).float())
    assert values.min() > 0.5 and values.max() < 1.3
