"""A conversation without a terminal: events in order, nothing forgotten in silence, files that are checked."""

import json

import pytest
from scripted_engine import ScriptedEngine, echo

from puna.errors import ConfigError, DataError, PunaError
from puna.serve import commands
from puna.serve.conversation import Conversation, Ended, Forgot, Said, Used
from puna.serve.screen import harmless
from puna.tools.calculator import calculator


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Said))


def test_an_answer_is_streamed_and_remembered():
    conversation = Conversation(ScriptedEngine(echo), system="Be kind.")
    events = list(conversation.ask("hello"))
    assert text_of(events) == "You said: hello" and len(events) > 5
    assert isinstance(events[-1], Ended) and events[-1].reason == "stop"
    assert [m.role for m in conversation.dialog] == ["system", "user", "assistant"]
    list(conversation.ask("again"))
    assert [m.content for m in conversation.engine.seen[-1].dialog][1:] == ["hello", "You said: hello", "again"]


def test_answers_differ_in_seed_until_one_is_set():
    conversation = Conversation(ScriptedEngine(echo))
    for _ in range(2):
        list(conversation.ask("a"))
    conversation.set("seed", "7")
    for _ in range(2):
        list(conversation.retry())
    conversation.set("seed", "random")
    list(conversation.retry())
    seeds = [request.sampling.seed for request in conversation.engine.seen]
    assert len(set(seeds)) == 4 and seeds[2] == seeds[3] == 7


def test_a_stopped_answer_keeps_what_was_said_and_closes_the_engines_iterator():
    conversation = Conversation(ScriptedEngine(lambda _r: "word " * 100))
    said = []
    for event in conversation.ask("go", stopped=lambda: len(said) >= 9):
        said.append(event)
    assert said[-1].reason == "stopped"
    assert conversation.messages[-1].content == text_of(said) != ""
    assert conversation.engine.closed.is_set()


def test_an_answer_stopped_before_its_first_word_leaves_no_trace():
    conversation = Conversation(ScriptedEngine(lambda _r: '{"name": "f"' * 9), tools=[calculator()])
    conversation.tools_on = True
    list(conversation.ask("go", stopped=lambda: True))
    assert conversation.messages == [] or conversation.messages[-1].role == "assistant"


def test_a_tool_call_is_run_shown_and_answered():
    def script(request):
        result = request.dialog[-1]
        if result.role == "ipython":
            return f"It is {result.content}."
        return '<|python_tag|>wolfram_alpha.call(query="12*(3+4)")'

    conversation = Conversation(ScriptedEngine(script), tools=[calculator()])
    events = list(conversation.ask("What is 12*(3+4)?"))
    assert [event.result for event in events if isinstance(event, Used)] == ["84"]
    assert text_of(events) == "It is 84."
    assert "Environment: ipython\nTools: wolfram_alpha" in conversation.dialog[0].content
    assert [m.role for m in conversation.messages] == ["user", "assistant", "ipython", "assistant"]


def test_with_tools_off_nothing_is_announced_or_run():
    call = '<|python_tag|>wolfram_alpha.call(query="1+1")'
    conversation = Conversation(ScriptedEngine(lambda _r: call), tools=[calculator()])
    conversation.tools_on = False
    events = list(conversation.ask("go"))
    assert text_of(events) == call and not any(isinstance(event, Used) for event in events)
    assert conversation.dialog[0].role == "user"


def test_calls_without_end_are_ended():
    conversation = Conversation(
        ScriptedEngine(lambda _r: '<|python_tag|>wolfram_alpha.call(query="1+1")'), tools=[calculator()]
    )
    events = list(conversation.ask("go"))
    assert sum(isinstance(event, Used) for event in events) == 4
    assert events[-1].reason == "tool_calls"


def test_a_full_context_forgets_the_oldest_exchanges_and_says_so():
    conversation = Conversation(ScriptedEngine(lambda _r: "x" * 40, context=400), system="Be kind.")
    forgot = []
    for i in range(8):
        events = list(conversation.ask(f"question {i}"))
        assert events[-1].reason == "stop"
        forgot += [event.exchanges for event in events if isinstance(event, Forgot)]
    assert forgot and forgot == sorted(forgot)
    seen = conversation.engine.seen[-1].dialog
    assert seen[0].content == "Be kind." and seen[1].role == "user" and seen[-1].content == "question 7"
    assert len(conversation.messages) == 16  # all are kept for /save


