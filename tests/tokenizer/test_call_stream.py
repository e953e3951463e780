"""Calls in five dialects: read right, written back alike, and the same however the text is cut into pieces."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.chat import ToolCall
from puna.errors import PunaError
from puna.tokenizer.call_stream import MessageStream, read
from puna.tokenizer.calls import BUILTIN_TOOLS, CODE_INTERPRETER, PYTHON_TAG, write_call, write_calls
from puna.tokenizer.literals import DEEPEST


def call(name, dialect="json", **arguments):
    return ToolCall(name=name, arguments=arguments, dialect=dialect)


def code(source):
    return call(CODE_INTERPRETER, "python", code=source)


ALICE = '{"name": "Alice", "age": 3}'
WEATHER = "[get_weather(city='San Francisco', metric='celsius'), get_weather(city='Seattle', metric='celsius')]"
# What models of this family write, each with how many parsers fail on: 11 strings, their text and their calls.
ELEVEN = [
    (
        '<|python_tag|>brave_search.call(query="latest price of 1oz gold")',
        "",
        [call("brave_search", "builtin", query="latest price of 1oz gold")],
    ),
    (
        '<|python_tag|>brave_search.call(query="who said \\"hello\\"")',
        "",
        [call("brave_search", "builtin", query='who said "hello"')],
    ),
    (
        '{"type": "function", "name": "trending_songs", "parameters": {"n": "10", "genre": "all"}}',
        "",
        [call("trending_songs", n="10", genre="all")],
    ),
    ('{"name": "f", "arguments": {"n": 1}}', "", [call("f", n=1)]),
    ('{"name": "f", "parameters": {"n": 1}} Done.', "Done.", [call("f", n=1)]),
    ('<function=trending_songs>{"n": 10}</function>', "", [call("trending_songs", "function", n=10)]),
    ('<function=f>{"a": {"b": 1}, "c": 2}</function>', "", [call("f", "function", a={"b": 1}, c=2)]),
    ('<function=say>{"text": "it\'s ok"}</function>', "", [call("say", "function", text="it's ok")]),
    (
        WEATHER,
        "",
        [
            call("get_weather", "pythonic", city="San Francisco", metric="celsius"),
            call("get_weather", "pythonic", city="Seattle", metric="celsius"),
        ],
    ),
    (
        '{"name": "f", "parameters": {"n": 1}}; {"name": "g", "parameters": {}}',
        "",
        [call("f", n=1), call("g")],
    ),
    (ALICE, ALICE, []),
]

MORE = [
    ("[f()] and that is all.", "and that is all.", [call("f", "pythonic")]),
    ("[f(a=[1, 2.5, -3e2], b={'k': None, \"l\": true}, c=False,)]\n", "", None),
    ("[a.b(from='x')]", "", [ToolCall(name="a.b", arguments={"from": "x"}, dialect="pythonic")]),
    ("[say(text='it\\'s \\x41\\u00e9\\U0001F999\\n')]", "", [call("say", "pythonic", text="it's Aé🦙\n")]),
    ("<function=f>{}</function><function=g>{}</function>", "", [call("f", "function"), call("g", "function")]),
    ("{'name': 'f', 'parameters': {'a': None, 'b': 'x'}}", "", [call("f", a=None, b="x")]),
    (f"Let me see. {PYTHON_TAG}[f(n=1)]", "Let me see. ", [call("f", "pythonic", n=1)]),
    (f"{PYTHON_TAG}<function=f>{{}}</function> ok", "ok", [call("f", "function")]),
    (f"{PYTHON_TAG}<function = 3", "", [code("<function = 3")]),
    (f"{PYTHON_TAG}[x for x in y]", "", [code("[x for x in y]")]),
    (f'{PYTHON_TAG}brave_search.call(query="a"); {{"name": "f", "parameters": {{}}}} b ', "b", None),
    (f" {PYTHON_TAG} {PYTHON_TAG}", " ", [code(" "), code("")]),
    (f"a {ALICE} <|python_ta {PYTHON_TAG[:5]}{PYTHON_TAG}1", f"a {ALICE} <|python_ta <|pyt", [code("1")]),
]

TEXT = [
    "",
    "  two spaces before, two after  ",
    "[1, 2, 3]",
    "[see below]",
    "[f]",
    "[]",
    "[f()](https://example.org)",
    "[f()], as said",
    "[f('positional')]",
    "[f(a=g())]",
    "[f(a=b)]",
    "[f(**{'a': 1})]",
    "[f(a=1, a=2)]",
    "[f(a=(1, 2))]",
    "[f(a=1), 2]",
    "[f(a='x]",
    "[f(a=1)",
    "[lambda: f()]",
    "[__import__('os').system('true')]",
    "[f(a=007)]",
    "[f(a={1: 2})]",
    "<function=f>[1]</function>",
    "<function=f>{}",
    "<function=>{}</function>",
    "<function=f g>{}</function>",
    "<b>bold</b>",
    "{}",
    '{"name": "f"}',
    '{"name": "f", "parameters": {}, "parameters": {}}',
    '{"name": "f", "parameters": {}, "arguments": {}}',
    '{"type": "object", "name": "f", "parameters": {}}',
    'Words first: {"name": "f", "parameters": {}}',
    "Words first: [f()]",
]
ALL = [text for text, *_ in ELEVEN + MORE] + TEXT


def joined(events):
    """The text, the calls, and after how much of the text each call stood."""
    text, calls = "", []
    for event in events:
        if isinstance(event, str):
            assert event
            text += event
        else:
            calls.append((len(text), event))
    return text, calls


def streamed(pieces, **options):
    stream = MessageStream(spelled=True, **options)
    return joined([event for piece in pieces for event in stream.feed(piece)] + stream.finish())


@pytest.mark.parametrize("text, content, calls", ELEVEN, ids=range(1, 12))
def test_the_eleven_strings_are_all_read_right(text, content, calls):
    assert read(text.split(PYTHON_TAG)) == (content, tuple(calls))


@pytest.mark.parametrize("text, content, calls", MORE)
def test_what_models_write_beside_the_letter_is_read(text, content, calls):
    found = read(text.split(PYTHON_TAG))
    assert found[0] == content and found[1]
    assert calls is None or found[1] == tuple(calls)


@pytest.mark.parametrize("text", TEXT)
def test_what_merely_looks_like_a_call_stays_text(text):
    assert read([text]) == (text, ())


@pytest.mark.parametrize("text", ALL)
def test_a_text_cut_anywhere_is_read_as_the_whole(text):
    whole = streamed([text])
    content, calls = read(text.split(PYTHON_TAG))
    assert (whole[0], tuple(c for _, c in whole[1])) == (content, calls)
    assert streamed(text) == whole  # character by character
    for at in range(len(text) + 1):
        assert streamed([text[:at], text[at:]]) == whole


@given(st.lists(st.sampled_from([*ALL, PYTHON_TAG, "; ", " ", "<", "{"]), max_size=4).map("".join), st.randoms())
def test_a_text_cut_into_many_pieces_is_read_as_the_whole(text, chance):
    cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randrange(12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    for names in (None, {"f"}, frozenset()):
        assert streamed(pieces, names=names) == streamed([text], names=names)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("It is 3 < 4", "It is 3 < 4"),
        ('{"name": "Alice", "a', ""),
        ('{"name": "Alice", "ag', '{"name": "Alice", "ag'),
        ('{"n', ""),
        ('{"no', '{"no'),
        ("{x", "{x"),
        ('{"name": 3', '{"name": 3'),
        ('{"name": "f", "parameters": {"a": nux', '{"name": "f", "parameters": {"a": nux'),
        ('{"name": "f", "parameters": {"a": nu', ""),
        ("[see ", "[see "),
        ("[1,", "[1,"),
        ("[f(", ""),
        ("[f('", "[f('"),
        ("[f()]", ""),
        ("[f()](", "[f()]("),
        ("<fun", ""),
        ("<funny", "<funny"),
        ("<function=f> x", "<function=f> x"),
        ("a <|python", "a "),
        ("a <|pythons", "a <|pythons"),
        ('{"name": "f", "parameters": {}}', ""),
        ('{"name": "f", "parameters": {}} So', "So"),
        (f"{PYTHON_TAG}print(1)", ""),
    ],
)
def test_text_is_kept_back_only_while_it_may_become_a_call(text, shown):
    stream = MessageStream(spelled=True)
    assert joined(stream.feed(text))[0] == shown


def test_a_call_is_given_as_soon_as_it_is_complete():
    stream = MessageStream()
    assert stream.feed('{"name": "f", "parameters": {}') == []
    assert stream.feed("}") == [call("f")]
    assert stream.feed("; <function=g>{}</function") == []
    assert stream.feed(">") == [call("g", "function")]
    assert stream.tag() == []
    assert stream.feed('photogen.call(query="x"') == []
    assert stream.feed(")") == [call("photogen", "builtin", query="x")]
    assert stream.finish() == []


def test_the_tag_is_told_apart_from_its_name():
    stream = MessageStream()
    assert joined([*stream.feed(f"a{PYTHON_TAG}b"), *stream.tag(), *stream.feed("c"), *stream.finish()]) == (
        f"a{PYTHON_TAG}b",
        [(len(PYTHON_TAG) + 2, code("c"))],
    )


@pytest.mark.parametrize("text", ['{"name": "f", "parameters": {}}', "<function=f>{}</function>", "[f()]"])
def test_a_function_that_is_not_on_offer_is_text(text):
    assert streamed([text], names={"f"})[1]
    assert streamed([text], names={"g"}) == (text, [])
    stream = MessageStream(names=frozenset())
    assert stream.feed(text[:1]) == [text[:1]]


def nested(depth):
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize("dialect", ["json", "function", "pythonic", "builtin"])
def test_arguments_may_be_as_deep_as_is_said_and_no_deeper(dialect):
    name = "brave_search" if dialect == "builtin" else "f"
    deep = ToolCall(name=name, arguments=nested(DEEPEST), dialect=dialect)
    assert read([""] * (dialect == "builtin") + [write_call(deep)]) == ("", (deep,))
    with pytest.raises(PunaError, match="brackets within brackets"):
        write_call(ToolCall(name=name, arguments=nested(DEEPEST + 1), dialect=dialect))


HOSTILE = [
    "{" * 200_000,
    '{"name": "f", "parameters": ' + '{"a":' * 200_000,
    "[f(a=" + "[" * 200_000,
    "[f(a=" + "9" * 200_000,
    "<function=" + "f" * 200_000,
    '{"name": "' + "f" * 200_000,
    '{"name": "f", "parameters": {"a": "' + "\\" * 200_000,
    "[f(" + "a=1," * 50_000,
    " " * 200_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_text_is_read_in_linear_time_and_stays_text(text):
    start = time.process_time()
    assert read([text]) == (text, ())
    assert time.process_time() - start < 10


def test_a_call_longer_than_the_limit_is_text():
    text = '{"name": "f", "parameters": {"a": "%s"}}' % ("x" * (1 << 20))
    assert read([text]) == (text, ())


names = st.text(min_size=1, max_size=12)
identifiers = st.from_regex(r"[^\W\d]\w{0,8}", fullmatch=True).filter(str.isidentifier)
texts = st.text(max_size=20) | st.sampled_from(
    ["it's", 'say "hi"', "'\"\\", "</function>", '"}}', ")]", "\\n", "\n\t", PYTHON_TAG, "größer 🦙 ⁠", "\x00\x7f\x85"]
)
numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def generated(dialect):
    tables = st.dictionaries(texts, values, max_size=3)
    keywords = st.dictionaries(identifiers, values, max_size=3)
    dotted = st.lists(identifiers, min_size=1, max_size=2).map(".".join)
    made = {
        "json": (names, tables),
        "function": (st.from_regex(r"[^<>\s]{1,12}", fullmatch=True), tables),
        "pythonic": (dotted, keywords),
        "builtin": (st.sampled_from(BUILTIN_TOOLS), keywords),
        "python": (
            st.just(CODE_INTERPRETER),
            st.fixed_dictionaries({"code": texts.filter(lambda t: read(["", t])[1] == (code(t),))}),
        ),
    }
    name, arguments = made[dialect]
    return st.builds(ToolCall, name=name, arguments=arguments, dialect=st.just(dialect))


@pytest.mark.parametrize("dialect", ["json", "function", "pythonic", "builtin", "python"])
def test_generated_calls_come_back_whole_and_streamed(dialect):
    seen = 0

    @settings(max_examples=150, deadline=None)
    @given(st.lists(generated(dialect), min_size=1, max_size=3), st.integers(0, 2**32))
    def check(calls, seed):
        nonlocal seen
        seen += len(calls)
        segments = [text for text, _ in write_calls(calls)]
        tagged = dialect in ("builtin", "python")
        assert read([""] * tagged + segments) == ("", tuple(calls))
        stream, chance, events = MessageStream(), random.Random(seed), []
        for number, segment in enumerate(segments):
            if number or tagged:
                events += stream.tag()
            cuts = sorted(chance.choices(range(len(segment) + 1), k=3))
            for a, b in zip([0, *cuts], [*cuts, len(segment)]):
                events += stream.feed(segment[a:b])
        assert events + stream.finish() == calls

    check()
    assert seen >= 200


@given(
    st.dictionaries(
        st.sampled_from(["name", "type", "parameters", "arguments", "age"]),
        st.sampled_from(["f", "function", 3, None]) | st.dictionaries(texts, values, max_size=2),
        max_size=4,
    ),
    st.sampled_from([None, 1]),
)
def test_json_is_a_call_exactly_where_it_has_a_calls_fields(value, indent):
    text = json.dumps(value, indent=indent)
    rest = {k: v for k, v in value.items() if k not in ("name", "type")}
    arguments = next(iter(rest.values()), None)
    is_call = (
        isinstance(value.get("name"), str)
        and value.get("type", "function") == "function"
        and len(rest) == 1
        and rest.keys() <= {"parameters", "arguments"}
        and isinstance(arguments, dict)
    )
    expected = ("", (ToolCall(name=value["name"], arguments=arguments),)) if is_call else (text, ())
    assert read([text]) == expected


@pytest.mark.parametrize(
    "refused, problem",
    [
        (call("a b", "function"), "<function=NAME>"),
        (call("a>b", "function"), "<function=NAME>"),
        (call("", "function"), "<function=NAME>"),
        (call("get-weather", "pythonic"), "Python's notation"),
        (call("f.", "pythonic"), "Python's notation"),
        (ToolCall(name="f", arguments={"a b": 1}, dialect="pythonic"), "name=value"),
        (ToolCall(name="brave_search", arguments={"a b": 1}, dialect="builtin"), "name=value"),
        (call("f", "builtin"), "built-in"),
        (call(CODE_INTERPRETER, "python", code=3), "Python source"),
        (call("f", a={1: 2}), "the key 1"),
        (call("f", a={1, 2}), "no value of JSON"),
        (call("f", a=10**1000), "digits"),
        (call("f" * 257), "257 characters"),
        (call("f", "yaml"), "'yaml' is not a dialect"),
    ],
)
def test_a_call_that_its_dialect_cannot_express_is_refused(refused, problem):
    with pytest.raises(PunaError, match=problem) as error:
        write_call(refused)
    assert error.value.hint
