"""An assistant's message read as it is written: its text at once, its calls when they are complete.

The body of a message is a row of segments with `<|python_tag|>` between each two:

    segment 0      {json}; {json}  or  <function=f>{…}</function>  or  [f(a='x'), g()]  at its very start, then text;
                   or text alone
    each other     the same, or brave_search.call(…), or else source for the code interpreter

Every character is decided as early as it can be. What may still become a call is kept back; the character that shows
that it cannot releases all of it as text: `{"name": "Alice", "ag` is no call, since no call has such a key, nor is
`[see` followed by a space. So a stream never shows a piece of a call, and never waits on text. Reading a whole message
is feeding it in one piece, so that the two cannot differ.

Models are not exact, so more is read than is written: other spacing, `"type": "function"`, `arguments` for
`parameters`, either language's quotes and words, several calls in a row, words after a call. What merely looks like a
call stays text: an answer such as `{"name": "Alice", "age": 3}`, a list such as `[1, 2]`, a link such as `[f()](url)`.
Only source for the interpreter has no end but the segment's.
"""

from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

from puna.chat import ToolCall
from puna.tokenizer.calls import BUILTIN_TOOLS, CODE_INTERPRETER, LONGEST_NAME, PYTHON_TAG, is_dotted_name
from puna.tokenizer.literals import Grammar, Literals, Mismatch

Event = str | ToolCall  # some more of the text, or a call

_KEYS = ("name", "type", "parameters", "arguments")  # of a JSON call


class MessageStream:
    """Feed it the body of a message, piece by piece; it gives back text and calls, in order.

    `names` are the functions on offer: calls of others, built-in tools and the interpreter apart, are text. None takes
    any. With `spelled`, `<|python_tag|>` in the text is the tag, wherever the pieces cut it; without, only `tag()` is.
    """

    def __init__(self, *, names: Collection[str] | None = None, spelled: bool = False):
        self._names, self._spelled = names, spelled
        self._partial = ""  # what may be the beginning of a spelled tag
        self._start(tagged=False)

    def feed(self, text: str) -> list[Event]:
        """What `text` makes certain."""
        events: list[Event] = []
        if self._spelled:
            *ended, text = (self._partial + text).split(PYTHON_TAG)
            for segment in ended:
                events += self._segment.feed(segment) + self._next()
            beginnings = (n for n in range(len(PYTHON_TAG) - 1, 0, -1) if text.endswith(PYTHON_TAG[:n]))
            cut = len(text) - next(beginnings, 0)
            text, self._partial = text[:cut], text[cut:]
        return events + self._segment.feed(text)

    def tag(self) -> list[Event]:
        """The model drew `<|python_tag|>`."""
        events = self._flush()
        return events + self._next()

    def finish(self) -> list[Event]:
        """The message is over. Nothing may be fed after."""
        events = self._flush()
        return events + self._segment.end()

    def _flush(self) -> list[Event]:
        partial, self._partial = self._partial, ""
        return self._segment.feed(partial)

    def _next(self) -> list[Event]:
        events = self._segment.end()
        self._start(tagged=True)
        return events

    def _start(self, *, tagged: bool) -> None:
        self._segment = _Segment(self._names, tagged=tagged)


