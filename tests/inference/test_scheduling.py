"""Who runs when: priorities, a full queue, a full cache, and what is shared between requests."""

import threading
from dataclasses import replace

import pytest
from tiny_llama import random_model
from worlds import WIDE, engine_of

from puna.chat import Request, Sampling
from puna.errors import BusyError, ConfigError
from puna.inference.sequence import ContextError

LONG = Sampling(max_tokens=40, ignore_end=True)


def finish(stream):
    return list(stream)[-1].completion


def read_tokens(engine) -> list[int]:
    """How many tokens each forward reads."""
    counts: list[int] = []
    forward = engine._runner.forward
    engine._runner.forward = lambda spans: (counts.append(sum(len(s.tokens) for s in spans)), forward(spans))[1]
    return counts


def test_a_higher_priority_is_answered_first(tokenizer):
    engine = engine_of("torch", tokenizer, slots=1)
    ended = []
    requests = [Request(prompt="abc", sampling=LONG, priority=p) for p in (0, 5, 1)]
    sequences = [engine._reception.sequence(request) for request in requests]
    engine._submit(sequences)
    while len(ended) < 3:
        so_far = len(ended)
        engine._turns.until(lambda n=so_far: sum(s.done for s in sequences) > n)
        ended += [s for s in sequences if s.done and s not in ended]
    assert [s.request.priority for s in ended] == [5, 1, 0]


def test_a_higher_priority_takes_the_blocks_of_a_lower_one_which_still_ends_well(tokenizer):
    engine = engine_of("invariant", tokenizer, blocks=5)
    alone = finish(engine.stream(Request(prompt="the sea " * 3, sampling=LONG)))
    engine.clear()
    low = engine.stream(Request(prompt="the sea " * 3, sampling=LONG))
    next(low)
    high = finish(engine.stream(Request(prompt="aeiou" * 3, sampling=LONG, priority=1)))
    assert engine._scheduler.preemptions > 0 and high.completion_tokens == 40
    assert finish(low).text == alone.text


def test_a_full_queue_says_that_it_is_busy_and_takes_more_when_it_is_not(tokenizer):
    engine = engine_of("torch", tokenizer, slots=2, queue=1)
    running = [engine.stream(Request(prompt=p, sampling=LONG)) for p in "ab"]
    for stream in running:
        next(stream)
    engine._submit([engine._reception.sequence(Request(prompt="waits", sampling=LONG))])
    with pytest.raises(BusyError, match="at most 1"):
        next(engine.stream(Request(prompt="f")))
    with pytest.raises(BusyError):
        engine.generate([Request(prompt="f")])
    running[0].close()
    assert finish(engine.stream(Request(prompt="g", sampling=Sampling(max_tokens=2)))).completion_tokens > 0


def test_what_the_cache_can_never_hold_is_refused_with_its_size(tokenizer):
    engine = engine_of("torch", tokenizer, blocks=2)
    assert engine.config.context == 32
    with pytest.raises(ContextError, match=r"41 tokens, the cache 32"):
        engine.stream(Request(prompt="x" * 40))
    answer = finish(engine.stream(Request(prompt="x" * 20, sampling=LONG)))
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 11)
    with pytest.raises(ConfigError, match="less than a block"):
        engine_of("torch", tokenizer, blocks=0)


def test_a_prompt_that_was_read_before_is_not_read_again_but_only_for_its_owner(tokenizer):
    engine = engine_of("torch", tokenizer)
    counts = read_tokens(engine)
    prompt = "x" * 80
    for owner, read in (("ann", 81), ("ann", 1), ("bob", 81), ("ann", 1), ("bob", 1), ("", 81)):
        counts.clear()
        answer = finish(engine.stream(Request(prompt=prompt, owner=owner, sampling=Sampling(max_tokens=1))))
        assert counts == [read] and answer.cached_tokens == 81 - read


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(tokenizer):
    engine = engine_of("torch", tokenizer)
    counts = read_tokens(engine)
    first = finish(engine.stream(Request(prompt="q" * 30, sampling=Sampling(max_tokens=40, logit_bias=((120, 1e3),)))))
    assert first.text == "x" * 40
    counts.clear()
    second = finish(engine.stream(Request(prompt="q" * 30 + first.text + "z", sampling=Sampling(max_tokens=1))))
    assert (second.prompt_tokens, second.cached_tokens, counts) == (72, 64, [8])


def test_samples_share_the_blocks_of_their_prompt_and_read_it_once(tokenizer):
    engine = engine_of("torch", tokenizer, blocks=14)
    counts = read_tokens(engine)
    requests = [
        Request(prompt="x" * 57, sampling=Sampling(temperature=1.0, seed=seed, max_tokens=6, ignore_end=True))
        for seed in range(8)
    ]
    answers = engine.generate(requests)
    assert counts[0] == 58 and counts[1:] == [8] * 5 and engine._scheduler.preemptions == 0
    assert len({a.text for a in answers}) > 5
    assert engine._cache.free == 14


