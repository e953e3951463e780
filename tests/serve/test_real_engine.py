"""The server and the conversation over the real engine, with a random model that knows only bytes."""

import asyncio

import openai
import pytest

from puna.chat import Request, Sampling, user
from puna.inference.engine import Engine
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.serve.calls import prompt_tokens
from puna.serve.conversation import Conversation, Ended, Said
from puna.serve.worker import Worker
from puna.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "héllo"}]


@pytest.fixture(scope="module")
def engine():
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    config = LlamaConfig(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64, vocab_size=tokenizer.vocab_size, context=256
    )  # fmt: skip
    return Engine(Llama(config).init_weights(seed=0), tokenizer)


@pytest.mark.parametrize("request_", [Request(prompt="a text"), Request(dialog=(user("hi"),))])
def test_the_prompt_is_counted_as_the_engine_counts_it(engine, request_):
    [completion] = engine.generate([request_])
    assert prompt_tokens(engine.format, request_) == completion.prompt_tokens


def test_streamed_whole_and_direct_answers_agree(engine, client):
    connected = client(engine)
    settings = {"model": "tiny", "messages": HELLO, "temperature": 0.9, "seed": 3, "max_tokens": 40}
    whole = connected.chat.completions.create(**settings)
    chunks = list(connected.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=3, max_tokens=40)
    [direct] = engine.generate([Request(dialog=(user("héllo"),), sampling=sampling)])
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert streamed == whole.choices[0].message.content == direct.text != ""
    assert whole.usage == chunks[-1].usage
    assert whole.usage.completion_tokens == direct.completion_tokens
    assert whole.usage.prompt_tokens == direct.prompt_tokens


def test_answers_at_the_same_time_are_the_ones_given_alone(engine, client):
    connected = client(engine)
    settings = {"model": "tiny", "messages": HELLO, "temperature": 1.0, "max_tokens": 30}
    alone = [connected.chat.completions.create(**settings, seed=s).choices[0].message.content for s in range(4)]
    together = connected.chat.completions.create(**settings, seed=0, n=4)
    assert [choice.message.content for choice in together.choices] == alone


def test_the_context_limit_is_the_engines(engine, client):
    connected = client(engine)
    answer = connected.completions.create(model="tiny", prompt="x" * 254, max_tokens=50, temperature=0)
    assert answer.usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError) as caught:
        connected.completions.create(model="tiny", prompt="x" * 255)
    assert caught.value.code == "context_length_exceeded"


def test_a_conversation_runs_and_stops(engine):
    conversation = Conversation(engine, sampling=Sampling(temperature=1.0, max_tokens=60, min_tokens=60))
    said = []
    for event in conversation.ask("hello", stopped=lambda: len(said) > 5):
        said.append(event)
    assert isinstance(said[-1], Ended) and said[-1].reason == "stopped"
    text = "".join(event.text for event in said if isinstance(event, Said))
    assert conversation.messages[-1].content == text
    list(conversation.retry())
    assert conversation.messages[-1].role == "assistant"


def test_log_probabilities_come_with_the_answer_streamed_or_whole(engine, client):
    connected = client(engine)
    settings = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = connected.chat.completions.create(**settings).choices[0].logprobs.content
    chunks = list(connected.chat.completions.create(**settings, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == whole and len(whole) > 3
    assert all(len(t.top_logprobs) == 2 and t.logprob <= t.top_logprobs[0].logprob for t in whole)
    plain = connected.completions.create(model="tiny", prompt="abcd", echo=True, logprobs=1, max_tokens=3, seed=1)
    assert plain.choices[0].logprobs.tokens[:4] == list("abcd")
    assert len(plain.choices[0].logprobs.token_logprobs) == 4 + plain.usage.completion_tokens


def test_biases_and_forms_reach_the_engine(engine, client):
    connected = client(engine)
    settings = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "seed": 1}
    answer = connected.chat.completions.create(**settings, logit_bias={"120": 100})
    assert answer.choices[0].message.content == "x" * 30
    pytest.importorskip("llguidance")
    schema = {"name": "answer", "schema": {"enum": ["yes", "no"]}}
    formed = {"response_format": {"type": "json_schema", "json_schema": schema}}
    assert connected.chat.completions.create(**settings, **formed).choices[0].message.content in ('"yes"', '"no"')
    with pytest.raises(openai.BadRequestError, match="regex"):
        connected.chat.completions.create(**settings, extra_body={"structured_outputs": {"regex": "("}})


def test_an_engine_that_is_full_is_a_server_that_is_busy(engine, client):
    tokenizer = engine.tokenizer
    full = Engine(engine._runner, tokenizer, slots=1, queue=0)
    held = full.stream(Request(prompt="a", sampling=Sampling(max_tokens=200, ignore_end=True)))
    next(held)
    connected = client(full)
    with pytest.raises(openai.InternalServerError) as caught:
        connected.completions.create(model="tiny", prompt="b")
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
    held.close()
    assert connected.completions.create(model="tiny", prompt="b").choices


def test_a_long_prompt_that_is_read_holds_nobodys_answer_back_and_can_be_given_up():
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    config = LlamaConfig(
        dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=32, vocab_size=tokenizer.vocab_size, context=4096
    )  # fmt: skip
    engine = Engine(Llama(config).init_weights(seed=0), tokenizer, step_tokens=4)
    read = set()  # of the long prompt, when pieces of the other answer come

    async def talk() -> None:
        worker = Worker(engine)
        other = worker.submit([Request(prompt="y", sampling=Sampling(max_tokens=4000, ignore_end=True))])
        long = None
        async for _ in other:
            long = long or worker.submit([Request(prompt="x" * 4000, sampling=Sampling(max_tokens=1))])
            read.update(s.cached for s in engine._scheduler.running if s.prompt_length > 4000)
            if len(read) > 5:
                break
        long.cancel()
        other.cancel()
        while worker.active:
            await asyncio.sleep(0.001)
        worker.close()

    asyncio.run(asyncio.wait_for(talk(), 60))
    assert len(read) > 5 and max(read) < 4000
    assert engine._cache.free == engine._cache.blocks


def test_a_form_that_cannot_be_is_refused_before_a_stream_begins(engine, client):
    pytest.importorskip("llguidance")
    connected = client(engine)
    for schema in ({"$ref": "#"}, {"type": "integer", "minimum": 2, "maximum": 1}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as caught:
            connected.chat.completions.create(model="tiny", messages=HELLO, response_format=form, stream=True)
        assert caught.value.param == "response_format" and "\n" not in caught.value.body["message"]
