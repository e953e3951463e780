"""A request gets the same answer alone and among any others: whatever the company, the order, the pieces, the room."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import hand_made_tokenizer, random_model
from worlds import WIDE, any_request, as_double, engine_of, exact_runners, said

from puna.chat import Request, Sampling

TOKENIZER = hand_made_tokenizer()


def serve(engine, requests, rng: random.Random) -> list:
    """Completions of requests that arrive at random moments, some beside others that are given up."""
    streams, done = {}, {}
    order = list(range(len(requests)))
    rng.shuffle(order)
    while order or streams:
        if order and (not streams or rng.random() < 0.4):
            i = order.pop()
            streams[i] = engine.stream(requests[i])
            if rng.random() < 0.2:
                given_up = engine.stream(any_request(rng))
                next(given_up)
                given_up.close()
        i = rng.choice(list(streams))
        piece = next(streams[i])
        if piece.completion is not None:
            done[i] = piece.completion
            streams.pop(i).close()
    assert engine._cache.free == engine._cache.blocks and not engine._scheduler.running
    return [done[i] for i in range(len(requests))]


def same(a, b) -> bool:
    """Equal but for the last bits of log-probabilities."""
    near = abs(a.logprob - b.logprob) < 1e-4
    return near and (a.text, a.finish_reason, a.completion_tokens, a.message) == (
        b.text, b.finish_reason, b.completion_tokens, b.message,
    )  # fmt: skip


@pytest.mark.parametrize("runner", exact_runners())
@given(seed=st.integers(0, 10**9))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_an_answer_is_the_same_to_the_bit_in_any_company(runner, seed):
    rng = random.Random(seed)
    requests = [any_request(rng) for _ in range(rng.randrange(1, 9))]
    company = engine_of(
        runner,
        TOKENIZER,
        blocks=rng.choice([6, 9, 14, 100]),
        slots=rng.choice([1, 3, 16]),
        step_tokens=rng.choice([1, 7, 64]),
        lookahead=rng.choice([0, 0, 3]),
    )
    alone = engine_of(runner, TOKENIZER)
    expected = []
    for request in requests:
        alone.clear()
        expected += alone.generate([request])
    assert [said(c) for c in serve(company, requests, rng)] == [said(c) for c in expected]


@given(seed=st.integers(0, 10**9))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_the_batched_reference_gives_the_same_tokens_in_any_company(seed):
    rng = random.Random(seed)
    requests = [any_request(rng) for _ in range(rng.randrange(2, 12))]
    model = as_double(random_model(WIDE))
    company = engine_of(
        "torch", TOKENIZER, model=model, blocks=rng.choice([6, 12, 40]), step_tokens=rng.choice([5, 64])
    )
    alone = engine_of("invariant", TOKENIZER, model=model)
    expected = [alone.generate([request])[0] for request in requests]
    assert all(same(a, b) for a, b in zip(serve(company, requests, rng), expected))


def test_preemption_happens_and_changes_no_answer():
    kinds = [Sampling(max_tokens=40, ignore_end=True, temperature=t, seed=s) for s, t in enumerate((0.0, 1.0, 0.7))]
    requests = [Request(prompt="the sea " * n, sampling=kind) for n in (1, 2, 3) for kind in kinds]
    tight = engine_of("invariant", TOKENIZER, blocks=8)
    answers = tight.generate(requests)
    assert tight._scheduler.preemptions > 3
    alone = engine_of("invariant", TOKENIZER)
    assert [said(c) for c in answers] == [said(alone.generate([r])[0]) for r in requests]
