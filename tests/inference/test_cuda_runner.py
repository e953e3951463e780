"""The runner for GPUs: on a CPU with the kernels' references, on a GPU with the kernels, against the reference runner."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_llama import CONFIG, hand_made_tokenizer, random_model
from worlds import any_request

from puna.chat import Request, Sampling
from puna.errors import ConfigError
from puna.inference import engine as engine_module
from puna.inference.adapters import Adapter
from puna.inference.cuda_runner import CudaRunner, cache_bytes_of, room_for
from puna.inference.engine import Engine
from puna.inference.runner import make_runner
from puna.inference.spans import Span
from puna.inference.step_inputs import Buffers, captured_size, filled_up, step_of
from puna.inference.torch_runner import TorchRunner
from puna.kernels.fp8_linear import quantise_rows
from puna.kernels.paged_attention import CHUNK
from puna.model.sizes import SIZES
from puna.quant.groups import quantise_matrix
from puna.quant.modules import QuantLinear, QuantMatrix

SPANS = [Span([7], 20, [3, 1]), Span([8, 9, 10], 0, [2], wanted=2), Span([11] * 20, 15, [4, 0, 5], wanted=0)]


def test_a_step_says_where_each_token_is_and_goes():
    step = step_of(SPANS, 16, grouped=2)
    a = step.arrays
    assert a["tokens"].tolist() == [7, 8, 9, 10] + [11] * 20
    assert a["positions"].tolist() == [20, 0, 1, 2, *range(15, 35)]
    assert a["slots"].tolist() == [1 * 16 + 4, 32, 33, 34, 4 * 16 + 15, *range(16), 80, 81, 82]
    assert (a["begins"].tolist(), a["starts"].tolist(), a["lengths"].tolist()) == ([0, 1, 4], [20, 0, 15], [1, 3, 20])
    assert a["table"].tolist() == [[3, 1, 1], [2, 2, 2], [4, 0, 5]]
    assert step.rows.tolist() == [0, 2, 3]
    assert all(array.dtype == np.int32 for array in a.values())


def test_only_plain_decodes_are_captured_at_the_next_size():
    decode = Span([1], 5, [0])
    assert [captured_size([decode] * n) for n in (1, 2, 3, 5, 64, 257)] == [1, 2, 4, 8, 64, None]
    for other in (Span([1, 2], 5, [0], wanted=2), Span([1], 5, [0], wanted=0), Span([1], 5, [0], adapter=0)):
        assert captured_size([decode, other]) is None
    assert captured_size([decode], sizes=()) is None


def test_what_fills_a_step_up_is_read_from_and_written_to_nobodys_block():
    step = filled_up(step_of([Span([7], 20, [3, 1]), Span([5], 300, [*range(19)])], 16, 2), 4, 99, 16)
    a = step.arrays
    assert a["slots"].tolist() == [20, 18 * 16 + 12, 99 * 16, 99 * 16]
    assert a["table"][2:].tolist() == [[99] * 19] * 2 and a["lengths"].tolist() == [1] * 4
    assert a["chunks"].tolist() == [0, 1, 1 + -(-301 // CHUNK), 4, 5] and a["begins"].tolist() == [0, 1, 2, 3]


def test_buffers_give_each_array_back_where_it_was_sent():
    buffers = Buffers(tokens=24, spans=3, columns=6, device=torch.device("cpu"))
    addresses = {name: view.data_ptr() for name, view in buffers.views.items()}
    for spans in (SPANS, [SPANS[1], SPANS[2], SPANS[0]]):
        step = step_of(spans, 16, 2)
        buffers.send(step)
        for name, array in step.arrays.items():
            view = buffers.views[name]
            assert np.array_equal(view[:, : array.shape[1]] if name == "table" else view, array)
            assert (
                view.data_ptr() == addresses[name] and view.data_ptr() % 16 == buffers.views["tokens"].data_ptr() % 16
            )


def test_the_cache_takes_what_steps_leave_and_a_block_at_least():
    config = SIZES["llama-3.1-8b"]
    free = 120 << 30
    taken = cache_bytes_of(free, config, torch.bfloat16)
    assert 0.85 * free < taken < 0.9 * free
    assert cache_bytes_of(1 << 20, config, torch.bfloat16) == 16 * config.kv_bytes_per_token()
    room = room_for(64, config, taken // (16 * config.kv_bytes_per_token()), 16)
    assert room.columns == config.context // 16 and 64 <= room.chunks <= 64 * config.context // CHUNK


def quantised(model, forms):
    """`model` with the matrices of each layer as integers, of the bits that `forms` says."""
    for layer in model.layers:
        for owner, name in [(layer.attention, n) for n in ("wq", "wk", "wv", "wo")] + [
            (layer.feed_forward, n) for n in ("w1", "w2", "w3")
        ]:
            packed = quantise_matrix(getattr(owner, name).weight.data, forms(name), 16)
            setattr(owner, name, QuantLinear(QuantMatrix(packed, torch.float32)))
    return model


def models():
    return {
        "plain": random_model(),
        "4 bits": quantised(random_model(), lambda name: 4),
        "mixed": quantised(random_model(), lambda name: 8 if name in ("wv", "w1") else 4),
    }


def a_run(runner, seed: int) -> list:
    """Three sequences whose prompts are read in pieces, beside each other's decodes."""
    rng = random.Random(seed)
    texts = [[rng.randrange(700) for _ in range(n)] for n in (20, 33, 7)]
    blocks, at, logits = [[9, 2, 5], [0, 7, 1], [4, 3, 6]], [0, 0, 0], []
    while any(a < len(t) for a, t in zip(at, texts)):
        spans = []
        for i in range(3):
            size = min(rng.choice([0, 1, 1, 2, 9]), len(texts[i]) - at[i])
            if size:
                spans.append(Span(texts[i][at[i] : at[i] + size], at[i], blocks[i], rng.randrange(size + 1)))
                at[i] += size
        if spans:
            logits.append(runner.forward(spans))
    logits.append(runner.forward([Span([5], n, b) for n, b in zip((20, 33, 7), blocks)]))
    return logits


