"""What a request's settings do to single tokens, seen in its answers."""

import numpy as np
import pytest
import torch
from tiny_llama import random_model
from worlds import WIDE, engine_of

from puna.chat import Request, Sampling
from puna.errors import ConfigError
from puna.inference.drawing import Drawing
from puna.inference.sequence import Sequence
from puna.inference.shaping import shape
from puna.model.llama import attend_with


def ask(engine, prompt="the sea", **sampling):
    return engine.generate([Request(prompt=prompt, sampling=Sampling(**sampling))])[0]


@pytest.fixture
def model():
    return random_model(WIDE)


@pytest.fixture
def engine(model, tokenizer):
    return engine_of("torch", tokenizer, model=model)


def shaped(logits: list[float], prompt: list[int], drawn: list[int], **sampling) -> list[float]:
    sequence = Sequence(prompt, Request(prompt="", sampling=Sampling(**sampling)), 9, {0})
    sequence.tokens += drawn
    before = np.array(logits, dtype=np.float32)
    after = shape(before, sequence, guessed=[3])
    assert before.tolist() == logits
    return after.tolist()


def test_penalties_and_biases_change_the_logits_as_their_definitions_say():
    logits = [1.0, 2.0, -2.0, 4.0, 0.5]
    # token 1 is in the prompt, 2 was drawn twice, 3 is guessed
    assert shaped(logits, [1], [2, 2], repetition_penalty=2.0) == [1.0, 1.0, -4.0, 2.0, 0.5]
    assert shaped(logits, [1], [2, 2], presence_penalty=0.5) == [1.0, 2.0, -2.5, 3.5, 0.5]
    assert shaped(logits, [1], [2, 2], frequency_penalty=0.5) == [1.0, 2.0, -3.0, 3.5, 0.5]
    assert shaped(logits, [1], [2, 2], logit_bias=((4, 1.5), (0, -1.0))) == [0.0, 2.0, -2.0, 4.0, 2.0]
    assert shaped(logits, [1], [2, 2], min_tokens=4)[0] == -torch.inf
    assert shaped(logits, [1], [2, 2], min_tokens=3) == logits
    assert shaped(logits, [1], [2, 2], ignore_end=True)[0] == -torch.inf


def test_a_bias_decides_and_a_ban_holds(engine):
    assert ask(engine, max_tokens=5, logit_bias=((120, 1e3),)).text == "xxxxx"
    plain = ask(engine, max_tokens=5, logprobs=0)
    banned = plain.tokens[0].token
    without = ask(engine, max_tokens=20, logit_bias=((banned, -torch.inf),), logprobs=0)
    assert banned not in {t.token for t in without.tokens}


def test_an_answer_is_as_long_as_it_must_be(engine, tokenizer):
    ends = tuple((id, 1e3) for id in tokenizer.stop_ids)
    assert ask(engine, max_tokens=20, logit_bias=ends).completion_tokens == 1
    answer = ask(engine, max_tokens=20, min_tokens=7, logit_bias=ends)
    assert (answer.completion_tokens, answer.finish_reason) == (8, "stop")
    endless = ask(engine, max_tokens=20, ignore_end=True, logit_bias=ends)
    assert (endless.completion_tokens, endless.finish_reason) == (20, "length")


