"""Guessing tokens changes how fast an answer comes, and nothing else."""

import random

import pytest
import torch
from tiny_llama import random_model
from worlds import WIDE, any_request, as_double, engine_of, said

from puna.chat import Request, Sampling
from puna.errors import ConfigError
from puna.inference.engine import Engine


def near_copy(model, noise: float):
    """A draft that mostly agrees with the model."""
    draft = random_model(model.config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += noise * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return draft


def forwards(engine) -> list[int]:
    """How many sequences are read in each step."""
    counts: list[int] = []
    forward = engine._runner.forward
    engine._runner.forward = lambda spans: (counts.append(len(spans)), forward(spans))[1]
    return counts


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_with_a_draft_model_all_answers_are_the_same(tokenizer, noise):
    model = random_model(WIDE)
    rng = random.Random(7)
    requests = [any_request(rng) for _ in range(14)]
    plain = engine_of("invariant", tokenizer, model=model)
    expected = [plain.generate([r])[0] for r in requests]
    guessing = engine_of(
        "invariant", tokenizer, model=model, blocks=12, slots=5, lookahead=3, draft=near_copy(model, noise)
    )
    assert [said(c) for c in guessing.generate(requests)] == [said(c) for c in expected]
    assert guessing._cache.free == 12


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_that_equals_the_model_is_always_right(tokenizer, temperature):
    model = random_model(WIDE)
    sampling = Sampling(max_tokens=41, ignore_end=True, temperature=temperature, seed=3)
    engine = engine_of("invariant", tokenizer, model=model, lookahead=4, draft=near_copy(model, 0.0))
    counts = forwards(engine)
    engine.generate([Request(prompt="the sea", sampling=sampling)])
    assert len(counts) == 1 + 8  # the prompt, then five tokens a step


def test_looking_back_saves_steps_where_a_text_repeats_itself(tokenizer):
    bias = ((120, 1e3),)  # x, always
    sampling = Sampling(max_tokens=40, logit_bias=bias)
    engine = engine_of("torch", tokenizer, lookahead=4)
    counts = forwards(engine)
    [answer] = engine.generate([Request(prompt="the sea", sampling=sampling)])
    assert answer.text == "x" * 40 and len(counts) < 15


def test_a_draft_of_another_vocabulary_is_refused(tokenizer):
    from dataclasses import replace

    with pytest.raises(ConfigError, match="vocabulary"):
        engine_of("torch", tokenizer, lookahead=2, draft=random_model(replace(WIDE, vocab_size=701)))
    with pytest.raises(ConfigError, match="lookahead"):
        engine_of("torch", tokenizer, draft=random_model(WIDE))


def test_sampled_answers_are_distributed_as_without_guesses(tokenizer):
    """Chi-square over 3,000 answers of three tokens, each one of three, against their exact probabilities."""
    model = as_double(random_model(WIDE))
    kinds = [ord(c) for c in "xyz"]
    bias = tuple((id, 800.0) for id in kinds)
    draft = as_double(near_copy(random_model(WIDE), 0.3))
    engine = Engine(model, tokenizer, slots=200, lookahead=2, draft=draft, runner="torch")
    steps = forwards(engine)
    requests = [
        Request(prompt="q", sampling=Sampling(temperature=8.0, seed=seed, max_tokens=3, logit_bias=bias, logprobs=0))
        for seed in range(3000)
    ]
    answers = engine.generate(requests)
    assert 15 < len(steps) < 15 * 3  # guesses were right now and then
    ids = [[t.token for t in a.tokens] for a in answers]
    observed = torch.zeros(3, 3, 3)
    for row in ids:
        observed[tuple(kinds.index(t) for t in row)] += 1
    expected = 3000 * exact(model, [tokenizer.bos, ord("q")], kinds)
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    assert expected.min() > 5 and chi2 < 54.1  # 26 degrees of freedom, p = 0.001


@torch.no_grad()
def exact(model, prompt: list[int], kinds: list[int]) -> torch.Tensor:
    """P(first, second, third) of three tokens drawn among `kinds` at temperature 8."""
    from puna.model.llama import attend_with

    def next_of(ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], attend_with(None))[0, -1]
        return (logits[kinds] / 8.0).softmax(-1)

    joint = torch.zeros(3, 3, 3)
    for i, p in enumerate(next_of(prompt)):
        for j, q in enumerate(next_of([*prompt, kinds[i]])):
            joint[i, j] = p * q * next_of([*prompt, kinds[i], kinds[j]])
    return joint
