"""Engines to compare: each runner that this machine has, and requests of every kind."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_llama import CONFIG, random_model

from puna.chat import Request, Sampling, user
from puna.inference.engine import Engine
from puna.model.llama import Llama

WIDE = replace(CONFIG, head_dim=16)  # a shape that the native kernels take
BLOCK_BYTES = 16 * WIDE.kv_bytes_per_token(4)


def exact_runners() -> list:
    """The runners whose results for a token depend on its own sequence alone."""
    try:
        from puna.inference import native

        why = native.unfit(WIDE)
    except ImportError as error:
        why = str(error)
    return ["invariant", pytest.param("native", marks=pytest.mark.skipif(why is not None, reason=str(why)))]


def engine_of(runner: str, tokenizer, *, model: Llama | None = None, blocks: int = 200, **settings) -> Engine:
    """An engine over a wide tiny model with room for `blocks` blocks."""
    model = model or random_model(WIDE)
    bytes_ = blocks * BLOCK_BYTES * model.norm.weight.itemsize // 4
    return Engine(model, tokenizer, cache_bytes=bytes_, runner=runner, **settings)


def any_request(rng: random.Random) -> Request:
    """A request that differs in any way that requests can."""
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.0, 0.7, 1.2]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 5, 300]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, -0.3]),
        logit_bias=rng.choice([(), ((101, 5.0), (32, -torch.inf))]),
        seed=rng.randrange(5),
        max_tokens=rng.choice([0, 1, 5, 17, 40]),
        min_tokens=rng.choice([0, 3]),
        stop=rng.choice([(), ("e", "an")]),
        logprobs=rng.choice([None, 0, 2]),
        prompt_logprobs=rng.choice([None, None, 1]),
    )
    text = rng.choice(
        ["", "the", "the sea and the sand ", "aeiou " * rng.randrange(1, 12), "x" * rng.randrange(70), "東京 é"]
    )
    shared = {"owner": rng.choice(["", "a"]), "priority": rng.choice([0, 0, 1])}
    if rng.random() < 0.2:
        return Request(dialog=(user(text[:20] or "hi"),), sampling=sampling, **shared)
    return Request(prompt=text, sampling=sampling, **shared)


def as_double(model: Llama) -> Llama:
    """The model in float64: sums differ so little that no token does."""
    return model.double()


def said(completion) -> tuple:
    """All that a completion says; the cache's part in it is left out."""
    return replace(completion, cached_tokens=0)
