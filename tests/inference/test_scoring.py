import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import CONFIG

from puna.chat import Continuation, assistant, user
from puna.inference.scoring import windows
from puna.model.llama import attend_with
from puna.tokenizer.dialog import render


@torch.no_grad()
def token_by_token(model, tokenizer, ids: list[int], given: int) -> float:
    """Each token from a reading of its own; the window is written out anew from the rule."""
    W, total, end = model.config.context, 0.0, given
    for i in range(given, len(ids)):
        if i >= end:
            end = min(len(ids), max(W + 1, i + W // 2))
        start = max(0, end - 1 - W)
        seen = [ids[0], *ids[start + 1 : i]]
        logits = model(torch.tensor([seen]), torch.arange(len(seen))[None], attend_with(None))
        total += float(logits[0, -1, : tokenizer.vocab_size].log_softmax(-1)[ids[i]])
    return total


TEXTS = ["the sea and the sand", "é東京", "q", "x" * 97, "ab" * 120, "the " * 150, ""]


def test_scores_are_exact_for_texts_shorter_and_longer_than_the_context(engine, model, tokenizer):
    scores = engine.score([Continuation(text=text) for text in TEXTS])
    for text, score in zip(TEXTS, scores):
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        assert score == pytest.approx(token_by_token(model, tokenizer, ids, 1), rel=1e-4, abs=1e-3)
    assert scores[-1] == 0.0


def test_the_context_is_read_and_not_scored(engine, model, tokenizer):
    [score] = engine.score([Continuation(text=" the end", context="aeiou " * 30)])
    context = [tokenizer.bos, *tokenizer.encode("aeiou " * 30)]
    ids = context + tokenizer.encode(" the end")
    assert len(ids) > CONFIG.context
    assert score == pytest.approx(token_by_token(model, tokenizer, ids, len(context)), abs=1e-3)
    [other] = engine.score([Continuation(text=" the end", context="something else")])
    assert abs(other - score) > 0.01


def test_a_dialogs_continuation_is_scored_as_the_assistants_next_message(engine, model, tokenizer):
    dialog = (user("hello"),)
    [score] = engine.score([Continuation(text="the answer", dialog=dialog)])
    whole = render(tokenizer, (*dialog, assistant("the answer")), answer=False).ids[:-1]  # without its end token
    given = len(render(tokenizer, dialog, answer=True).ids)
    assert score == pytest.approx(token_by_token(model, tokenizer, whole, given), abs=1e-3)


def test_a_batch_gives_the_scores_that_each_gets_alone(engine, monkeypatch):
    continuations = [Continuation(text=t, context=c) for t in TEXTS for c in ("", "and the")]
    together = engine.score(continuations)
    monkeypatch.setattr("puna.inference.torch_scoring.BATCH_TOKENS", 1)
    monkeypatch.setattr("puna.inference.torch_scoring._LOGITS_AT_ONCE", 2000)
    assert engine.score(continuations) == pytest.approx(together, rel=1e-4, abs=1e-3)


@given(st.integers(2, 300), st.integers(1, 40), st.integers(2, 33))
def test_every_token_is_scored_once_with_half_a_context_before_it(length, given_tokens, context):
    given_tokens = min(given_tokens, length)
    ids = list(range(length))
    scored = []
    for window in windows(0, ids, given_tokens, context):
        assert len(window.tokens) <= context + 1
        new = window.tokens[len(window.tokens) - window.scored :]
        for i, token in enumerate(new):
            before = len(window.tokens) - window.scored + i
            assert before >= min(token, context // 2)
        assert window.tokens[0] == 0
        scored += new
    assert scored == ids[given_tokens:]
