import dataclasses
import threading

import pytest
import torch
from tiny_llama import CONFIG, random_model

from puna.chat import Completion, Generator, Request, Sampling, user
from puna.errors import ConfigError, DataError
from puna.inference.engine import Engine
from puna.inference.sequence import ContextError
from puna.model.checkpoint import save_model
from puna.model.llama import attend_with
from puna.quant import QuantConfig, load_quantised, quantise
from puna.tokenizer.bpe import write_ranks

PROMPTS = ["the", "", "a longer prompt about the sea", "東京 é", "x" * 50, "one two three", "aeiou " * 6, "q"]


@torch.no_grad()
def greedy_without_cache(model, tokenizer, prompt: str, count: int) -> list[int]:
    """The whole sequence is read anew for each token."""
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    start = len(ids)
    while len(ids) < min(start + count, model.config.context):
        tokens = torch.tensor([ids])
        logits = model(tokens, torch.arange(len(ids))[None], attend_with(None))
        ids.append(int(logits[0, -1, : tokenizer.vocab_size].argmax()))
        if ids[-1] in tokenizer.stop_ids:
            break
    return ids[start:]


def mixed_requests() -> list[Request]:
    """Sixteen requests that differ in every way a request can."""
    kinds = [
        Sampling(max_tokens=20),
        Sampling(max_tokens=9, temperature=1.0, seed=3),
        Sampling(max_tokens=30, temperature=0.8, top_p=0.9, seed=4),
        Sampling(max_tokens=14, temperature=1.3, top_k=7, min_p=0.02, seed=5, stop=("e", "the")),
    ]
    prompts = [Request(prompt=PROMPTS[i % 8], sampling=kinds[i % 4]) for i in range(13)]
    dialogs = [Request(dialog=(user(text),), sampling=kinds[1]) for text in ("hello", "what is it", "no")]
    return prompts + dialogs


def watched(engine: Engine) -> list[int]:
    """How many sequences each forward reads."""
    widths: list[int] = []
    forward = engine._runner.forward
    engine._runner.forward = lambda spans: (widths.append(len(spans)), forward(spans))[1]
    return widths


def close(a: Completion, b: Completion) -> bool:
    same = (a.text, a.message, a.finish_reason, a.prompt_tokens, a.completion_tokens) == (
        b.text, b.message, b.finish_reason, b.prompt_tokens, b.completion_tokens,
    )  # fmt: skip
    return same and abs(a.logprob - b.logprob) < 1e-3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_with_the_cache_equals_greedy_without_it_token_for_token(engine, model, tokenizer, prompt):
    expected = greedy_without_cache(model, tokenizer, prompt, 60)
    assert len(expected) > 5 and len(set(expected)) > 3
    [answer] = engine.generate([Request(prompt=prompt, sampling=Sampling(max_tokens=60))])
    assert answer.completion_tokens == len(expected)
    text = [t for t in expected if t not in tokenizer.stop_ids]
    assert answer.text == tokenizer.decode(text)


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(model, tokenizer, slots):
    requests = mixed_requests()
    alone = [Engine(model, tokenizer).generate([request])[0] for request in requests]
    together = Engine(model, tokenizer, slots=slots).generate(requests)
    assert all(close(a, b) for a, b in zip(alone, together))
    assert len({c.text for c in together}) > 8


def test_the_cache_budget_limits_the_batch_and_changes_no_answer(model, tokenizer):
    requests = mixed_requests()
    tight = Engine(model, tokenizer, slots=64, cache_bytes=CONFIG.kv_bytes_per_token(4) * 100)
    widths = watched(tight)
    answers = tight.generate(requests)
    assert 1 <= max(widths) <= 6
    assert all(close(a, b) for a, b in zip(answers, Engine(model, tokenizer).generate(requests)))


def test_a_seed_repeats_and_another_seed_does_not(engine):
    def answers(seed: int) -> list[str]:
        sampling = Sampling(temperature=1.0, seed=seed, max_tokens=30)
        return [c.text for c in engine.generate([Request(prompt=p, sampling=sampling) for p in PROMPTS])]

    assert answers(1) == answers(1)
    assert all(a != b for a, b in zip(answers(1), answers(2)))


@pytest.mark.parametrize("shape", [{"n_kv_heads": 4}, {"n_kv_heads": 1}, {"tied": True}, {"head_dim": 16}])
def test_every_shape_decodes_as_it_reads(tokenizer, shape):
    model = random_model(dataclasses.replace(CONFIG, **shape))
    expected = greedy_without_cache(model, tokenizer, "the sea", 25)
    [answer] = Engine(model, tokenizer).generate([Request(prompt="the sea", sampling=Sampling(max_tokens=25))])
    assert answer.text == tokenizer.decode(t for t in expected if t not in tokenizer.stop_ids)


