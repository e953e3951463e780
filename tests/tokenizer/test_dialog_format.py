"""Conversations as ids with classes, and the assistant's message back from ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.chat import Message, ToolCall, assistant, system, tool_result, user
from puna.errors import PunaError
from puna.tokenizer.call_stream import read
from puna.tokenizer.calls import BUILTIN_TOOLS, CODE_INTERPRETER, TAGGED
from puna.tokenizer.dialog import TokenClass, parse, parse_text, render

texts = st.one_of(st.text(max_size=30), st.sampled_from(["<|eot_id|>", "<|python_tag|>x", "\n\n\n", '{"a": 1}', "'\""]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
json_calls = st.builds(ToolCall, name=texts, arguments=st.dictionaries(texts, values, max_size=3))
builtin_calls = st.builds(
    ToolCall,
    name=st.sampled_from(BUILTIN_TOOLS),
    arguments=st.dictionaries(st.sampled_from(["query", "q_2"]), values),
    dialect=st.just("builtin"),
)
python_calls = st.builds(
    lambda code: ToolCall(name=CODE_INTERPRETER, arguments={"code": code}, dialect="python"),
    # Source that spells a call of another dialect is that call: the format has one way to write both.
    texts.filter(lambda code: read(["", code])[1][0].dialect == "python"),
)
function_calls = st.builds(
    ToolCall,
    name=st.sampled_from(["f", "größe", "a.b-c"]),
    arguments=st.dictionaries(texts, values, max_size=3),
    dialect=st.just("function"),
)
pythonic_calls = st.builds(
    ToolCall,
    name=st.sampled_from(["f", "größe", "a.b"]),
    arguments=st.dictionaries(st.sampled_from(["n", "from"]), values),
    dialect=st.just("pythonic"),
)
calls = st.lists(json_calls | builtin_calls | python_calls | function_calls | pythonic_calls, max_size=3).map(tuple)
contents = texts.filter(lambda text: not read([text])[1])
answers = st.builds(lambda content, made: assistant(content, *made), contents, calls)
dialogs = st.lists(
    st.builds(user, texts) | st.builds(system, texts) | st.builds(tool_result, texts) | answers, max_size=5
).map(tuple)


def rendered_answer(tokenizer, message: Message) -> list[int]:
    """What a model writes for `message`: its ids after the header."""
    prompt = render(tokenizer, (), answer=True).ids
    whole = render(tokenizer, (message,), answer=False).ids
    assert whole[: len(prompt)] == prompt
    return whole[len(prompt) :]


def test_the_frame_is_llamas(tokenizer):
    dialog = (system("Be kind."), user("Hi <|eot_id|>"), assistant("Hello."), tool_result("42"))
    text = tokenizer.decode(render(tokenizer, dialog, answer=True).ids)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <|eot_id|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_without_a_system_message_there_is_no_system_header(tokenizer):
    ids = render(tokenizer, (user("Hi"),), answer=False).ids
    assert tokenizer.decode(ids).startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>")


@given(dialogs)
def test_specials_come_from_the_frame_alone(tokenizer, dialog):
    ids = render(tokenizer, dialog, answer=False).ids
    assert ids.count(tokenizer.bos) == 1
    assert ids.count(tokenizer.start_header) == ids.count(tokenizer.end_header) == len(dialog)
    assert ids.count(tokenizer.eot) + ids.count(tokenizer.eom) == len(dialog)


@given(dialogs, st.booleans())
def test_each_class_is_on_its_own_tokens(tokenizer, dialog, answer):
    rendered = render(tokenizer, dialog, answer=answer)
    assert len(rendered.ids) == len(rendered.classes)
    expected = [TokenClass.CONTEXT]  # begin_of_text
    for message in dialog:
        alone = render(tokenizer, (message,), answer=False).ids[1:]
        if message.role != "assistant":
            expected += [TokenClass.CONTEXT] * len(alone)
            continue
        header = render(tokenizer, (), answer=True).ids[1:]
        body = len(alone) - len(header) - 1
        expected += [TokenClass.HEADER] * len(header) + [TokenClass.BODY] * body + [TokenClass.END]
    if answer:
        expected += [TokenClass.HEADER] * len(render(tokenizer, (), answer=True).ids[1:])
    assert rendered.classes == expected


@given(answers)
def test_body_and_end_are_what_the_model_writes(tokenizer, message):
    rendered = render(tokenizer, (user("Hi"), message), answer=False)
    learnt = [i for i, c in zip(rendered.ids, rendered.classes) if c in (TokenClass.BODY, TokenClass.END)]
    assert learnt == rendered_answer(tokenizer, message)


@given(answers)
def test_a_message_comes_back_from_its_ids(tokenizer, message):
    ids = rendered_answer(tokenizer, message)
    parsed, wants_tool = parse(tokenizer, ids)
    assert parsed == message
    assert wants_tool == any(call.dialect in TAGGED for call in message.tool_calls)
    assert rendered_answer(tokenizer, parsed) == ids


@given(answers)
def test_a_message_cut_anywhere_is_parsed_without_a_crash(tokenizer, message):
    ids = rendered_answer(tokenizer, message)
    for end in range(len(ids)):
        assert parse(tokenizer, ids[:end])[1] is False


def test_the_tag_of_a_builtin_call_stays_in_history(tokenizer):
    call = ToolCall(name="brave_search", arguments={"query": 'who said "hello"'}, dialect="builtin")
    ids = rendered_answer(tokenizer, assistant("", call))
    assert tokenizer.decode(ids) == '<|python_tag|>brave_search.call(query="who said \\"hello\\"")<|eom_id|>'
    assert ids[0] == tokenizer.python_tag and ids[-1] == tokenizer.eom


def test_the_dialects_as_text(tokenizer):
    def written(*args):
        return tokenizer.decode(rendered_answer(tokenizer, assistant(*args)))

    look_up = ToolCall(name="look_up", arguments={"q": "wool"})
    code = ToolCall(name=CODE_INTERPRETER, arguments={"code": "print(6 * 7)"}, dialect="python")
    json_text = '{"name": "look_up", "parameters": {"q": "wool"}}'
    assert written("", look_up) == f"{json_text}<|eot_id|>"
    assert written("", look_up, look_up) == f"{json_text}; {json_text}<|eot_id|>"
    assert written("I look.", look_up) == f"I look.<|python_tag|>{json_text}<|eot_id|>"
    assert written("", code) == "<|python_tag|>print(6 * 7)<|eom_id|>"
    assert written("I compute.", code) == "I compute.<|python_tag|>print(6 * 7)<|eom_id|>"
    tag = ToolCall(name="f", arguments={"n": 1}, dialect="function")
    listed = ToolCall(name="g", arguments={"n": "it's"}, dialect="pythonic")
    assert written("", tag) == '<function=f>{"n": 1}</function><|eot_id|>'
    assert written("", listed, listed) == """[g(n="it's"), g(n="it's")]<|eot_id|>"""
    assert written("", tag, listed, code) == (
        """<function=f>{"n": 1}</function><|python_tag|>[g(n="it's")]<|python_tag|>print(6 * 7)<|eom_id|>"""
    )
    assert written("", look_up, code) == f"{json_text}<|python_tag|>print(6 * 7)<|eom_id|>"


def test_a_call_its_dialect_cannot_express_is_refused(tokenizer):
    for call, hint in (
        (ToolCall(name="look_up", arguments={}, dialect="builtin"), "brave_search"),
        (ToolCall(name="look_up", arguments={"code": ""}, dialect="python"), "code_interpreter"),
        (ToolCall(name=CODE_INTERPRETER, arguments={"source": ""}, dialect="python"), "code_interpreter"),
    ):
        with pytest.raises(PunaError, match=hint):
            render(tokenizer, (assistant("", call),), answer=False)
    with pytest.raises(PunaError, match="only the assistant"):
        calls = (ToolCall(name="f", arguments={}),)
        render(tokenizer, (Message(role="user", content="", tool_calls=calls),), answer=False)


def test_text_with_the_tag_spelled_out_is_parsed_alike():
    message = parse_text('I look.<|python_tag|>brave_search.call(query="wool")')
    assert message == assistant(
        "I look.", ToolCall(name="brave_search", arguments={"query": "wool"}, dialect="builtin")
    )
    assert parse_text("Just words.") == assistant("Just words.")
