"""The products and the attention of a training step beside PyTorch's, on every instruction set that the processor has."""

import pytest
import torch

from puna.kernels import training_products as products
from puna.kernels import training_rows as rows
from puna.model.llama import document_mask, rotate

pytestmark = pytest.mark.usefixtures("instructions")
BRAIN = torch.bfloat16


def far(a, b) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens, inputs, parts", [(77, 48, (32, 16, 16)), (5, 2144, (80,)), (2049, 64, (176, 96))])
def test_products_are_those_of_the_rounded_masters(threads, tokens, inputs, parts, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    masters = [torch.randn(n, inputs) for n in parts]
    whole = torch.cat(masters).to(BRAIN).double()
    weight = products.Weight.like(masters, "native").refresh(masters)
    x, d = torch.randn(tokens, inputs).to(BRAIN), torch.randn(tokens, sum(parts)).to(BRAIN)
    assert far(weight.forward(x), x.double() @ whole.t()) < 0.003
    assert far(weight.backward(d), d.double() @ whole) < 0.003
    gradient = products.outer(d, x, "native")
    expected = d.double().t() @ x.double()
    assert gradient.dtype == torch.float32 and far(gradient, expected) < 1e-5
    assert products.outer(d, x, "native", gradient) is gradient and far(gradient, 2 * expected) < 1e-5


def documents_of(T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of a single document, one of several; where each token's begins."""
    border = [0, 3, T // 3, T // 3 + 1, T - 5]
    second = torch.bucketize(torch.arange(T), torch.tensor(border), right=True) - 1
    return torch.stack([torch.zeros(T, dtype=torch.int64), second]), torch.stack(
        [torch.zeros(T, dtype=torch.int64), torch.tensor(border)[second]]
    )


@pytest.mark.parametrize("T, H, K, E", [(16, 2, 2, 16), (208, 4, 2, 48), (112, 3, 1, 64), (272, 1, 1, 80)])
def test_attention_and_its_gradient_are_as_near_to_the_exact_ones_as_pytorchs(T, H, K, E):
    B = 2
    documents, starts = documents_of(T)
    positions = torch.arange(T) - starts
    frequencies = 1 / 100 ** torch.linspace(0, 1, E // 2)
    heads = products.Heads((B, T, H, K, E), rows.turns(frequencies, T), positions, starts)
    qkv, d = (2 * torch.randn(B * T, (H + 2 * K) * E)).to(BRAIN), torch.randn(B * T, H * E).to(BRAIN)

    exact = qkv.float().requires_grad_()
    q, k, v = exact.view(B, T, -1, E).split([H, K, K], 2)
    angles = positions[..., None, None] * frequencies
    rotation = torch.polar(torch.ones_like(angles), angles)
    q, k, v = rotate(q, rotation), rotate(k, rotation).repeat_interleave(H // K, 2), v.repeat_interleave(H // K, 2)
    mask = torch.where(document_mask(documents), 0.0, float("-inf"))
    weights = (torch.einsum("bthe,bshe->bhts", q, k) * E**-0.5 + mask).softmax(-1)
    expected = torch.einsum("bhts,bshe->bthe", weights, v).reshape(B * T, H * E)
    expected.backward(d.float())

    errors = {}
    for impl in ("reference", "native"):
        read, kept = products.attend(qkv, heads, impl)
        gradient = products.attend_back(d, kept, heads, impl)
        errors[impl] = far(read, expected), far(gradient, exact.grad)
    assert errors["native"][0] < 0.01 and errors["native"][1] < 0.02, errors
    assert all(ours <= theirs for ours, theirs in zip(errors["native"], errors["reference"])), errors


def test_what_may_not_be_seen_changes_nothing():
    T, E = 64, 16
    _, starts = documents_of(T)
    table = rows.turns(1 / 100 ** torch.linspace(0, 1, E // 2), T)
    heads = products.Heads((2, T, 1, 1, E), table, torch.arange(T) - starts, starts)
    qkv = torch.randn(2 * T, 3 * E).to(BRAIN)
    before, _ = products.attend(qkv, heads, "native")
    changed = qkv.clone().view(2, T, -1)
    changed[0, 40:], changed[1, T - 5 :] = 100.0, -100.0
    after, _ = products.attend(changed.flatten(0, 1), heads, "native")
    before, after = before.view(2, T, E), after.view(2, T, E)
    assert torch.equal(before[0, :40], after[0, :40]) and torch.equal(before[1, : T - 5], after[1, : T - 5])
    assert not torch.equal(before[0, 40:], after[0, 40:])


def test_the_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    masters = [torch.randn(192, 96)]
    weight = products.Weight.like(masters, "native").refresh(masters)
    x, d = torch.randn(301, 96).to(BRAIN), torch.randn(301, 192).to(BRAIN)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((weight.forward(x), weight.backward(d), products.outer(d, x, "native")))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens, inputs, width", [(1, 16, 16), (77, 48, 80), (301, 2144, 32), (97, 64, 208)])
def test_what_follows_a_product_at_once_is_what_follows_it_later(threads, tokens, inputs, width, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(tokens, inputs).to(BRAIN)
    stream, scale, factors = torch.randn(tokens, width), torch.randn(width), torch.rand(tokens)
    weight = laid_out(width, inputs)
    together = weight.norm(x, stream, scale, 1e-5)
    apart = rows.norm(stream, weight.forward(x), scale, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))

    back = laid_out(inputs, width)
    found = []
    for way in ("together", "apart"):
        dx, dscale = stream.clone(), scale.clone()
        if way == "together":
            made = back.norm_back(x, stream, scale, factors, dx, dscale)
        else:
            made = rows.norm_back(back.backward(x), stream, scale, factors, dx, dscale)
        found.append((made, dx, dscale))
    (made, dx, dscale), (expected, expected_dx, expected_dscale) = found
    assert torch.equal(made, expected) and torch.equal(dx, expected_dx)
    assert far(dscale - scale, expected_dscale - scale) < 1e-5  # summed in another order

    wide = laid_out(2 * width, inputs)
    gate_up, gated = wide.swiglu(x)
    assert torch.equal(gate_up, wide.forward(x)) and torch.equal(gated, rows.swiglu(gate_up))
    expected = rows.swiglu_back_(gate_up.clone(), back.backward(x))
    assert torch.equal(back.swiglu_back_(x, gate_up), expected)


def laid_out(outputs: int, inputs: int) -> products.Weight:
    masters = [torch.randn(outputs, inputs)]
    return products.Weight.like(masters, "native").refresh(masters)


@pytest.mark.parametrize("tokens, outputs, inputs", [(1, 16, 16), (1027, 224, 32), (77, 32, 208), (2500, 304, 144)])
def test_a_gradient_is_the_same_however_it_is_cut(tokens, outputs, inputs, monkeypatch):
    x, d = torch.randn(tokens, inputs).to(BRAIN), torch.randn(tokens, outputs).to(BRAIN)
    found = []
    for threads in (1, 2, 3, 4, 6):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(products.outer(d, x, "native"))
    assert far(found[0], d.double().t() @ x.double()) < 1e-5
    assert all(torch.equal(found[0], other) for other in found)


def test_a_heavy_matrix_is_the_same_for_any_number_of_threads(monkeypatch):
    weight, x = laid_out(2048, 2064), torch.randn(26, 2064).to(BRAIN)  # cut among threads at once, in long sums
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(weight.forward(x))
    assert all(torch.equal(found[0], other) for other in found)