def read(segments: Iterable[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """The content and the calls of a message from the texts of its segments."""
    stream = MessageStream()
    events: list[Event] = []
    for number, segment in enumerate(segments):
        if number:
            events += stream.tag()
        events += stream.feed(segment)
    events += stream.finish()
    content = "".join(event for event in events if isinstance(event, str))
    return content, tuple(event for event in events if isinstance(event, ToolCall))


class _Segment(Literals):
    """The grammar of one segment: calls, and what is not one."""

    def __init__(self, names: Collection[str] | None, *, tagged: bool):
        super().__init__()
        self._names, self._tagged = names, tagged
        self._events: list[Event] = []
        self._plain = False  # all that comes is text, as it stands
        self._grammar = self._body()
        next(self._grammar)

    def feed(self, text: str) -> list[Event]:
        """What `text`, more of the segment, makes certain."""
        for at, char in enumerate(text):
            if self._plain:
                self._say(text[at:])
                break
            self._grammar.send(char)
        return self._taken()

    def end(self) -> list[Event]:
        """What its end makes certain."""
        if not self._plain:
            with suppress(StopIteration):
                self._grammar.send("")
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _say(self, text: str) -> None:
        if self._events and isinstance(self._events[-1], str):
            self._events[-1] += text
        elif text:
            self._events.append(text)

    def _body(self) -> Grammar[None]:
        found = False
        while True:
            try:
                yield from self._before(found)
                calls = yield from self._calls(builtin=self._tagged and not found)
            except Mismatch:
                break
            self._events += calls
            found = True
            self.clear()
        if found:
            yield from self._trimmed_text()
        elif self._tagged:
            yield from self._source()
        else:
            self._say("".join(self.held) + (self.ahead or ""))
            self._plain = True
            yield

    def _before(self, found: bool) -> Grammar[None]:
        yield from self.spaces()
        if found and (yield from self.peek()) in (";", ","):
            yield from self.take()
            yield from self.spaces()

    def _trimmed_text(self) -> Grammar[None]:
        """Text beside calls: the white space around it goes."""
        held, gap, said = deque(self.held), "", False
        while char := (held.popleft() if held else (yield from self.skip())):
            if not char.isspace():
                self._say(gap + char)
                gap, said = "", True
            elif said:
                gap += char

    def _source(self) -> Grammar[None]:
        """Whatever follows the tag and is no other call is a program."""
        source = list(self.held)
        while char := (yield from self.skip()):
            source.append(char)
        code = {"code": "".join(source)}
        self._events.append(ToolCall(name=CODE_INTERPRETER, arguments=code, dialect="python"))

    def _calls(self, *, builtin: bool) -> Grammar[tuple[ToolCall, ...]]:
        char = yield from self.peek()
        if self._names is None or self._names:
            if char == "{":
                return ((yield from self._json()),)
            if char == "<":
                return ((yield from self._function()),)
            if char == "[":
                return (yield from self._pythonic())
        if not builtin:
            raise Mismatch
        return ((yield from self._builtin()),)

    def _json(self) -> Grammar[ToolCall]:
        fields: dict[str, Any] = {}

        def field() -> Grammar[None]:
            spelled = yield from self.one_of(*(f"{quote}{key}{quote}" for quote in "\"'" for key in _KEYS))
            key = spelled[1:-1].replace("parameters", "arguments")
            if key in fields:
                raise Mismatch
            yield from self.spaces()
            yield from self.expect(":")
            yield from self.spaces()
            if key == "arguments":
                fields[key] = yield from self.table()
            elif key == "name":
                fields[key] = yield from self.string(LONGEST_NAME)
                self._check_offered(fields[key])
            else:
                fields[key] = yield from self.one_of('"function"', "'function'")

        yield from self.expect("{")
        yield from self.items("}", field)
        if fields.keys() - {"type"} != {"name", "arguments"}:
            raise Mismatch
        return ToolCall(name=fields["name"], arguments=fields["arguments"])

    def _function(self) -> Grammar[ToolCall]:
        yield from self.one_of("<function=")
        name = ""
        while (char := (yield from self.peek())) != ">":
            if not char or char.isspace() or char == "<" or len(name) == LONGEST_NAME:
                raise Mismatch
            name += yield from self.take()
        if not name:
            raise Mismatch
        self._check_offered(name)
        yield from self.expect(">")
        yield from self.spaces()
        self.enter()  # in every dialect the arguments may be as deep
        arguments = yield from self.table()
        yield from self.spaces()
        yield from self.one_of("</function>")
        return ToolCall(name=name, arguments=arguments, dialect="function")

    def _pythonic(self) -> Grammar[tuple[ToolCall, ...]]:
        yield from self.expect("[")
        calls = yield from self.items("]", self._python_call)
        after = yield from self.peek()  # [f()](url) is a link
        if not calls or (after and not after.isspace()):
            raise Mismatch
        return tuple(calls)

    def _python_call(self) -> Grammar[ToolCall]:
        name = yield from self._identifier(dots=True)
        self._check_offered(name)
        yield from self.expect("(")
        return ToolCall(name=name, arguments=(yield from self._keywords()), dialect="pythonic")

    def _builtin(self) -> Grammar[ToolCall]:
        head = yield from self.one_of(*(f"{tool}.call(" for tool in BUILTIN_TOOLS))
        self.enter()
        arguments = yield from self._keywords()
        return ToolCall(name=head.removesuffix(".call("), arguments=arguments, dialect="builtin")

    def _keywords(self) -> Grammar[dict[str, Any]]:
        """`name=value` and so on, up to the closing bracket."""
        pairs = yield from self.items(")", self._keyword)
        if len(dict(pairs)) < len(pairs):
            raise Mismatch
        return dict(pairs)

    def _keyword(self) -> Grammar[tuple[str, Any]]:
        name = yield from self._identifier(dots=False)
        yield from self.spaces()
        yield from self.expect("=")
        yield from self.spaces()
        return name, (yield from self.value())

    def _identifier(self, *, dots: bool) -> Grammar[str]:
        name = ""
        while (char := (yield from self.peek())) and (f"_{char}".isidentifier() or (dots and char == ".")):
            name += yield from self.take()
            if len(name) > LONGEST_NAME:
                raise Mismatch
        if not is_dotted_name(name):
            raise Mismatch
        return name

    def _check_offered(self, name: str) -> None:
        if self._names is not None and name not in self._names:
            raise Mismatch