def test_samples_of_one_prompt_read_it_once_and_are_each_what_they_are_alone(model, tokenizer):
    requests = [
        Request(prompt=prompt, sampling=Sampling(temperature=1.0, seed=seed, max_tokens=15))
        for seed in range(4)
        for prompt in ("the sea", "东 x", "a longer prompt")
    ]
    alone = [Engine(model, tokenizer).generate([request])[0] for request in requests]
    engine = Engine(model, tokenizer, slots=16)
    widths = watched(engine)
    assert all(close(a, b) for a, b in zip(alone, engine.generate(requests)))
    assert widths[0] == 3 and widths[1] == 12 and len({c.text for c in alone}) > 9


def test_a_long_prompt_is_read_in_pieces_to_the_same_answer(model, tokenizer):
    requests = [Request(prompt=p, sampling=Sampling(max_tokens=12)) for p in ("x" * 50, "x" * 45, "y" * 41)]
    whole = Engine(model, tokenizer).generate(requests)
    assert all(close(a, b) for a, b in zip(whole, Engine(model, tokenizer, step_tokens=3).generate(requests)))


def test_a_long_prompt_does_not_stall_an_answer_that_is_being_made(model, tokenizer):
    engine = Engine(model, tokenizer, step_tokens=8)
    talking = engine.stream(Request(prompt="the", sampling=Sampling(max_tokens=40, ignore_end=True)))
    next(talking)
    steps: list[list[int]] = []
    forward = engine._runner.forward
    engine._runner.forward = lambda spans: (steps.append([len(s.tokens) for s in spans]), forward(spans))[1]
    reading = engine.stream(Request(prompt="x" * 60, sampling=Sampling(max_tokens=1)))
    next(reading)
    assert len(steps) > 7 and all(1 in step and sum(step) <= 8 for step in steps)


def test_the_answer_ends_where_the_context_does(engine):
    [answer] = engine.generate([Request(prompt="x" * 90, sampling=Sampling(max_tokens=500))])
    assert answer.prompt_tokens == 91
    assert answer.finish_reason == "length" and answer.completion_tokens == CONFIG.context - 91


def test_a_prompt_that_does_not_fit_is_an_error_that_names_request_and_size(engine):
    long = Request(prompt="x" * 200)
    with pytest.raises(ContextError, match="201 tokens, the model's context 96"):
        engine.stream(long)
    with pytest.raises(ContextError, match=r"request 2 of 2.*201"):
        engine.generate([Request(prompt="x"), long])
    with pytest.raises(ConfigError, match="top_p"):
        engine.generate([Request(prompt="x", sampling=Sampling(top_p=0))])
    with pytest.raises(DataError, match="neither"):
        engine.generate([Request()])
    assert engine.generate([Request(prompt="x", sampling=Sampling(max_tokens=3))])[0].completion_tokens == 3


def test_a_stream_shows_what_generate_returns(engine):
    for request in mixed_requests():
        [whole] = engine.generate([request])
        pieces = list(engine.stream(request))
        assert "".join(p.text for p in pieces) == whole.text
        assert close(pieces[-1].completion, whole)
        assert all(p.completion is None for p in pieces[:-1])


def scripted(engine: Engine, ids: list[int]) -> None:
    """Make the engine draw these tokens whatever the model says."""

    def draw(rows, _logits):
        for s, _ in rows:
            token = ids[s.count]
            s.append(token, -1.0, engine._drawing.text(token))

    engine._drawing.draw = draw


def test_a_stream_never_shows_half_a_character(engine):
    text = "é 東京 🏔 e\u0301"
    scripted(engine, list(text.encode()))  # a byte is a token
    pieces = [p.text for p in engine.stream(Request(prompt="x", sampling=Sampling(max_tokens=len(text.encode()))))]
    assert [p for p in pieces if p] == list(text)
    cut = list(engine.stream(Request(prompt="x", sampling=Sampling(max_tokens=len(text.encode()) - 1))))
    assert "".join(p.text for p in cut) == text[:-1] + "\ufffd"


def test_a_stop_string_ends_the_text_before_it_and_none_of_it_is_shown(engine):
    [whole] = engine.generate([Request(prompt="aeiou ", sampling=Sampling(max_tokens=40))])
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 5]
    expected = whole.text[: whole.text.index(stop)]
    request = Request(prompt="aeiou ", sampling=Sampling(max_tokens=40, stop=(stop, "never")))
    [cut] = engine.generate([request])
    assert cut.text == expected and cut.finish_reason == "stop"
    assert cut.completion_tokens < whole.completion_tokens
    shown = ""
    for piece in engine.stream(request):
        shown += piece.text
        assert expected.startswith(shown)


def test_logprob_is_the_sum_over_the_drawn_tokens_at_temperature_one(engine, model, tokenizer):
    sampling = Sampling(temperature=0.7, top_k=5, seed=8, max_tokens=12)
    ids = [tokenizer.bos, *tokenizer.encode("the")]
    sequence = engine._reception.sequence(Request(prompt="the", sampling=sampling))
    engine._submit([sequence])
    engine._turns.until(lambda: sequence.done)
    assert len(sequence.drawn) > 3
    tokens = torch.tensor([ids + sequence.drawn])
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1])[None], attend_with(None))[:, :, : tokenizer.vocab_size]
    logp = logits.log_softmax(-1)[0, len(ids) - 1 : -1]
    expected = logp.gather(1, torch.tensor(sequence.drawn)[:, None]).sum()
    assert sequence.logprob == pytest.approx(float(expected), abs=1e-3)


