"""Paged attention: the reference against attention written out, the Triton kernels against the reference."""

import numpy as np
import pytest
import torch

from puna.kernels.attention import attention
from puna.kernels.paged_attention import CHUNK, Ragged, divide, paged_attention, tile_tokens

BLOCK = 16


def a_case(starts, lengths, H=8, K=2, E=32, dtype=torch.float32, device="cpu", seed=0):
    """Spans over a pool in which each sequence's blocks lie scattered, with NaN in every slot that nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    starts, lengths = np.array(starts), np.array(lengths)
    ends = starts + lengths
    needed = -(-ends // BLOCK)
    order = torch.randperm(int(needed.sum()) + 3, generator=generator)
    table = torch.zeros(len(starts), int(needed.max()) + 1, dtype=torch.int32)
    pools = [torch.full((len(order), BLOCK, K, E), float("nan")) for _ in "kv"]
    taken = 0
    for b, (n, end) in enumerate(zip(needed, ends)):
        mine = order[taken : taken + n]
        table[b, :n] = mine.int()
        taken += n
        for pool in pools:
            sequence = torch.full((n * BLOCK, K, E), float("nan"))
            sequence[:end] = torch.randn(end, K, E, generator=generator)
            pool[mine] = sequence.view(n, BLOCK, K, E)
    q = torch.randn(int(lengths.sum()), H, E, generator=generator)
    division = divide(starts, lengths, H // K)

    def small(values):
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)

    ragged = Ragged(
        begins=small(lengths.cumsum() - lengths),
        starts=small(starts),
        lengths=small(lengths),
        table=table.to(device),
        chunks=small(division.chunks),
        tiles=small(division.tiles),
        short=division.short,
        most_chunks=int(division.chunks[-1]),
        most_tiles=int(division.tiles[-1]),
    )
    return q.to(device, dtype), *(pool.to(device, dtype) for pool in pools), ragged


def test_the_reference_is_causal_attention_over_the_whole_sequence():
    H, K, E, T = 6, 2, 16, 40
    q, k, v = (torch.randn(1, T, heads, E) for heads in (H, K, K))
    expected = attention(q, k, v, None, impl="reference")[0]
    _, keys, values, ragged = a_case([33], [7], H, K, E)
    blocks = ragged.table[0, :3].long()
    for pool, new in ((keys, k), (values, v)):
        pool[blocks] = torch.cat((new[0], torch.full((8, K, E), float("nan")))).view(3, BLOCK, K, E)
    got = paged_attention(q[0, 33:], keys, values, ragged)
    torch.testing.assert_close(got, expected[33:], rtol=1e-4, atol=1e-5)


CASES = {
    "a token at the very start": ([0], [1]),
    "a batch of decodes": ([0, 5, 15, 16, 200], [1, 1, 1, 1, 1]),
    "contexts of several chunks": ([CHUNK - 1, CHUNK, 3 * CHUNK + 17], [1, 1, 1]),
    "guesses": ([37, CHUNK - 2], [4, 3]),
    "a prompt": ([0], [45]),
    "prompts and decodes": ([0, 90, 60, 7], [21, 1, 40, 1]),
}


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_tiles_give_what_the_reference_gives(device, case):
    q, keys, values, ragged = a_case(*CASES[case], dtype=torch.float32, device=device)
    fused = paged_attention(q, keys, values, ragged, impl="triton")
    torch.testing.assert_close(fused, paged_attention(q, keys, values, ragged, impl="reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("H, K, E", [(3, 1, 16), (4, 4, 24), (8, 1, 64)])
def test_any_grouping_and_width_of_heads(device, H, K, E):
    q, keys, values, ragged = a_case([70, 3], [1, 30], H, K, E, device=device)
    fused = paged_attention(q, keys, values, ragged, impl="triton")
    torch.testing.assert_close(fused, paged_attention(q, keys, values, ragged, impl="reference"), rtol=1e-4, atol=1e-5)


def test_a_sequence_gets_the_same_bits_in_any_company(device):
    together = a_case([300, 40, 513], [1, 1, 1], device=device)
    all_of_them = paged_attention(*together, impl="triton")
    q, keys, values, ragged = together
    for b in range(3):
        one = lambda t, b=b: t[b : b + 1]  # noqa: E731
        chunks = ragged.chunks[b : b + 2] - ragged.chunks[b]
        alone = Ragged(
            begins=one(ragged.begins) * 0, starts=one(ragged.starts), lengths=one(ragged.lengths),
            table=one(ragged.table), chunks=chunks, tiles=chunks * 0, short=1, most_chunks=int(chunks[-1]), most_tiles=0,
        )  # fmt: skip
        assert torch.equal(paged_attention(one(q), keys, values, alone, impl="triton"), one(all_of_them))


def test_every_position_of_every_span_has_one_program():
    starts, lengths = np.array([0, 255, 256, 9, 1000]), np.array([1, 1, 1, 500, 8])
    division = divide(starts, lengths, 4)
    assert division.chunks.tolist() == [0, 1, 2, 4, 4, 8] and division.short == 8
    assert division.tiles.tolist() == [0, 0, 0, 0, -(-500 // tile_tokens(4)), -(-500 // tile_tokens(4))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("starts, lengths", [([4000], [1]), ([100_000, 3], [1, 1]), ([0, 2000, 700], [900, 1, 333])])
def test_the_shape_of_an_8b_model(starts, lengths, dtype):
    q, keys, values, ragged = a_case(starts, lengths, 32, 8, 128, dtype=dtype, device="cuda")
    exact = paged_attention(q.float(), keys.float(), values.float(), ragged, impl="reference")
    error = (paged_attention(q, keys, values, ragged).float() - exact).abs().max() / exact.abs().max()
    assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)
