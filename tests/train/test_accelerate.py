"""Choices that make a step faster or smaller change no number but by rounding, and no name."""

import copy
import os
import sys

import pytest
import torch
from train_world import TOY

from puna.errors import ConfigError, MissingExtra
from puna.model.llama import Llama
from puna.model.sizes import SIZES
from puna.parallel.whole import Whole
from puna.train import hardware
from puna.train.accelerate import SpeedConfig, accelerate, recomputed_flops_per_token, require_float8, to_float8
from puna.train.objectives.rows import Rows, next_token_loss

CPU = torch.device("cpu")


class Objective:
    loss = staticmethod(next_token_loss)


def rows() -> Rows:
    tokens = torch.randint(0, TOY.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 9 + [1] * 23, [0] * 32])
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents, weights=torch.ones(2, 32))


def gradients(model) -> tuple[float, dict]:
    placement = Whole(model)
    loss, _ = placement.backward(Objective, [rows()])
    return loss, {name: p.grad for name, p in placement.named_parameters()}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_bits_and_are_not_kept(recompute):
    plain = Llama(TOY).init_weights(0)
    saving = accelerate(copy.deepcopy(plain), SpeedConfig(recompute=recompute), CPU)
    kept = []
    for model in (plain, saving):
        bytes_kept = 0

        def keep(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = gradients(model)
        kept.append((found, bytes_kept))
    (expected, all_bytes), (found, few_bytes) = kept
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    assert few_bytes < all_bytes


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PUNA_SLOW"), reason="compiles for minutes; PUNA_SLOW=1 runs it")
def test_compiled_blocks_give_the_same_numbers():
    plain = Llama(TOY).init_weights(0)
    compiled = accelerate(copy.deepcopy(plain), SpeedConfig(compiled=True), CPU)
    expected, found = gradients(plain), gradients(compiled)
    assert found[0] == pytest.approx(expected[0], abs=1e-3)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_a_step_that_is_faster_than_the_measured_peak_raises_it_and_no_data_sheet_s(monkeypatch):
    monkeypatch.setattr(hardware, "_measured_peak", lambda: 5e9)  # on a machine that others used
    monkeypatch.setattr(hardware, "_reached", 0.0)
    monkeypatch.setattr(hardware, "_known_peak", lambda: None)
    assert [hardware.peak_flops(reached) for reached in (1e9, 8e9, 2e9)] == [5e9, 8e9, 8e9]
    monkeypatch.setattr(hardware, "_known_peak", lambda: 6e9)
    assert hardware.peak_flops(7e9) == 6e9


def test_float8_is_refused_where_it_cannot_run():
    with pytest.raises(ConfigError, match=r"float8=true needs a GPU .* this run is on a CPU\nhint: take an NVIDIA GPU"):
        accelerate(Llama(TOY), SpeedConfig(float8=True), CPU)
    require = pytest.MonkeyPatch()
    require.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    require.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match=r"A100 \(compute capability 8.0\)"):
        require_float8(torch.device("cuda"))
    require.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_float8(torch.device("cuda"))
    require.undo()


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(MissingExtra, match=r"torchao.*\n.*puna\[float8\]"):
        to_float8(Llama(TOY))


def test_float8_takes_the_layers_matrices_and_keeps_their_names():
    pytest.importorskip("torchao")
    plain = Llama(TOY).init_weights(0)
    model = copy.deepcopy(plain)
    to_float8(model, emulate=True)  # the numbers of float8, on a CPU
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["layers.0.attention.wq"] == kinds["layers.1.feed_forward.w2"] == "Float8Linear"
    assert kinds["output"] == "Linear"
    expected, found = gradients(plain), gradients(model)
    assert found[0] == pytest.approx(expected[0], abs=0.02) and found[0] != expected[0]


def test_recomputing_everything_costs_the_layers_forward_pass_again():
    config = SIZES["llama-3.1-8b"]
    whole = config.train_flops_per_token(8192)
    assert recomputed_flops_per_token(config, 8192, "selective") == 0
    share = recomputed_flops_per_token(config, 8192, "full") / whole
    assert 0.30 < share < 1 / 3
