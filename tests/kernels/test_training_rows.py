"""Each C++ kernel of a training step beside PyTorch's own formula, on every instruction set that the processor has."""

import pytest
import torch
import torch.nn.functional as F

from puna.kernels import training_rows as rows
from puna.kernels.cross_entropy import cross_entropy
from puna.model.llama import document_mask, rotate

pytestmark = pytest.mark.usefixtures("instructions")
BRAIN = torch.bfloat16


def close(a, b, most=0.006):
    """Equal but for the rounding to bfloat16, which is 1/256 at the worst."""
    assert a.shape == b.shape
    a, b = a.detach().float(), b.detach().float()
    error = float((a - b).norm() / b.norm())
    assert error < most, error


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("threads", [1, 2])
def test_norm_and_its_gradient(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, delta, weight = torch.randn(77, 48), torch.randn(77, 48).to(BRAIN), torch.rand(48) + 0.5
    total, normed, factors = rows.norm(x, delta, weight, 1e-5)
    torch.testing.assert_close(total, x + delta.float())
    plain = total.clone().requires_grad_()
    gain = weight.clone().requires_grad_()
    made = F.rms_norm(plain, (48,), gain, 1e-5)
    close(normed, made)
    d, dx, dweight = torch.randn(77, 48).to(BRAIN), torch.randn(77, 48), torch.ones(48)
    made.backward(d.float())
    expected = dx + plain.grad
    rounded = rows.norm_back(d, total, weight, factors, dx, dweight)
    torch.testing.assert_close(dx, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dweight, 1 + gain.grad, atol=1e-4, rtol=1e-4)
    close(rounded, expected)
    torch.set_num_threads(before)


def test_the_first_norm_has_nothing_to_add():
    x = torch.randn(5, 32)
    total, normed, _ = rows.norm(x, None, torch.ones(32), 1e-5)
    assert total is x
    close(normed, F.rms_norm(x, (32,), None, 1e-5))


def test_heads_are_split_turned_and_joined_by_the_inverse():
    B, T, H, K, E = 2, 20, 4, 2, 16
    qkv = torch.randn(B * T, (H + 2 * K) * E).to(BRAIN)
    positions = torch.cat([torch.arange(12), torch.arange(8)]).expand(B, T).contiguous()
    frequencies = 1 / 100 ** torch.linspace(0, 1, E // 2)
    table = rows.turns(frequencies, T)
    q, k, v = rows.split(qkv, (B, T, H, K, E), table, positions)
    angles = positions[..., None, None] * frequencies
    rotation = torch.polar(torch.ones_like(angles), angles)
    heads = qkv.view(B, T, -1, E)
    close(q, rotate(heads[:, :, :H], rotation).transpose(1, 2) * E**-0.5)
    close(k, rotate(heads[:, :, H : H + K], rotation).transpose(1, 2))
    assert torch.equal(v, heads[:, :, H + K :].transpose(1, 2))
    close(rows.join(q * E, k, v, table, positions), qkv)  # a rotation's gradient is its inverse; q has 1/sqrt(E) twice
    last = rows.heads_last(q)
    assert torch.equal(last.view(B, T, H, E), q.transpose(1, 2))
    assert torch.equal(rows.heads_first(last, (B, H, T, E)), q)


def test_softmax_sees_its_document_and_nothing_ahead():
    B, H, T = 2, 3, 48
    documents = torch.tensor([[0] * 7 + [1] * 25 + [2] * 16, [5] * 48])
    starts = torch.tensor([[0] * 7 + [7] * 25 + [32] * 16, [0] * 48])
    scores = (4 * torch.randn(B, H, T, T)).to(BRAIN)
    plain = scores.float().masked_fill(~document_mask(documents), float("-inf")).requires_grad_()
    expected = plain.softmax(-1)
    weights = rows.softmax_(scores.clone(), starts)
    close(weights, expected)
    assert torch.equal(weights == 0, (expected == 0) | (weights == 0)), "zero wherever nothing may be seen"
    d = torch.randn(B, H, T, T).to(BRAIN)
    expected.backward(d.float())
    gradient = rows.softmax_back_(weights, d.clone(), starts)
    close(gradient, plain.grad.nan_to_num(0), 0.01)
    assert not gradient[expected == 0].any()


def test_swiglu_and_its_gradient():
    gate_up, d = (3 * torch.randn(33, 64)).to(BRAIN), torch.randn(33, 32).to(BRAIN)
    plain = gate_up.float().requires_grad_()
    made = F.silu(plain[:, :32]) * plain[:, 32:]
    close(rows.swiglu(gate_up), made)
    made.backward(d.float())
    close(rows.swiglu_back_(gate_up, d), plain.grad)


def test_large_gates_stay_finite():
    gate_up = torch.tensor([[300.0, -300.0, 88.0, -88.0] * 4 + [1.0] * 16]).to(BRAIN)
    assert rows.swiglu(gate_up).isfinite().all()
    assert rows.swiglu_back_(gate_up, torch.ones(1, 16).to(BRAIN)).isfinite().all()


def test_token_losses_and_the_gradient_in_their_place():
    logits, targets, weights = (5 * torch.randn(40, 64)).to(BRAIN), torch.randint(0, 64, (40,)), torch.rand(40)
    plain = logits.float().requires_grad_()
    losses = F.cross_entropy(plain, targets, reduction="none")
    (losses * weights).sum().backward()
    kept = logits.clone()
    torch.testing.assert_close(rows.token_losses_(kept, targets, weights, gradient=False), losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(
        rows.token_losses_(logits, targets, weights, gradient=True), losses, atol=1e-5, rtol=1e-5
    )
    close(logits, plain.grad)


def test_a_token_that_is_certain_and_one_that_is_hopeless():
    logits = torch.full((2, 32), -50.0).to(BRAIN)
    logits[0, 3] = logits[1, 4] = 50.0
    losses = rows.token_losses_(logits, torch.tensor([3, 3]), torch.ones(2), gradient=True)
    torch.testing.assert_close(losses, torch.tensor([0.0, 100.0]))
    assert logits.isfinite().all() and logits[1, 3] == -1 and logits[1, 4] == 1


@pytest.mark.parametrize("zeros", [False, True])
def test_cross_entropy_is_the_same_either_way(zeros, monkeypatch):
    monkeypatch.setattr("puna.kernels.cross_entropy.CHUNK", 16)
    monkeypatch.setattr("puna.kernels.cross_entropy.LOGITS", 0)
    monkeypatch.setattr("puna.kernels.cross_entropy.FEWEST", 16)
    targets, weights = torch.randint(0, 96, (50,)), torch.rand(50)
    if zeros:
        weights[torch.rand(50) < 0.5] = 0
    found = []
    for impl in ("reference", "native"):
        torch.manual_seed(1)
        hidden, output = torch.randn(50, 32).to(BRAIN).requires_grad_(), torch.randn(96, 32, requires_grad=True)
        loss = cross_entropy(hidden, output, targets, weights, impl=impl)
        loss.backward()
        found.append((loss.detach(), hidden.grad, output.grad))
    for reference, native in zip(*found, strict=True):
        close(native[None] if native.ndim == 0 else native, reference[None] if reference.ndim == 0 else reference)
