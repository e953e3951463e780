"""The reference runner against the model read as a whole, and its cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_llama import CONFIG, random_model
from worlds import WIDE

from puna.inference.room import bytes_per_token
from puna.inference.runner import make_runner
from puna.inference.spans import Span
from puna.inference.torch_runner import TorchRunner
from puna.model.llama import Llama, attend_with


@torch.no_grad()
def whole(model: Llama, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend_with(None))[0].float()


def read(runner: TorchRunner, spans: list[Span]) -> torch.Tensor:
    return torch.from_numpy(runner.forward(spans))


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 700, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"tied": True}])
def test_ragged_spans_give_the_logits_of_reading_each_sequence_whole(invariant, shape):
    model = random_model(replace(CONFIG, **shape)).requires_grad_(False)
    runner = TorchRunner(model, blocks=40, invariant=invariant)
    a, b, c = ids(70, 0), ids(21, 1), ids(33, 2)
    blocks = {0: [9, 3, 20, 1, 0], 1: [5, 7], 2: [30, 31, 2]}
    first = [Span(a[:50], 0, blocks[0], 3), Span(b[:20], 0, blocks[1], 1), Span(c[:5], 0, blocks[2], 0)]
    second = [Span(a[50:], 50, blocks[0], 20), Span(b[20:], 20, blocks[1], 1), Span(c[5:], 5, blocks[2], 28)]
    expected = torch.cat([whole(model, a)[47:50], whole(model, b)[19:20]])
    torch.testing.assert_close(read(runner, first), expected, rtol=1e-4, atol=1e-4)
    expected = torch.cat([whole(model, a)[50:], whole(model, b)[20:], whole(model, c)[5:]])
    torch.testing.assert_close(read(runner, second), expected, rtol=1e-4, atol=1e-4)


def test_a_token_read_in_any_pieces_and_company_has_the_same_bits_with_the_invariant_runner():
    model = random_model(WIDE).requires_grad_(False)
    tokens, other = ids(40, 0), ids(30, 1)
    results = []
    for cuts in ((40,), (1, 17, 40), (39, 40)):
        runner, start, logits = TorchRunner(model, blocks=40, invariant=True), 0, []
        for n, end in enumerate(cuts):
            spans = [Span(tokens[start:end], start, [4, 2, 6], end - start)]
            if n % 2:
                spans.insert(0, Span(other, 0, [10, 11], 0))
            logits.append(runner.forward(spans))
            start = end
        results.append(np.concatenate(logits))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_a_copied_block_is_read_as_the_original():
    model = random_model(WIDE).requires_grad_(False)
    runner = TorchRunner(model, blocks=4)
    tokens = ids(20, 0)
    runner.forward([Span(tokens[:18], 0, [0, 1], 0)])
    runner.copy_block(1, 3)
    runner.forward([Span([5], 18, [0, 1], 0)])
    torch.testing.assert_close(read(runner, [Span(tokens[18:], 18, [0, 3], 2)]), whole(model, tokens)[18:])


def test_eight_bit_keys_and_values_take_a_quarter_and_say_nearly_the_same():
    model = Llama(WIDE).init_weights(0).requires_grad_(False)
    tokens = ids(60, 0)
    runner = TorchRunner(model, blocks=4, kv="int8")
    runner.forward([Span(tokens[:59], 0, [0, 1, 2, 3], 0)])
    logits = read(runner, [Span(tokens[59:], 59, [0, 1, 2, 3], 1)])[0].log_softmax(-1)
    exact = whole(model, tokens)[-1].log_softmax(-1)
    assert 0 < float((exact.exp() * (exact - logits)).sum()) < 1e-5
    assert bytes_per_token(WIDE, 4) == WIDE.kv_bytes_per_token(4) == 512
    assert bytes_per_token(WIDE, 4, "int8") == 512 // 4 + 2 * 2 * 2 * 4
    assert runner._pool._rooms[0].numel() * 2 + runner._pool._scales[0].numel() * 2 * 4 == 64 * 160


def test_bfloat16_is_read_as_exactly_as_the_model_reads_it():
    model = random_model(WIDE).requires_grad_(False).to(torch.bfloat16)
    tokens = ids(30, 0)
    logits = read(TorchRunner(model, blocks=2), [Span(tokens, 0, [1, 0], 30)])
    together = whole(model, tokens)
    exact = whole(model.float(), tokens)
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 1.2 * (together - exact).norm()


@pytest.mark.gpu
def test_a_gpu_reads_as_the_cpu_does():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = random_model(WIDE).requires_grad_(False)
    tokens = ids(40, 0)
    expected = whole(model, tokens)
    logits = TorchRunner(model.cuda(), blocks=3).forward([Span(tokens, 0, [2, 0, 1], 40)])
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_the_memory_of_a_cache_is_touched_only_as_it_is_written():
    import resource

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    model = random_model(WIDE).requires_grad_(False)
    before = resident()
    runner = make_runner(model, cache_bytes=1 << 30, choice="torch")
    assert runner.blocks > 100_000 and resident() - before < 32 << 20
