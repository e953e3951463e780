"""The fast way through a model on a CPU: the same losses, the same gradients, the same weights in the end."""

import copy
from dataclasses import replace

import pytest
import torch
from train_world import TOY

from puna.kernels import training_rows
from puna.model.llama import Llama, WithinDocuments
from puna.model.reward import RewardModel
from puna.model.sizes import LlamaConfig
from puna.parallel.whole import Whole, WholeReading
from puna.train.fused import FusedLlama, fuse
from puna.train.objectives.rows import Rows, next_token_loss
from puna.train.optimizers import OptimizerConfig, optimizers

pytestmark = pytest.mark.skipif(not training_rows.available(), reason="no C++ kernels here")

GROUPED = LlamaConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=208, context=128, rope_theta=500.0
)
SHAPES = {
    "grouped": GROUPED,
    "tied": replace(GROUPED, tied=True),
    "every head its own": replace(GROUPED, n_kv_heads=4),
    "one for all": replace(GROUPED, n_kv_heads=1),
}


class Objective:
    loss = staticmethod(next_token_loss)


def some_rows(vocabulary: int, length: int = 48, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (3, length + 1), generator=generator)
    documents = torch.tensor([[0] * 11 + [1] * (length - 10), [4] * (length + 1), [0] * 40 + [-1] * (length - 39)])
    weights = (documents[:, 1:] == documents[:, :-1]).float()
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=weights)


def gradients(model, rows) -> tuple[float, dict[str, torch.Tensor]]:
    placement = Whole(model)
    loss, _ = placement.backward(Objective, [rows])
    return loss, {name: p.grad for name, p in placement.named_parameters()}


def exact(model, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """In float32 throughout."""
    model = copy.deepcopy(model)
    loss, _ = next_token_loss(WholeReading(model, rows), rows, rows.counts)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("length", [48, 45])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_are_as_near_to_the_exact_ones_as_autocasts(shape, length):
    config = SHAPES[shape]
    plain = Llama(config).init_weights(0)
    fast = fuse(copy.deepcopy(plain))
    assert type(fast) is FusedLlama and type(plain) is Llama
    rows = some_rows(config.vocab_size, length)
    truth, slow, ours = exact(plain, rows), gradients(plain, rows), gradients(fast, rows)
    assert ours[0] == pytest.approx(truth[0], abs=2e-3)
    assert ours[1].keys() == truth[1].keys()
    for name, expected in truth[1].items():
        error, theirs = ((found[1][name] - expected).norm() / expected.norm() for found in (ours, slow))
        assert error < max(1.5 * theirs, 0.01), (name, float(error), float(theirs))


def test_gradients_of_micro_batches_add_up(monkeypatch):
    model = fuse(Llama(GROUPED).init_weights(0))
    rows = [some_rows(208, seed=s) for s in range(3)]
    apart = [gradients(copy.deepcopy(model), r) for r in rows]
    placement = Whole(copy.deepcopy(model))
    loss, _ = placement.backward(Objective, rows)
    shares = [r.weight / sum(r.weight for r in rows) for r in rows]
    assert loss == pytest.approx(sum(a[0] * s for a, s in zip(apart, shares)), abs=1e-5)
    for name, parameter in placement.named_parameters():
        expected = sum(a[1][name] * s for a, s in zip(apart, shares))
        assert (parameter.grad - expected).norm() < 0.01 * expected.norm(), name


def test_the_copies_follow_the_masters():
    model = fuse(Llama(GROUPED).init_weights(0))
    rows = some_rows(208)
    before, _ = gradients(model, rows)
    with torch.no_grad():
        model.layers[1].attention.wq.weight.mul_(3)
    changed, _ = gradients(model, rows)
    fresh, _ = gradients(fuse(copy.deepcopy(model)), rows)
    assert changed == fresh != before


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_goes_the_way_that_the_model_alone_goes(kind):
    finals = []
    for way in (fuse, lambda model: model):
        placement = Whole(way(Llama(GROUPED).init_weights(0)))
        makers = optimizers(placement, OptimizerConfig(kind=kind), 3e-3)
        losses = []
        for _ in range(12):
            losses.append(placement.backward(Objective, [some_rows(208)])[0])
            placement.clip(1.0)
            for optimizer in makers:
                optimizer.step()
        finals.append(losses)
    assert finals[0][-1] < finals[0][0] - 0.5
    assert finals[0] == pytest.approx(finals[1], abs=0.02)


def test_without_gradients_it_keeps_nothing_and_says_the_same():
    model = fuse(Llama(GROUPED).init_weights(0))
    rows = some_rows(208)
    with_gradients, _ = gradients(model, rows)
    assert Whole(model).validate(Objective, [rows]) == with_gradients


def test_a_reward_model_goes_the_fast_way_too():
    model = fuse(RewardModel(Llama(GROUPED).init_weights(0)))
    assert type(model.llama) is FusedLlama


def test_widths_that_do_not_fit_and_attention_of_another_kind_take_the_models_way():
    assert type(fuse(Llama(replace(GROUPED, ffn_dim=90)))) is Llama
    assert type(fuse(Llama(TOY))) is Llama, "heads of 8"
    model = fuse(Llama(GROUPED).init_weights(0))
    rows = some_rows(208)
    seen = []

    def attend(layer, q, k, v):
        seen.append(layer)
        return WithinDocuments(rows.documents)(layer, q, k, v)

    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(rows.tokens, rows.positions, attend)
    assert seen == [0, 1, 2]