def test_no_tokens_wanted_no_tokens_drawn(engine):
    [answer] = engine.generate([Request(prompt="x", sampling=Sampling(max_tokens=0))])
    assert (answer.text, answer.finish_reason, answer.completion_tokens) == ("", "length", 0)
    [piece] = engine.stream(Request(prompt="x", sampling=Sampling(max_tokens=0)))
    assert piece.completion == answer


def test_a_tool_call_is_parsed_and_is_the_reason_for_the_end(engine, tokenizer):
    call = '{"name": "f", "parameters": {"n": 1}}'
    request = Request(dialog=(user("hi"),), sampling=Sampling(max_tokens=70))
    scripted(engine, [*tokenizer.encode(call), tokenizer.eot])
    [answer] = engine.generate([request])
    assert answer.finish_reason == "tool_calls"
    assert (answer.message.tool_calls[0].name, answer.message.tool_calls[0].arguments) == ("f", {"n": 1})
    assert answer.text == call

    scripted(engine, [*tokenizer.encode("It is a fine day."), tokenizer.eot])
    [answer] = engine.generate([request])
    assert answer.finish_reason == "stop" and answer.message.content == "It is a fine day."

    scripted(engine, [tokenizer.python_tag, *tokenizer.encode("print(1)"), tokenizer.eom])
    [answer] = engine.generate([request])
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls[0].dialect == "python"


def test_a_call_that_was_cut_short_is_not_reported_as_a_call(engine, tokenizer):
    ids = [tokenizer.python_tag, *tokenizer.encode("remove(all) if sure else None")]
    scripted(engine, ids)
    request = Request(dialog=(user("hi"),), sampling=Sampling(max_tokens=6))
    assert engine.generate([request])[0].finish_reason == "length"


def test_streams_of_many_threads_run_in_one_batch_and_get_their_own_answers(engine):
    requests = mixed_requests()
    expected = engine.generate(requests)
    widths = watched(engine)
    answers: dict[int, Completion] = {}
    ready = threading.Barrier(len(requests))

    def ask(i: int) -> None:
        ready.wait()
        *_, last = engine.stream(requests[i])
        answers[i] = last.completion

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(close(answers[i], expected[i]) for i in range(len(requests)))
    assert max(widths) > 3


def test_a_stream_that_is_closed_gives_up_its_place_and_its_blocks_at_once(engine):
    stream = engine.stream(Request(prompt="x", sampling=Sampling(max_tokens=60)))
    next(stream)
    assert len(engine._scheduler.running) == 1
    stream.close()
    assert not engine._scheduler.running and not engine._scheduler.waiting
    assert engine._cache.free == engine._cache.blocks


def test_an_error_in_a_step_reaches_every_caller_and_the_engine_goes_on_after_it(engine, monkeypatch):
    stream = engine.stream(Request(prompt="x", sampling=Sampling(max_tokens=60)))
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([Request(prompt="y", sampling=Sampling(max_tokens=5))])
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert engine.generate([Request(prompt="y", sampling=Sampling(max_tokens=5))])[0].completion_tokens == 5


def test_a_saved_checkpoint_is_an_engine_that_answers_the_same(model, tokenizer, tmp_path):
    write_ranks(tmp_path / "tokenizer.model", tokenizer.ranks)
    save_model(model, tmp_path, tmp_path / "model")
    requests = mixed_requests()
    loaded = Engine.load(tmp_path / "model", threads=torch.get_num_threads())
    assert loaded.config == CONFIG and loaded.tokenizer.ranks == tokenizer.ranks
    assert all(close(a, b) for a, b in zip(loaded.generate(requests), Engine(model, tokenizer).generate(requests)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_an_engine_too_packed_or_expanded(model, tokenizer, tmp_path, bits):
    write_ranks(tmp_path / "tokenizer.model", tokenizer.ranks)
    save_model(model, tmp_path, tmp_path / "model")
    made = quantise(QuantConfig(bits=bits), tmp_path / "model", out=tmp_path / "quantised")
    model = load_quantised(made.path, expand=False)
    packed = Engine(model, tokenizer)
    requests = mixed_requests()
    assert all(close(a, b) for a, b in zip(Engine.load(made.path).generate(requests), packed.generate(requests)))
    expected = greedy_without_cache(model, tokenizer, "the sea", 30)
    [answer] = packed.generate([Request(prompt="the sea", sampling=Sampling(max_tokens=30))])
    assert answer.text == tokenizer.decode(t for t in expected if t not in tokenizer.stop_ids)


def test_the_engine_is_a_generator(engine):
    generator: Generator = engine
    assert generator.generate([]) == [] and generator.score([]) == []
