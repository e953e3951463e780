"""Every dialog format through the server and the terminal: a Llama 2 that is real and random, and scripted calls."""

import io
import json
import sys

import pytest
from scripted_engine import ScriptedEngine

from puna.chat import Request, Sampling, assistant, tool_result, user
from puna.errors import ConfigError, PunaError
from puna.inference.engine import Engine
from puna.inference.setup import Setup
from puna.model.checkpoint import save_model
from puna.model.conversion import convert
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.serve.conversation import Conversation
from puna.serve.terminal import ChatOptions, chat_command
from puna.tokenizer.bpe import MODEL_FILE
from puna.tokenizer.sentencepiece import Kind, Piece, SentencePieceTokenizer, write_sentencepiece

HELLO = [{"role": "user", "content": "the héllo"}]
WORDS = ["▁t", "he", "▁the", "▁h", "er", "▁her", "▁herd", "um", "▁hum", "▁hums"]


def sentencepiece():
    """Bytes, letters and a few words, as Llama 2 has thousands."""
    texts = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    pieces = [Piece(text, 0.0, Kind(kind)) for text, kind in texts]
    letters = "▁tehrdumsaé[]IN/.<>SY\n"
    return SentencePieceTokenizer([
        *pieces,
        *(Piece(word, -float(n), Kind.NORMAL) for n, word in enumerate(WORDS)),
        *(Piece(letter, -1e9, Kind.NORMAL) for letter in letters),
    ])  # fmt: skip


def checkpoint(folder, context):
    tokenizer = sentencepiece()
    shape = LlamaConfig(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, ffn_dim=64, vocab_size=tokenizer.vocab_size, context=context
    )  # fmt: skip
    write_sentencepiece(folder / MODEL_FILE, tokenizer)
    save_model(Llama(shape).init_weights(seed=0), folder, folder / "llama")
    return folder / "llama"


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("llama-2"), 4096)


@pytest.fixture(scope="module")
def llama_1(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("llama-1"), 2048)


@pytest.mark.parametrize("seed", range(6))
def test_a_llama_2_answers_streamed_and_whole_alike(llama_2, client, seed):
    engine = Engine.load(llama_2)
    connected = client(engine)
    settings = {"model": "tiny", "messages": HELLO, "temperature": 1.5, "seed": seed, "max_tokens": 40}
    whole = connected.chat.completions.create(**settings)
    chunks = list(connected.chat.completions.create(**settings, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=seed, max_tokens=40)
    [direct] = engine.generate([Request(dialog=(user("the héllo"),), sampling=sampling)])
    assert streamed == whole.choices[0].message.content == direct.text == direct.message.content != ""
    assert whole.usage.prompt_tokens == len(engine.format.render((user("the héllo"),)).ids) == direct.prompt_tokens


def test_what_is_streamed_is_what_decoding_all_of_it_gives(llama_2):
    engine = Engine.load(llama_2)
    for seed in range(8):
        sampling = Sampling(temperature=2.0, seed=seed, max_tokens=60, logprobs=0)
        pieces = list(engine.stream(Request(dialog=(user("the herd"),), sampling=sampling)))
        ids = [choice.token for choice in pieces[-1].completion.tokens]
        assert ids
        assert "".join(piece.text for piece in pieces) == engine.tokenizer.decode(ids)


def test_a_raw_completion_goes_on_with_its_text(llama_1, client):
    engine = Engine.load(llama_1)
    answer = client(engine).completions.create(model="tiny", prompt="the herd", max_tokens=20, temperature=1.0, seed=1)
    text = answer.choices[0].text
    [direct] = engine.generate(
        [Request(prompt="the herd", sampling=Sampling(temperature=1.0, top_p=0.9, seed=1, max_tokens=20))]
    )
    assert text == direct.text != "" and answer.usage.prompt_tokens == 1 + len(engine.tokenizer.encode("the herd"))


def test_a_base_model_completes_and_says_that_it_does_not_chat(llama_1, client, monkeypatch, capsys):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="base model"):
        client(Engine.load(llama_1)).chat.completions.create(model="tiny", messages=HELLO)
    with pytest.raises(PunaError, match="base model") as caught:
        chat_command(llama_1)
    assert "--dialog raw" in (caught.value.hint or "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the herd\nand the puna\n/show\n")))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), write_through=True))
    sampling = Sampling(temperature=1.0, max_tokens=12)
    assert chat_command(llama_1, ChatOptions(sampling=sampling, seed=3), setup=Setup(dialog="raw")) == 0
    assert sys.stdout.buffer.getvalue().decode().strip()
    assert "raw" in capsys.readouterr().err


def test_a_llama_2_chats_in_the_terminal_and_remembers(llama_2, monkeypatch, tmp_path, capsys):
    lines = f"/system Be kind.\nthe herd\n/show\nhums\n/save {tmp_path / 'chat.json'}\n/new\n/load {tmp_path / 'chat.json'}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), write_through=True))
    assert chat_command(llama_2, ChatOptions(sampling=Sampling(temperature=1.0, max_tokens=12), seed=3)) == 0
    notices = capsys.readouterr().err
    assert "dialog       llama2" in notices and "loaded 4 messages" in notices
    saved = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2


