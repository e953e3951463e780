"""Each C++ kernel beside PyTorch, on every instruction set that the processor has."""

import ctypes
import threading

import pytest
import torch
import torch.nn.functional as F

from puna.errors import ConfigError
from puna.kernels import native
from puna.kernels.native import library
from puna.quant.groups import dequantise_matrix, quantise_matrix, unpack

SHAPES = [(64, 64), (100, 96), (1000, 2048), (130, 344)]


def relative(a, b):
    return float((a - b).norm() / b.norm())


def matrix(team, kind, weight, group=32, offsets=None):
    """`weight` in a kind, and the numbers that it then stands for."""
    rows, columns = weight.shape
    if kind in ("float32", "bfloat16"):
        return native.Matrix(kind, rows, columns).floats(team, weight), weight.to(getattr(torch, kind)).float()
    packed = quantise_matrix(weight, 8 if kind == "split" else int(kind[3:]), group)
    made = native.Matrix(kind, rows, columns, group, offsets is not None)
    made.codes(team, packed.codes, packed.scales, offsets)
    numbers = dequantise_matrix(packed)
    if offsets is not None:
        numbers = numbers + offsets.float().repeat_interleave(group, 1)[:, :columns]
    return made, numbers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int6", "int4", "split"])
def test_a_product_is_that_of_the_numbers_the_matrix_stands_for(team, kind, shape):
    weight, x = torch.randn(shape) * 0.02, torch.randn(37, shape[1])
    made, numbers = matrix(team, kind, weight)
    assert torch.equal(made.rows_of(torch.arange(shape[0])), numbers)
    # What rounding the activations costs: none, to 8 bits of mantissa, to codes in groups of 32.
    tolerance = {"float32": 2e-6, "bfloat16": 3e-3}.get(kind, 8e-3)
    assert relative(made.multiply(team, x), x @ numbers.T) < tolerance


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
def test_groups_of_other_sizes_and_with_offsets(team, kind, group):
    weight, x = torch.randn(96, 300) * 0.02, torch.randn(17, 300)
    offsets = (torch.randn(96, -(-300 // group)) * 0.01).half()
    made, numbers = matrix(team, kind, weight, group, offsets)
    assert torch.allclose(made.rows_of(torch.arange(96)), numbers, atol=1e-7)
    together = made.multiply(team, x)
    assert relative(together, x @ numbers.T) < 1.2e-2
    for cut in range(1, 8):
        assert torch.equal(together, torch.cat([made.multiply(team, part) for part in x.split(cut)]))


@pytest.mark.parametrize("rows", [64, 192, 1000])
def test_the_number_of_threads_changes_no_bit_and_leaves_no_row_out(instructions, rows):
    weight, x = torch.randn(rows, 96), torch.randn(9, 96)
    results = []
    for threads in (1, 2, 3, 7):  # more of them than there are pieces, too
        team = native.Team(threads)
        made, _ = matrix(team, "int4", weight)
        results += [made.multiply(team, x) for _ in range(20)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int6", "int4", "split"])
def test_a_row_gets_the_same_bits_alone_and_among_others(team, kind):
    x = torch.randn(40, 352)
    made, _ = matrix(team, kind, torch.randn(200, 352))
    together = made.multiply(team, x)
    for cut in (1, 2, 3, 7, 12, 13, 25):
        assert torch.equal(together, torch.cat([made.multiply(team, part) for part in x.split(cut)]))


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_8_bit_codes_in_halves_give_the_bits_of_whole_ones(team, shape, group):
    packed = quantise_matrix(torch.randn(shape), 8, group)
    x = torch.randn(17, shape[1])
    whole, split = (native.Matrix(kind, *shape, group).codes(team, *packed.tensors) for kind in ("int8", "split"))
    assert torch.equal(split.multiply(team, x), whole.multiply(team, x))
    assert torch.equal(split.multiply(team, x[:1]), whole.multiply(team, x[:1]))
    assert split.upper_bytes < 0.6 * split.bytes and whole.upper_bytes == whole.bytes


def test_blocks_of_a_gguf_file_in_halves(team):
    blocks = torch.randint(0, 256, (48, 3, 34), dtype=torch.uint8)
    blocks[..., :2] = torch.rand(48, 3, 1).half().view(torch.uint8)
    x = torch.randn(4, 96)
    whole, split = (native.Matrix(kind, 48, 96, 32).blocks(team, blocks.flatten(1)) for kind in ("int8", "split"))
    assert torch.equal(split.multiply(team, x), whole.multiply(team, x))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    "kind, group, together", [("int8", 32, 32), ("int4", 32, 128), ("int4", 64, 128), ("int4", 256, 256)]
)
def test_integer_products_are_the_formula_exactly(team, kind, group, together, offset):
    """Codes, scales and the sums of the activations' codes, written out in PyTorch; a scale of theirs for `together` columns."""
    weight, x = torch.randn(64, 512 + 2 * group), torch.randn(6, 512 + 2 * group)
    x[:, ::group] *= 10.0 ** torch.randint(-2, 2, (6, 1))  # sizes differ from group to group
    packed = quantise_matrix(weight, int(kind[3:]), group)
    offsets = torch.randn(packed.scales.shape).half() if offset else None
    filled = F.pad(x, (0, -x.shape[1] % together)).unflatten(1, (-1, together))
    largest = filled.abs().amax(-1, keepdim=True)
    codes = (filled * torch.full_like(largest, 127).div(largest)).round()  # `127 / x` is rounded twice
    rounded = (codes.double() * largest.double() / 127).flatten(1)[:, : x.shape[1]].unflatten(1, (-1, group))
    numbers = unpack(packed).double().unflatten(1, (-1, group)) * packed.scales.double()[..., None]
    if offset:
        numbers += offsets.double()[..., None]
    expected = torch.einsum("ngi,rgi->nr", rounded, numbers).float()
    made, _ = matrix(team, kind, weight, group, offsets)
    assert torch.allclose(made.multiply(team, x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_activations_of_zero_and_extreme_sizes_stay_finite(team):
    made, numbers = matrix(team, "int4", torch.randn(64, 64))
    x = torch.zeros(3, 64)
    x[1], x[2] = 1e15, 1e-15
    y = made.multiply(team, x)
    assert torch.equal(y[0], torch.zeros(64)) and y.isfinite().all()
    for row in (1, 2):
        assert relative(y[row], x[row] @ numbers.T) < 1e-2


@pytest.mark.parametrize("width, heads, kv_heads", [(64, 8, 2), (128, 4, 4), (32, 6, 2), (80, 4, 1), (16, 3, 3)])
@pytest.mark.parametrize("kind, tolerance", [("float32", 2e-6), ("bfloat16", 6e-3), ("int8", 2e-2)])
def test_attention_reads_the_positions_up_to_its_own(team, kind, tolerance, width, heads, kv_heads):
    n = 150
    k, v, q = torch.randn(n, kv_heads, width), torch.randn(n, kv_heads, width), torch.randn(n, heads, width)
    cache, blocks = native.Cache(kind, 2, 20, kv_heads, width), torch.randperm(20)[:12].int()
    cache.write(1, blocks, 0, k, v)
    read = cache.attend(team, 1, blocks, 0, q)
    shared = [x.transpose(0, 1)[None].repeat_interleave(heads // kv_heads, 1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *shared, is_causal=True)[0].transpose(0, 1)
    assert relative(read, expected) < tolerance
    assert torch.equal(read, torch.cat([cache.attend(team, 1, blocks, i, q[i : i + 1]) for i in range(n)]))


def test_attention_never_reads_what_other_sequences_left_in_a_block(team):
    cache, blocks = native.Cache("float32", 1, 4, 1, 64), torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    cache.write(0, blocks, 0, torch.full((64, 1, 64), 1e30), torch.full((64, 1, 64), 1e30))
    k, v, q = torch.randn(19, 1, 64), torch.randn(19, 1, 64), torch.randn(1, 2, 64)
    cache.write(0, blocks, 0, k, v)
    fresh = native.Cache("float32", 1, 4, 1, 64)
    fresh.write(0, blocks, 0, k, v)
    assert torch.equal(cache.attend(team, 0, blocks, 18, q), fresh.attend(team, 0, blocks, 18, q))


def test_attention_to_scores_far_apart(team):
    k = torch.randn(70, 1, 64) * 40
    v, q = torch.randn(70, 1, 64), torch.randn(1, 1, 64) * 40
    cache, blocks = native.Cache("float32", 1, 5, 1, 64), torch.arange(5, dtype=torch.int32)
    cache.write(0, blocks, 0, k, v)
    weights = ((q[0] @ k[:, 0].T) / 8).softmax(-1)
    assert torch.allclose(cache.attend(team, 0, blocks, 69, q)[0], weights @ v[:, 0], atol=1e-4)


@pytest.mark.parametrize("n, k", [(128256, 40), (1000, 1000), (17, 5), (16, 1)])
def test_the_k_largest_come_in_order_ties_by_index(team, n, k):
    logits = torch.randn(3, n) * 3
    logits[1] = logits[1].round()  # many ties
    values, indices, sums = native.top(team, logits, k)
    expected, order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :k]) and torch.equal(indices.long(), order[:, :k])
    assert torch.allclose(sums, logits.logsumexp(-1), atol=1e-4)


def test_small_kernels_are_their_formulas(instructions):
    x, weight = torch.randn(4, 100) * 4, torch.rand(100)
    assert torch.allclose(native.rms_norm(x, weight, 1e-5), F.rms_norm(x, (100,), weight, 1e-5), atol=1e-5)
    a, b = torch.randn(4, 96) * 20, torch.randn(4, 96)
    assert torch.allclose(native.gate(a, b), F.silu(a) * b, atol=1e-5, rtol=1e-5)
    heads, angles = torch.randn(5, 64), torch.rand(5, 32) * 100
    turned = torch.view_as_complex(heads.view(5, 32, 2)) * torch.polar(torch.ones(5, 32), angles)
    turns = torch.stack((angles.cos(), angles.sin()), -1).flatten(1)
    assert torch.allclose(native.rotate(heads, turns), torch.view_as_real(turned).flatten(1), atol=1e-5)


def test_an_unknown_instruction_set_is_refused_by_name(instructions):
    with pytest.raises(ConfigError, match="AVX9000"):
        native.choose("AVX9000")


def test_an_idle_team_uses_no_time_and_ends(instructions):
    import time

    team = native.Team(2)
    made, _ = matrix(team, "float32", torch.randn(64, 64))
    made.multiply(team, torch.randn(4, 64))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
    count = threading.active_count()
    del team
    assert threading.active_count() == count  # its threads are not Python's; deleting it must not hang either


def test_the_library_knows_nothing_of_python(instructions):
    """No symbol of Python or PyTorch is needed to load it."""
    assert ctypes.CDLL(str(library.FILE))
