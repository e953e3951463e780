"""The chat template's style, token for token what `transformers` makes of such a template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from puna.chat import ToolCall, assistant, system, tool_result, user
from puna.errors import ConfigError, PunaError
from puna.tokenizer.calls import CODE_INTERPRETER
from puna.tokenizer.chat_template import HuggingFace
from puna.tokenizer.dialog import TokenClass, parse, render
from puna.tokenizer.export import write_hugging_face

# The released template's text is not part of this repository. This one was written for the test, in other words and
# another order, from the description of what that one does: the header that is always there, where functions go and
# how they are introduced, trimming, quoting, one call at a time, and when a message ends with <|eom_id|>.
TEMPLATE = """\
{%- macro open(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>' }}{{ '\\n\\n' }}{% endmacro -%}
{%- macro introduce() -%}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' -}}
    {{- 'Do not use variables.' + '\\n\\n' -}}
    {%- for tool in tools -%}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{%- endfor -%}
{%- endmacro -%}
{%- set offered = tools is defined and tools is not none -%}
{%- set inside_question = offered and (tools_in_user_message is not defined or tools_in_user_message) -%}
{%- set ipython = builtin_tools is defined -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- set rest = messages[1:] if has_system else messages -%}
{{- bos_token -}}
{%- if old_template is not defined -%}
    {{- open('system') -}}
    {%- if ipython or offered %}{{ 'Environment: ipython' + '\\n' }}{% endif -%}
    {%- if ipython %}{{ 'Tools: ' + (builtin_tools | reject('eq', 'code_interpreter') | join(', ')) + '\\n\\n' }}{% endif -%}
    {{- 'Cutting Knowledge Date: December 2023' + '\\n' + 'Today Date: ' + (date_string or '26 Jul 2024') + '\\n\\n' -}}
    {%- if offered and not inside_question -%}
        {{- 'You have access to the following functions. To call a function, please respond with JSON for a ' -}}
        {{- 'function call.' -}}{{- introduce() -}}
    {%- endif -%}
    {{- messages[0].content.strip() if has_system -}}<|eot_id|>
{%- else -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in (messages if old_template is defined else rest) -%}
    {%- if message.tool_calls is defined -%}
        {%- if message.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif -%}
        {%- set call = message.tool_calls[0].function -%}
        {{- open('assistant') -}}
        {%- if ipython and call.name in builtin_tools -%}
            <|python_tag|>{{ call.name }}.call(
            {%- for key in call.arguments -%}
                {{ ', ' if not loop.first }}{{ key }}="{{ call.arguments[key] }}"
            {%- endfor -%}
            )
        {%- else -%}
            {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' -}}
        {%- endif -%}
        {{- '<|eom_id|>' if ipython else '<|eot_id|>' -}}
    {%- elif message.role in ('tool', 'ipython') -%}
        {{- open('ipython') + (message.content | tojson) + '<|eot_id|>' -}}
    {%- else -%}
        {{- open(message.role) -}}
        {%- if loop.first and inside_question -%}
            {{- 'Given the following functions, please respond with a JSON for a function call with its proper ' -}}
            {{- 'arguments that best answers the given prompt.' + '\\n\\n' -}}{{- introduce() -}}
        {%- endif -%}
        {{- message.content.strip() + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ open('assistant') }}{% endif -%}
"""

FUNCTIONS = (
    {
        "name": "look_up",
        "description": "Find größere things & <b>.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
    },
    {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
)
LOOK_UP = ToolCall(name="look_up", arguments={"q": 'Größe "x" <b>', "n": [1, 2.5, None, True]})
SEARCH = ToolCall(name="brave_search", arguments={"query": "who said it's so", "n": "3"}, dialect="builtin")
DIALOGS = {
    "question": (user("Hi"),),
    "white space": (system(" Be kind.\n"), user("\n\n Hi \t"), assistant("  Hello.\n\n"), user("")),
    "late system": (user("Hi"), system("\nBe kind."), user("So?")),
    "json call": (user("q"), assistant("", LOOK_UP), tool_result('{"found": ["é"]}\n'), assistant("Done.")),
    "builtin call": (system("s"), user("q"), assistant("", SEARCH), tool_result(""), assistant("Done."), user("x")),
}


@pytest.fixture(scope="module")
def peer(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("peer")
    write_hugging_face(out, tokenizer, context=512)
    return AutoTokenizer.from_pretrained(out)


def as_given(message):
    made = {"role": message.role, "content": message.content}
    if message.tool_calls:
        calls = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
        made["tool_calls"] = [{"type": "function", "function": c} for c in calls]
    return made


def theirs(peer, dialog, style, answer):
    options = {"date_string": style.today, "tools_in_user_message": style.functions_in_user_message}
    if style.functions is not None:
        options["tools"] = [{"type": "function", "function": f} for f in style.functions]
    if style.builtins is not None:
        options["builtin_tools"] = list(style.builtins)
    if style.version == "3":
        options["old_template"] = True
    messages = [as_given(m) for m in dialog]
    return peer.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=answer, return_dict=False, **options
    )


STYLES = [
    HuggingFace(),
    HuggingFace(today="01 Feb 2025"),
    HuggingFace(functions=FUNCTIONS),
    HuggingFace(functions=(), version="3.2"),
    HuggingFace(functions=FUNCTIONS, functions_in_user_message=False),
    HuggingFace(builtins=("brave_search", "wolfram_alpha", CODE_INTERPRETER)),
    HuggingFace(builtins=(CODE_INTERPRETER, "brave_search"), functions=FUNCTIONS, version="3.3"),
    HuggingFace(builtins=("brave_search",), functions=FUNCTIONS, functions_in_user_message=False),
]


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("style", STYLES, ids=range(len(STYLES)))
@pytest.mark.parametrize("name", DIALOGS)
def test_the_tokens_are_those_of_transformers(tokenizer, peer, name, style, answer):
    if name == "builtin call" and style.builtins is None:
        style = HuggingFace(builtins=("brave_search",), today=style.today)
    ours = render(tokenizer, DIALOGS[name], answer=answer, style=style)
    assert ours.ids == theirs(peer, DIALOGS[name], style, answer)
    assert len(ours.classes) == len(ours.ids)


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("name", ["question", "white space", "late system"])
def test_llama_3_has_no_dates(tokenizer, peer, name, answer):
    style = HuggingFace(version="3")
    ours = render(tokenizer, DIALOGS[name], answer=answer, style=style).ids
    assert ours == theirs(peer, DIALOGS[name], style, answer)
    assert "Cutting Knowledge" not in tokenizer.decode(ours)


plain = st.text(max_size=20).filter(lambda text: "<|" not in text)
arguments = st.dictionaries(plain, plain | st.integers() | st.booleans() | st.none() | st.lists(plain), max_size=3)
json_calls = st.builds(lambda given: ToolCall(name="look_up", arguments=given), arguments)


@settings(max_examples=60)
@given(
    st.lists(
        st.builds(user, plain)
        | st.builds(assistant, plain)
        | st.builds(tool_result, plain)
        | st.builds(lambda call: assistant("", call), json_calls),
        max_size=4,
    ),
    plain,
    st.sampled_from(STYLES),
)
def test_generated_dialogs_have_the_tokens_of_transformers(tokenizer, peer, messages, text, style):
    dialog = (system(text), user(text), *messages)
    ours = render(tokenizer, dialog, answer=True, style=style).ids
    assert ours == theirs(peer, dialog, style, True)


@pytest.mark.parametrize(
    "call",
    [
        ToolCall(name="brave_search", arguments={"query": 'who said "hello"', "n": 3}, dialect="builtin"),
        ToolCall(name=CODE_INTERPRETER, arguments={"code": 'print("a")\n'}, dialect="python"),
        ToolCall(name="f", arguments={"n": "it's"}, dialect="pythonic"),
        ToolCall(name="f", arguments={"n": 1}, dialect="function"),
        LOOK_UP,
    ],
)
def test_history_has_the_tokens_that_the_model_drew(tokenizer, call):
    style = HuggingFace(builtins=("brave_search", CODE_INTERPRETER), functions=FUNCTIONS)
    rendered = render(tokenizer, (user("q"), assistant("", call)), answer=False, style=style)
    drawn = [i for i, c in zip(rendered.ids, rendered.classes) if c in (TokenClass.BODY, TokenClass.END)]
    message, waits = parse(tokenizer, drawn)
    assert message == assistant("", call) and waits
    again = render(tokenizer, (user("q"), message), answer=False, style=style)
    assert again == rendered
    assert (tokenizer.python_tag in drawn) == (call.dialect in ("builtin", "python"))


def test_what_the_template_cannot_say_is_refused(tokenizer, peer):
    two = (user("q"), assistant("", LOOK_UP, LOOK_UP))
    with pytest.raises(Exception, match="one call at a time"):
        theirs(peer, two, HuggingFace(), True)
    with pytest.raises(PunaError, match="2 tool calls"):
        render(tokenizer, two, answer=True, style=HuggingFace())
    with pytest.raises(PunaError, match="no user message"):
        render(tokenizer, (system("s"),), answer=True, style=HuggingFace(functions=FUNCTIONS))
    with pytest.raises(PunaError, match="no user message"):
        render(tokenizer, (assistant("s"),), answer=True, style=HuggingFace(functions=FUNCTIONS))
    with pytest.raises(PunaError, match="knows no tools"):
        render(tokenizer, (user("q"), tool_result("1")), answer=True, style=HuggingFace(version="3"))


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"version": "4"}, "3.2 or 3.3"),
        ({"version": "3.2", "builtins": ()}, "no built-in"),
        ({"version": "3", "functions": ()}, "no functions"),
        ({"builtins": ("google",)}, "'google'"),
    ],
)
def test_a_style_that_no_template_has_is_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        HuggingFace(**settings)
