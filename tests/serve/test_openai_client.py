"""The server against OpenAI's own client, over a real socket."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_engine import ScriptedEngine, echo

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_a_chat_answer_has_content_finish_reason_and_exact_usage(client):
    engine = ScriptedEngine(lambda _request: "Hi there.")
    answer = client(engine).chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "Hi there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(b"Hi there.") + 1  # the end of the turn is drawn too
    assert answer.usage.prompt_tokens == engine.prompt_tokens(engine.seen[0])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer_says_the_same_in_several_chunks_and_ends_with_usage(client):
    connected = client(ScriptedEngine(lambda _request: "Grüße, 世界!"))
    whole = connected.chat.completions.create(model="tiny", messages=HELLO)
    options = {"include_usage": True}
    chunks = list(connected.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=options))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert sum(bool(delta.content) for delta in deltas) > 3
    assert len("".join(delta.content or "" for delta in deltas)) == len(whole.choices[0].message.content.encode())
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-1].timings["tokens_per_s"] > 0  # ours, beyond OpenAI's fields
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_carries_usage(client):
    chunks = list(client().chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)


def test_all_roles_and_text_parts_reach_the_model(client):
    engine = ScriptedEngine(echo)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "three", "name": "ann"},
    ]
    client(engine).chat.completions.create(model="tiny", messages=messages)
    dialog = engine.seen[0].dialog
    assert [m.role for m in dialog] == ["system", "user", "assistant", "user"]
    assert [m.content for m in dialog] == ["Be brief.", "one two", "ok", "three"]


def test_sampling_settings_reach_the_engine(client):
    engine = ScriptedEngine(echo)
    client(engine).chat.completions.create(
        model="tiny",
        messages=HELLO,
        temperature=0.5,
        top_p=0.8,
        max_completion_tokens=7,
        stop=["a", "b"],
        seed=11,
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    sampling = engine.seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.8, 5, 0.1)
    assert (sampling.max_tokens, sampling.stop, sampling.seed) == (7, ("a", "b"), 11)


def test_n_choices_are_drawn_with_seeds_that_differ(client):
    engine = ScriptedEngine(lambda request: f"seed {request.sampling.seed}")
    answer = client(engine).chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5)
    assert [c.message.content for c in answer.choices] == ["seed 5", "seed 6", "seed 7"]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == engine.prompt_tokens(engine.seen[0])  # counted once


def test_without_a_seed_answers_are_drawn_afresh(client):
    engine = ScriptedEngine(echo)
    connected = client(engine)
    for _ in range(2):
        connected.chat.completions.create(model="tiny", messages=HELLO)
    assert engine.seen[0].sampling.seed != engine.seen[1].sampling.seed


def test_an_answer_at_the_token_limit_ends_with_length(client):
    answer = client(ScriptedEngine(lambda _r: "long " * 50)).chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=9
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_offered_called_and_answered(client, stream):
    def script(request):
        if request.dialog[-1].role == "ipython":
            return f"It is {request.dialog[-1].content}."
        return '{"name": "get_weather", "parameters": {"city": "Tarma"}}'

    engine = ScriptedEngine(script)
    connected = client(engine)
    messages = [{"role": "user", "content": "How is the weather in Tarma?"}]
    if stream:
        chunks = list(connected.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], stream=True))
        assert not any(chunk.choices[0].delta.content for chunk in chunks)  # the call never shows as text
        [call] = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = connected.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER]).choices[0]
        assert choice.message.content is None
        [call], reason = choice.message.tool_calls, choice.finish_reason
    assert reason == "tool_calls"
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Tarma"}
    assert '"name": "get_weather"' in engine.seen[0].dialog[0].content  # described to the model

    function = {"name": call.function.name, "arguments": call.function.arguments}
    messages += [
        {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    final = connected.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
    assert final.choices[0].message.content == "It is sunny."
    history = engine.seen[-1].dialog
    assert [m.role for m in history] == ["system", "user", "assistant", "ipython"]
    assert history[2].tool_calls[0].arguments == {"city": "Tarma"}


def test_json_that_is_no_offered_call_is_content(client):
    text = '{"name": "launch", "parameters": {}}'
    engine = ScriptedEngine(lambda _request: text)
    connected = client(engine)
    for settings in ({}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = connected.chat.completions.create(model="tiny", messages=HELLO, **settings).choices[0]
        assert choice.message.content == text and choice.finish_reason == "stop"


def test_tool_choice_none_does_not_describe_the_tools(client):
    engine = ScriptedEngine(echo)
    client(engine).chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert [m.role for m in engine.seen[0].dialog] == ["user"]


def test_completions_continue_each_prompt(client):
    engine = ScriptedEngine(echo)
    answer = client(engine).completions.create(model="tiny", prompt=["ab", "cd"], max_tokens=50)
    assert [c.text for c in answer.choices] == [" and ab", " and cd"]
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == 2 * (1 + 2)


def test_completions_stream_and_echo(client):
    connected = client(ScriptedEngine(echo))
    chunks = list(connected.completions.create(model="tiny", prompt="ab", max_tokens=50, stream=True, echo=True))
    assert "".join(c.choices[0].text for c in chunks) == "ab and ab"
    whole = connected.completions.create(model="tiny", prompt="ab", max_tokens=50, echo=True)
    assert whole.choices[0].text == "ab and ab"


def test_completions_stop_after_sixteen_tokens_unless_told_otherwise(client):
    answer = client(ScriptedEngine(lambda _r: "x" * 100)).completions.create(model="tiny", prompt="a")
    assert answer.choices[0].text == "x" * 16 and answer.choices[0].finish_reason == "length"


def test_models_are_listed_and_retrieved(client):
    connected = client()
    assert [model.id for model in connected.models.list()] == ["tiny"]
    assert connected.models.retrieve("tiny").owned_by == "puna"
    with pytest.raises(openai.NotFoundError):
        connected.models.retrieve("large")


def test_many_clients_at_once_each_get_their_own_answer(client):
    connected = client(ScriptedEngine(echo, pause_s=0.0005))

    def one(i):
        messages = [{"role": "user", "content": f"number {i}"}]
        if i % 2:
            return connected.chat.completions.create(model="tiny", messages=messages).choices[0].message.content
        stream = connected.chat.completions.create(model="tiny", messages=messages, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(24))) == [f"You said: number {i}" for i in range(24)]


def test_a_short_answer_does_not_wait_for_a_long_one(client):
    script = {"long": "x" * 1500, "short": "y"}
    connected = client(ScriptedEngine(lambda r: script[r.dialog[-1].content], pause_s=0.002))
    stream = connected.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "long"}], stream=True
    )
    next(stream)
    began = time.monotonic()
    short = connected.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "short"}])
    assert short.choices[0].message.content == "y"
    assert time.monotonic() - began < 1.5  # the long one takes 3 s and more
    stream.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_answer(client, stream):
    engine = ScriptedEngine(lambda _r: "x" * 1500, pause_s=0.005)
    connected = client(engine)
    if stream:
        answer = connected.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        while not next(answer).choices[0].delta.content:
            pass
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            connected.with_options(timeout=0.3).chat.completions.create(model="tiny", messages=HELLO)
    assert engine.closed.wait(timeout=3)
    assert engine.drawn < 1000
    assert connected.models.list().data  # and the server lives