def test_a_llama_2_from_a_gguf_file_answers_alike(llama_2, tmp_path):
    convert(llama_2, tmp_path / "a.gguf", "gguf", "F32")
    asked = Request(dialog=(user("the herd"),), sampling=Sampling(max_tokens=20))
    [one], [other] = (Engine.load(path).generate([asked]) for path in (llama_2, tmp_path / "a.gguf"))
    assert one.text == other.text and one.prompt_tokens == other.prompt_tokens


def test_the_format_is_refused_before_the_weights_are_read(llama_2):
    (llama_2 / "model.safetensors").rename(llama_2 / "away")
    (llama_2 / "model.safetensors").write_bytes(b"not weights")
    try:
        with pytest.raises(ConfigError, match="use llama2 or raw"):
            Engine.load(llama_2, dialog="pythonic")
        with pytest.raises(ConfigError, match="they are meta, huggingface"):
            Engine.load(llama_2, dialog="alpaca")
    finally:
        (llama_2 / "away").rename(llama_2 / "model.safetensors")


TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
DIALECTS = {
    "meta": '{"name": "get_weather", "parameters": {"city": "Lima"}}',
    "huggingface": '{"name": "get_weather", "parameters": {"city": "Lima"}}',
    "function": '<function=get_weather>{"city": "Lima"}</function>',
    "pythonic": "[get_weather(city='Lima'), get_weather(city=\"L'Aquila\", metric=None)]",
}


@pytest.mark.parametrize(("dialog", "text"), [*DIALECTS.items(), ("meta", DIALECTS["pythonic"])])
def test_calls_in_every_dialect_reach_the_client_and_come_back_as_they_were_written(client, dialog, text):
    engine = ScriptedEngine(lambda request: "Rain." if request.dialog[-1].role == "ipython" else text, dialog=dialog)
    connected = client(engine)
    settings = {"model": "tiny", "messages": HELLO, "tools": [TOOL]}
    whole = connected.chat.completions.create(**settings).choices[0]
    chunks = [chunk.choices[0] for chunk in connected.chat.completions.create(**settings, stream=True)]
    streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    calls = whole.message.tool_calls
    assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls" and not whole.message.content
    assert [(c.function.name, c.function.arguments) for c in streamed] == [
        (c.function.name, c.function.arguments) for c in calls
    ]
    assert json.loads(calls[0].function.arguments) == {"city": "Lima"}

    back = {"role": "assistant", "tool_calls": [call.model_dump() for call in calls]}
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
    connected.chat.completions.create(**settings | {"messages": [*HELLO, back, *results]})
    format = engine.format
    prompt, history = format.render(engine.seen[0].dialog).ids, format.render(engine.seen[-1].dialog).ids
    drawn = engine.tokenizer.encode(text)
    assert history[: len(prompt + drawn)] == prompt + drawn
    assert engine.seen[-1].dialog[-1] == tool_result("rain")


@pytest.mark.parametrize("dialog", ["function", "pythonic", "meta"])
def test_a_call_from_another_server_is_written_in_the_formats_dialect(client, dialog):
    engine = ScriptedEngine(lambda request: "Rain.", dialog=dialog)
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Lima"}'}}
    odd = {"id": "call_2", "type": "function", "function": {"name": "get_weather", "arguments": '{"the city": "Lima"}'}}
    results = [{"role": "tool", "tool_call_id": id, "content": "rain"} for id in ("call_1", "call_2")]
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call, odd]}, *results]
    client(engine).chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    [said] = [message for message in engine.seen[0].dialog if message.role == "assistant"]
    assert said.tool_calls[0].dialect == engine.format.dialect
    assert said.tool_calls[1].dialect == ("json" if dialog == "pythonic" else engine.format.dialect)


@pytest.mark.parametrize("dialog", ["llama3", "raw"])
def test_tools_for_a_format_without_them_are_refused(client, dialog):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="has no tools"):
        client(ScriptedEngine(lambda request: "no", dialog=dialog)).chat.completions.create(
            model="tiny", messages=HELLO, tools=[TOOL]
        )


def test_a_conversation_leaves_tools_aside_where_the_format_has_none():
    from puna.tools.calculator import calculator

    conversation = Conversation(ScriptedEngine(lambda request: "no", dialog="llama3"), tools=[calculator()])
    list(conversation.ask("hi"))
    assert conversation.messages == [user("hi"), assistant("no")] and not conversation.tools_on


def test_the_command_line_lists_the_formats():
    from puna.cli import parser
    from puna.cli.talking import DIALOG_HELP
    from puna.tokenizer.formats import FORMATS

    assert all(name in DIALOG_HELP for name in FORMATS)
    assert parser().parse_args(["chat", "x", "--dialog", "raw"]).dialog == "raw"
    assert parser().parse_args(["serve", "x"]).dialog == ""