def test_one_of_many_samples_may_be_given_up_while_their_prompt_is_read(tokenizer):
    engine = engine_of("torch", tokenizer, step_tokens=2)
    alone = engine.generate([Request(prompt="x" * 50, sampling=LONG)])[0]
    engine.clear()
    sequences = [engine._reception.sequence(Request(prompt="x" * 50, sampling=LONG)) for _ in range(3)]
    engine._submit(sequences)
    engine._turns.until(lambda: sequences[0].cached > 0)
    assert [s.follows for s in sequences] == [None, sequences[0], sequences[0]]
    engine._abandon(sequences[:1])
    engine._turns.until(lambda: all(s.done for s in sequences))
    assert sequences[1].text.text == sequences[2].text.text == alone.text


def test_clear_gives_everything_back_and_waits_for_nobody(tokenizer):
    engine = engine_of("torch", tokenizer)
    stream = engine.stream(Request(prompt="x" * 40, sampling=LONG))
    next(stream)
    assert not engine.clear()
    stream.close()
    assert engine._cache.kept > 0 and engine.clear() and engine._cache.kept == 0
    answer = engine.generate([Request(prompt="x" * 40, sampling=LONG)])[0]
    assert answer.cached_tokens == 0


def test_closing_in_one_thread_while_another_steps_frees_everything(tokenizer):
    engine = engine_of("torch", tokenizer)
    answers = []
    talker = threading.Thread(target=lambda: answers.append(finish(engine.stream(Request(prompt="a", sampling=LONG)))))
    talker.start()
    for _ in range(10):
        stream = engine.stream(Request(prompt="b", sampling=LONG))
        next(stream)
        stream.close()
    talker.join(timeout=60)
    assert answers[0].completion_tokens == 40
    engine.generate([Request(prompt="c", sampling=Sampling(max_tokens=1))])
    assert engine._cache.free == engine._cache.blocks and not engine._scheduler.waiting


def steps_until_said(engine, streams: dict) -> dict:
    """How many steps each of `streams` waits for its first token; they are made in turn, as the server does."""
    found = {}
    while streams:
        for name, stream in list(streams.items()):
            piece = next(stream)
            if piece.text or piece.completion:
                found.setdefault(name, engine._turns.made)
            if piece.completion:
                del streams[name]
    return found


def test_a_short_prompt_does_not_wait_for_a_long_one_that_came_before(tokenizer):
    model = random_model(replace(WIDE, context=2048))
    engine = engine_of("torch", tokenizer, model=model, blocks=300, step_tokens=32)
    one = Sampling(max_tokens=1, ignore_end=True)
    streams = {
        name: engine.stream(Request(prompt=text, sampling=one), patient=False)
        for name, text in (("long", "x" * 1600), ("longer", "y" * 1900), ("short", "the sea " * 2))
    }
    waited = steps_until_said(engine, streams)
    assert waited["short"] <= 3 and waited["long"] < waited["longer"]


def test_short_prompts_that_keep_coming_do_not_keep_a_long_one_from_its_end(tokenizer):
    model = random_model(replace(WIDE, context=2048))
    engine = engine_of("torch", tokenizer, model=model, step_tokens=32)
    one = Sampling(max_tokens=1, ignore_end=True)
    long = engine.stream(Request(prompt="x" * 800, sampling=one), patient=False)
    coming, others, steps = (f"{n} " + "ab" * 20 for n in range(1000)), [], 0
    while (piece := next(long)).completion is None:
        steps = engine._turns.made
        while len(others) < 4:
            others.append(engine.stream(Request(prompt=next(coming), sampling=one), patient=False))
        others = [other for other in others if next(other).completion is None]
    assert piece.completion.completion_tokens == 1 and steps <= 800 // 16 + 10


def test_a_long_beginning_that_several_share_is_read_once_though_they_came_together(tokenizer):
    model = random_model(replace(WIDE, context=2048))
    engine = engine_of("torch", tokenizer, model=model, step_tokens=32)
    counts = read_tokens(engine)
    book = "x" * 640
    requests = [Request(prompt=f"{book}{n}?", sampling=Sampling(max_tokens=1)) for n in range(6)]
    answers = engine.generate(requests)
    alone = engine_of("torch", tokenizer, model=model)
    assert [a.text for a in answers] == [alone.generate([r])[0].text for r in requests]
    assert sum(counts) < 640 + 6 * 40


def test_who_outranks_the_one_that_reads_the_same_does_not_wait_for_it(tokenizer):
    model = random_model(replace(WIDE, context=2048))
    engine = engine_of("torch", tokenizer, model=model, step_tokens=32)
    one = Sampling(max_tokens=1, ignore_end=True)
    low = engine.stream(Request(prompt="x" * 1600, sampling=one), patient=False)
    next(low)
    high = engine.stream(Request(prompt="x" * 400, sampling=one, priority=1), patient=False)
    waited = steps_until_said(engine, {"low": low, "high": high})
    assert waited["high"] <= 1 + 400 // 32 + 2 < waited["low"]
