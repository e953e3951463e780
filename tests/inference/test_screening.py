"""Screened logits: the likeliest tokens have the whole output matrix's bits, whoever else is in the batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_llama import hand_made_tokenizer, random_model
from worlds import WIDE, any_request, engine_of, said

from puna.chat import Request, Sampling, Structure
from puna.inference.intake import in_memory, read_network
from puna.inference.native import NativeRunner, unfit
from puna.inference.sampler import among_likeliest
from puna.inference.spans import Span
from puna.kernels.screening import BLOCK, REFINED, screened_logits, upper
from puna.model.llama import Llama
from puna.quant.groups import Packed, quantise_matrix
from puna.quant.modules import QuantEmbedding, QuantLinear, QuantMatrix

SHAPE = replace(WIDE, dim=128, vocab_size=9000, tied=False)
native = pytest.mark.skipif(unfit(WIDE) is not None, reason=str(unfit(WIDE)))


def quantised_head(tied: bool = False, bits: int = 8) -> Llama:
    """A model whose output matrix has codes of so many bits, the rest numbers."""
    model = random_model(replace(SHAPE, tied=tied)).requires_grad_(False)
    with torch.no_grad():
        model.output.weight.mul_(0.2)
    matrix = QuantMatrix(quantise_matrix(model.output.weight, bits, 32), torch.float32)
    model.output = QuantLinear(matrix)
    if tied:
        model.tok_embeddings = QuantEmbedding(matrix)
    return model.eval()


def spans(screened: bool, wanted: int = 1) -> list[Span]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPE.vocab_size, (80,), generator=g).tolist()
    return [Span(ids[10 * i : 10 * i + 9], 0, [i], wanted, screened=screened) for i in range(8)]


def logits(runner: NativeRunner, asked: list[Span]) -> torch.Tensor:
    return torch.from_numpy(runner.forward(asked))


def runner_of(model: Llama, threads: int = 2) -> NativeRunner:
    return NativeRunner.of(model, threads=threads, blocks=12)


@native
@pytest.mark.parametrize("tied", [False, True])
def test_the_likeliest_tokens_have_the_bits_of_the_whole_matrix(tied):
    runner = runner_of(quantised_head(tied))
    whole, rough = logits(runner, spans(False, 3)), logits(runner, spans(True, 3))
    best = whole.topk(REFINED // 2).indices
    assert torch.equal(rough.gather(1, best), whole.gather(1, best))
    assert torch.equal(rough.argmax(-1), whole.argmax(-1))
    same = (rough == whole).sum(-1)
    assert (same > (REFINED - 1) * BLOCK).all() and (same < 0.5 * SHAPE.vocab_size).all()  # the others were not read
    error = (rough - whole).std(-1) / whole.std(-1)
    assert (error < 0.2).all()


@native
def test_screened_logits_are_the_references():
    model = quantised_head()
    runner, packed = runner_of(model), model.output.matrix.packed()
    network = read_network(in_memory(model), 1)
    found = logits(runner, spans(True))
    table = np.ascontiguousarray(np.array([(9, 0, 1, -1, i, 0) for i in range(8)]).T)
    ids = np.array([t for span in spans(True) for t in span.tokens], dtype=np.int32)
    states = network.forward(runner.cache, ids, table, np.arange(8, dtype=np.int32), hidden=True)
    expected = screened_logits(torch.from_numpy(states), packed.codes, packed.scales, packed.group_size)
    near = (found - expected).abs() < 0.02 * expected.std()  # what quantising the states to 8 bits does
    assert near.float().mean() > 0.99  # a block at the edge may be refined by one of them alone
    best = expected.topk(REFINED // 2).indices
    assert near.gather(1, best).all()


def test_upper_halves_are_the_middle_of_sixteen_codes():
    codes = torch.arange(-128, 128).to(torch.int8)
    wrong = upper(codes).int() - codes.int()
    assert wrong.min() == -7 and wrong.max() == 8 and len(upper(codes).unique()) == 16


@native
def test_screened_rows_have_the_same_bits_alone_and_among_whole_ones():
    runner = runner_of(quantised_head())
    together, whole = logits(runner, spans(True)), logits(runner, spans(False))
    mixed = [span if i % 3 else replace(span, screened=False, wanted=2) for i, span in enumerate(spans(True))]
    rows = logits(runner, mixed).split([span.wanted for span in mixed])
    for i, (span, row) in enumerate(zip(mixed, rows)):
        assert torch.equal(row[-1], together[i] if span.screened else whole[i])
        assert torch.equal(logits(runner, [spans(True)[i]])[0], together[i])
    assert torch.equal(logits(runner_of(quantised_head(), threads=1), spans(True)), together)


@native
def test_where_the_upper_halves_say_too_little_all_is_read():
    model = quantised_head()
    codes = torch.randint(0, 16, (SHAPE.vocab_size, SHAPE.dim), dtype=torch.int8)  # they have one upper half in common
    scales = torch.full((SHAPE.vocab_size, SHAPE.dim // 32), 0.01).half()
    model.output = QuantLinear(QuantMatrix(Packed(codes, scales, SHAPE.dim, 8, 32), torch.float32))
    runner = runner_of(model)
    whole = logits(runner, spans(False))
    assert torch.equal(logits(runner, spans(True)), whole)
    x = torch.randn(3, SHAPE.dim)
    assert torch.allclose(screened_logits(x, codes, scales, 32), x @ codes.float().T * scales[0, 0].float(), atol=1e-3)


@native
@pytest.mark.parametrize("bits", [4, 6])
def test_an_output_matrix_of_fewer_bits_is_read_whole(bits):
    runner = runner_of(quantised_head(bits=bits))
    assert torch.equal(logits(runner, spans(True)), logits(runner, spans(False)))


@native
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_the_same_in_any_company(seed):
    tokenizer, rng = hand_made_tokenizer(), random.Random(seed)
    requests = [any_request(rng) for _ in range(8)]
    requests += [Request(prompt="the sea", sampling=Sampling(temperature=t, max_tokens=9)) for t in (0.0, 1.0, 0.0)]
    model = quantised_head()
    company = engine_of("native", tokenizer, model=model, slots=6, step_tokens=16, lookahead=rng.choice([0, 3]))
    alone = engine_of("native", tokenizer, model=model)
    answers = [said(c) for c in company.generate(requests)]
    for request, answer in zip(requests, answers):
        alone.clear()
        assert said(alone.generate([request])[0]) == answer


def test_only_draws_among_the_likeliest_are_screened():
    assert among_likeliest(Sampling())
    assert among_likeliest(Sampling(temperature=1, top_p=0.9)) and among_likeliest(Sampling(temperature=1, top_k=40))
    assert among_likeliest(Sampling(min_tokens=3, ignore_end=True))
    for other in (
        {"temperature": 1.0}, {"temperature": 1.0, "min_p": 0.1}, {"temperature": 1.0, "top_k": 1000}, {"logprobs": 0},
        {"prompt_logprobs": 1}, {"logit_bias": ((3, 5.0),)}, {"repetition_penalty": 1.1}, {"presence_penalty": -1.0},
        {"frequency_penalty": 0.5},
    ):  # fmt: skip
        assert not among_likeliest(Sampling(**other)), other


def test_the_engine_asks_for_what_a_request_needs(monkeypatch):
    pytest.importorskip("llguidance")
    engine, asked = engine_of("torch", hand_made_tokenizer()), []
    forward = engine._runner.forward
    monkeypatch.setattr(
        engine._runner, "forward", lambda spans: asked.extend(s.screened for s in spans) or forward(spans)
    )
    for expected, request in (
        (True, Request(prompt="the")),
        (False, Request(prompt="the", sampling=Sampling(logprobs=2))),
        (False, Request(prompt="the", structure=Structure(kind="regex", text="[a-z]{3}"))),
    ):
        asked.clear()
        engine.generate([replace(request, sampling=replace(request.sampling, max_tokens=3))])
        assert asked and set(asked) == {expected}