@pytest.mark.parametrize("form", ["plain", "4 bits", "mixed"])
@pytest.mark.parametrize("graphs", [False, True])
def test_logits_are_those_of_the_reference_runner(form, graphs):
    model = models()[form]
    expected = a_run(TorchRunner(copy.deepcopy(model), blocks=10), seed=1)
    for mine, reference in zip(a_run(CudaRunner(model, blocks=10, graphs=graphs), seed=1), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_joining_matrices_holds_nothing_twice_and_leaves_the_model_working():
    model = models()["mixed"]
    model.layers[1].attention = random_model().layers[1].attention
    before = a_run(TorchRunner(copy.deepcopy(model), blocks=10), seed=2)
    runner = CudaRunner(model, blocks=10)
    for mine, reference in zip(a_run(TorchRunner(model, blocks=10), seed=2), before, strict=True):
        assert np.array_equal(mine, reference)
    attention = model.layers[1].attention
    joined = runner._llama.layers[1].qkv.matrix.weight
    assert {w.weight.untyped_storage().data_ptr() for w in (attention.wq, attention.wk, attention.wv)} == {
        joined.untyped_storage().data_ptr()
    }


def test_fp8_rounds_each_row_of_the_layers_matrices():
    model = random_model(replace(CONFIG, dim=128, head_dim=32, ffn_dim=256))
    rounded = copy.deepcopy(model)
    for name, weight in rounded.named_parameters():
        if name.startswith("layers.") and weight.ndim == 2:
            codes, scales = quantise_rows(weight.data)
            weight.data = codes.float() * scales
    mine, exact = a_run(CudaRunner(model, blocks=10, fp8=True), 3), a_run(TorchRunner(rounded, blocks=10), 3)
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_adapters_change_their_own_spans_alone():
    model = random_model()
    generator = torch.Generator().manual_seed(3)

    def factors(rows, columns):
        down, up = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
        return down.numpy(), 0.1 * up.numpy()

    adapter = Adapter({"layers.0.attention.wk": factors(16, 32), "layers.1.feed_forward.w2": factors(32, 48)})
    spans = [Span([1, 2], 0, [0]), Span([3, 4, 5], 0, [1], adapter=0), Span([6], 0, [2])]
    runners = TorchRunner(copy.deepcopy(model), blocks=4), CudaRunner(model, blocks=4)
    reference, mine = ((r.add_adapter(adapter), r.forward(spans))[1] for r in runners)
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
    plain = runners[1].forward([Span(s.tokens, s.start, s.blocks) for s in spans])
    torch.testing.assert_close(mine[[0, 2]], plain[[0, 2]])
    assert not np.allclose(mine[1], plain[1], atol=0.1)


def test_the_engine_gives_the_same_answers_on_both_runners(monkeypatch):
    rng = random.Random(5)
    requests = [any_request(rng) for _ in range(12)] + [
        Request(prompt="the " * n, sampling=Sampling(max_tokens=30, ignore_end=True)) for n in (1, 5, 9)
    ]
    tokenizer = hand_made_tokenizer()
    settings = {"slots": 5, "step_tokens": 20, "lookahead": 2}
    expected = Engine(random_model().double(), tokenizer, runner="torch", **settings).generate(requests)
    monkeypatch.setattr(engine_module, "make_runner", lambda model, **_: CudaRunner(model, blocks=40))
    answers = Engine(random_model().double(), tokenizer, **settings).generate(requests)

    def said(completion) -> tuple:
        return completion.text, completion.finish_reason, completion.completion_tokens, completion.message

    assert [said(a) for a in answers] == [said(e) for e in expected]


def test_a_copied_block_reads_as_the_first():
    runner = CudaRunner(random_model(), blocks=6)
    runner.forward([Span([1, 2, 3], 0, [0])])
    runner.copy_block(0, 4)
    first, second = runner.forward([Span([9], 3, [0])]), runner.forward([Span([9], 3, [4])])
    assert np.array_equal(first, second)


def test_a_step_that_no_captured_room_holds_is_read_all_the_same():
    runner = CudaRunner(random_model(), blocks=6)
    spans = [Span([1], 0, [0])]
    expected = runner.forward(spans)
    runner._captured[1].holds = lambda step: False
    torch.testing.assert_close(runner.forward(spans), expected)


def test_asked_for_without_a_gpu_it_says_why_not():
    with pytest.raises(ConfigError, match="cuda kernels cannot be used: the model is on cpu"):
        make_runner(random_model(), choice="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["plain", "4 bits", "mixed"])
def test_on_a_gpu_logits_are_those_of_the_reference_runner(form):
    model = models()[form].cuda()
    expected = a_run(TorchRunner(copy.deepcopy(model), blocks=10), seed=1)
    runner = make_runner(model, blocks=10)
    assert isinstance(runner, CudaRunner)
    runner.warm_up()
    for mine, reference in zip(a_run(runner, seed=1), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_on_a_gpu_replayed_steps_give_what_steps_started_kernel_by_kernel_give():
    model = random_model().cuda()
    replayed, started = CudaRunner(model, blocks=40), CudaRunner(model, blocks=40, graphs=False)
    for count in (1, 3, 8):
        for position in range(4):
            spans = [Span([5 + i + position], position, [i]) for i in range(count)]
            torch.testing.assert_close(replayed.forward(spans), started.forward(spans), rtol=1e-3, atol=1e-3)