def test_log_probabilities_are_the_models_own_with_the_likeliest_beside_them(engine, model, tokenizer):
    answer = ask(engine, max_tokens=12, temperature=1.0, seed=4, presence_penalty=1.0, logprobs=3, ignore_end=True)
    assert len(answer.tokens) == 12 and b"".join(t.data for t in answer.tokens).decode(errors="replace") == answer.text
    ids = [tokenizer.bos, *tokenizer.encode("the sea"), *(t.token for t in answer.tokens)]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], attend_with(None))
    rows = logits[0, -13:-1, : tokenizer.vocab_size].log_softmax(-1)
    for token, row in zip(answer.tokens, rows):
        assert token.logprob == pytest.approx(float(row[token.token]), abs=1e-4)
        best, ids = row.topk(3)
        assert [t.token for t in token.top] == ids.tolist()
        assert [t.logprob for t in token.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert sum(t.logprob for t in answer.tokens) == pytest.approx(answer.logprob, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_the_prompts_log_probabilities_are_those_of_reading_it(tokenizer, max_tokens):
    model = random_model(WIDE)
    engine = engine_of("torch", tokenizer, model=model, step_tokens=1)
    prompt = "the sea and the sand of the land " * 2
    for _ in range(2):  # the second time it could be found in the cache, and must be read all the same
        answer = ask(engine, prompt, max_tokens=max_tokens, prompt_logprobs=1, logprobs=0, ignore_end=True)
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        assert [c.token for c in answer.prompt_choices] == ids[1:] and answer.completion_tokens == max_tokens
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], attend_with(None))
        rows = logits[0, :-1, : tokenizer.vocab_size].log_softmax(-1)
        for choice, row in zip(answer.prompt_choices, rows):
            assert choice.logprob == pytest.approx(float(row[choice.token]), abs=1e-4)
            assert choice.top[0].token == int(row.argmax())


def test_streamed_log_probabilities_never_run_ahead_of_the_text(engine):
    whole = ask(engine, "aeiou ", max_tokens=40, logprobs=0, ignore_end=True)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 5]
    sampling = Sampling(max_tokens=40, logprobs=0, stop=(stop,), ignore_end=True)
    text, data, pieces = "", b"", list(engine.stream(Request(prompt="aeiou ", sampling=sampling)))
    for piece in pieces[:-1]:
        text += piece.text
        data += b"".join(t.data for t in piece.tokens)
        assert len(data) <= len(text.encode())
    final = pieces[-1].completion
    assert tuple(t for p in pieces for t in p.tokens) == final.tokens
    assert 0 < len(final.tokens) < len(whole.tokens) and final.text in whole.text
    before_last = b"".join(t.data for t in final.tokens[:-1]).decode(errors="replace")
    assert len(before_last) < len(final.text)


def test_a_prompt_that_is_read_again_in_other_pieces_has_each_log_probability_once(tokenizer):
    request = Request(prompt="", sampling=Sampling(prompt_logprobs=0))
    sequence = Sequence(list(range(100, 120)), request, 5, set())
    logits, drawing = torch.randn(20, 700, generator=torch.Generator().manual_seed(0)), Drawing(tokenizer)
    for start, end in [(0, 8), (0, 5), (5, 13), (13, 20)]:  # preempted after the first
        drawing.prompt(sequence, start, logits[start:end].numpy())
    expected = logits.log_softmax(-1)[range(19), range(101, 120)]
    assert [c.token for c in sequence.prompt_choices] == list(range(101, 120))
    assert torch.allclose(torch.tensor([c.logprob for c in sequence.prompt_choices]), expected, atol=1e-5)


def test_the_tokens_of_an_answer_end_with_its_text_also_where_bytes_are_no_utf8(tokenizer):
    sampling = Sampling(stop=("so",), logprobs=0)
    sequence = Sequence([1], Request(prompt="", sampling=sampling), 20, set())
    spelled = [b"\xff", b"\xe6\x9d", b"\xb1", b"\xe6", b"be", b"ja", b" s", b"o"]
    for token, data in enumerate(spelled):
        sequence.append(token, -1.0, data)
    assert sequence.finish == "stop" and sequence.text.text == "\ufffd東\ufffdbeja "
    assert [c.data for c in sequence.choices] == spelled[:7]
    assert [t for p in sequence.fresh for t in p.tokens] + list(sequence.rest()) == sequence.choices


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((10**6, 1.0),)},
        {"logit_bias": ((1, float("nan")),)},
        {"min_tokens": -1},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"temperature": float("nan")},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(engine, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ask(engine, **wrong)
    assert WIDE.context == engine.config.context