def test_a_message_that_cannot_fit_is_refused_and_the_conversation_stays():
    conversation = Conversation(ScriptedEngine(echo, context=300))
    list(conversation.ask("hello"))
    before = list(conversation.messages)
    with pytest.raises(DataError, match="300"):
        list(conversation.ask("x" * 400))
    assert conversation.messages == before


def test_a_failing_engine_leaves_the_conversation_as_it_was():
    class Failing(ScriptedEngine):
        def stream(self, request, **_):
            yield from list(super().stream(request))[:3]
            raise RuntimeError("lost")

    conversation = Conversation(Failing(echo))
    with pytest.raises(RuntimeError):
        list(conversation.ask("hello"))
    assert conversation.messages == []


def test_a_saved_conversation_comes_back_the_same(tmp_path):
    script = '<|python_tag|>wolfram_alpha.call(query="1+1")'
    conversation = Conversation(
        ScriptedEngine(lambda r: script if r.dialog[-1].role == "user" else "2"), tools=[calculator()]
    )
    conversation.system = "Grüße"
    conversation.set("temperature", "0.2")
    list(conversation.ask("1+1?"))
    conversation.save(tmp_path / "chat.json")
    other = Conversation(ScriptedEngine(echo), tools=[calculator()])
    other.load(tmp_path / "chat.json")
    assert (other.messages, other.system, other.sampling) == (conversation.messages, "Grüße", conversation.sampling)
    assert other.dialog == conversation.dialog


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        '{"puna_chat": 2, "sampling": {}}',
        '{"puna_chat": 1, "sampling": {"temperature": 99}}',
        '{"puna_chat": 1, "sampling": {}, "messages": [{"role": "king", "content": "x"}]}',
        '{"puna_chat": 1, "sampling": {}, "messages": [{"role": "user", "content": 5}]}',
        '{"puna_chat": 1, "sampling": {}, "surprise": 1}',
        '{"puna_chat": 1, "sampling": {}, "messages": [{"role": "user", "tool_calls": [{"name": "f", "arguments": {}}]}]}',
    ],
)
def test_a_file_that_is_no_conversation_is_refused_and_changes_nothing(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    conversation = Conversation(ScriptedEngine(echo))
    list(conversation.ask("hello"))
    before = list(conversation.messages)
    with pytest.raises(PunaError):
        conversation.load(tmp_path / "bad.json")
    assert conversation.messages == before


def test_save_does_not_replace_a_file_of_another_kind(tmp_path):
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    conversation = Conversation(ScriptedEngine(echo))
    with pytest.raises(DataError, match="not a saved conversation"):
        conversation.save(precious)
    assert precious.read_text() == "years of work"
    conversation.save(tmp_path / "chat.json")
    conversation.save(tmp_path / "chat.json")  # its own kind it may
    assert json.loads((tmp_path / "chat.json").read_text())["puna_chat"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("temperature", "nan"), ("temperature", "-1"), ("top_k", "1.5"), ("max_tokens", "0"), ("warmth", "1")],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(name, value):
    conversation = Conversation(ScriptedEngine(echo))
    with pytest.raises(ConfigError):
        conversation.set(name, value)


def test_every_command_is_in_the_help_and_a_misspelt_one_is_answered_with_the_nearest():
    conversation = Conversation(ScriptedEngine(echo))
    text = commands.run(conversation, "/?")
    assert all(command.usage in text for command in commands.COMMANDS.values())
    with pytest.raises(PunaError, match="did you mean /save"):
        commands.run(conversation, "/sav")


def test_commands_change_the_conversation():
    conversation = Conversation(ScriptedEngine(echo), tools=[calculator()])
    list(conversation.ask("hello"))
    commands.run(conversation, "/set temperature=0.25")
    commands.run(conversation, "/system Be brief.")
    commands.run(conversation, "/tools off")
    assert conversation.sampling.temperature == 0.25 and conversation.dialog[0].content == "Be brief."
    shown = commands.run(conversation, "/show")
    assert "0.25" in shown and "Be brief." in shown and "wolfram_alpha (off)" in shown
    commands.run(conversation, "/new")
    assert conversation.messages == [] and conversation.system == "Be brief."
    with pytest.raises(PunaError):
        list(conversation.retry())


def test_nothing_that_a_terminal_obeys_survives():
    orders = "\x1b]0;title\x07 \x1b[2J \x9b31m \r \x08 \u202e \u2066 \x7f"
    shown = harmless(f"a\tb\n{orders}")
    assert shown.startswith("a\tb\n")
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) <= 0x2069 for c in shown[4:])
