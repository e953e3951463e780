r"""Values read one character at a time: JSON's, and Python's literals that say the same.

A grammar here is a generator. It asks for a character with `yield`, is sent one, and is sent "" where the text ends:

    def pair(self):                              x = Literals(); g = x.value(); next(g)
        key = yield from self.string()           g.send('{') ... g.send('"') ... g.send('}')
        yield from self.expect(":")                                              raises StopIteration(the value)
        return key, (yield from self.value())

So the same few lines read a whole text and one that is still being written, and they stop at the very character after
which the text can be no value any more (`Mismatch`). `held` are the characters taken since it was last cleared: with
the one looked at but not taken (`ahead`) they are the text that has to be given back after a mismatch.

Nothing is evaluated. Accepted is what models write: strings in either quotes with the escapes of both languages and
with bare line ends, `true` and `True`, `null` and `None`, a comma after the last item. Depth and length are
bounded, since whoever writes the text may be hostile.
"""

import re
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
Grammar = Generator[None, str, T]

DEEPEST = 64  # brackets within brackets, of the arguments of a call; around them stands one more
LONGEST = 1 << 20  # characters of a call
LONGEST_NUMBER = 1000  # digits; Python itself refuses to read many more
WORDS: dict[str, Any] = {
    "true": True,
    "false": False,
    "null": None,
    "True": True,
    "False": False,
    "None": None,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_NUMBER_BEGUN = re.compile(r"-?(?:0|[1-9][0-9]*)?(?:(?<=[0-9])\.[0-9]*)?(?:(?<=[0-9])[eE][-+]?[0-9]*)?")
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:u([dD][89abAB]{_HEX}{{2}})\\u([dD][c-fC-F]{_HEX}{{2}})"  # two halves of a character beyond U+FFFF
    rf"|u({_HEX}{{4}})|U({_HEX}{{8}})|x({_HEX}{{2}})|([0-7]{{1,3}})|(.))",
    re.DOTALL,
)
_SHORT = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": "", "/": "/"}
_SHORT |= {c: c for c in "\\\"'"}


class Mismatch(Exception):
    """The text is not, and cannot become, what the grammar reads."""


def unescape(text: str) -> str:
    """`text`, the inside of a string literal, with its escapes resolved; an escape that is none stays as it stands.

    Raises `ValueError` for a character beyond Unicode.
    """

    def resolved(match: re.Match[str]) -> str:
        high, low, *codes, octal, letter = match.groups()
        if letter is not None:
            return _SHORT.get(letter, match[0])
        if high:
            return chr(0x10000 + (int(high, 16) - 0xD800) * 0x400 + int(low, 16) - 0xDC00)
        return chr(int(octal, 8)) if octal else chr(int(next(filter(None, codes)), 16))

    return _ESCAPE.sub(resolved, text) if "\\" in text else text


class Literals:
    """The grammar of values, over characters that come one by one."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.ahead: str | None = None
        self._depth = 0

    def clear(self) -> None:
        """Forget what was taken."""
        self.held.clear()
        self._depth = 0

    def enter(self) -> None:
        """Count what comes as one bracket deeper."""
        self._depth += 1

    def peek(self) -> Grammar[str]:
        """The next character, left where it is; "" at the end."""
        if self.ahead is None:
            self.ahead = yield
        return self.ahead

    def skip(self) -> Grammar[str]:
        """The next character, which is not held; "" at the end."""
        char = yield from self.peek()
        if char:
            self.ahead = None
        return char

    def take(self) -> Grammar[str]:
        """The next character, held."""
        char = yield from self.peek()
        if not char or len(self.held) >= LONGEST:
            raise Mismatch
        self.ahead = None
        self.held.append(char)
        return char

    def expect(self, char: str) -> Grammar[None]:
        """Take `char`; anything else is left where it is."""
        if (yield from self.peek()) != char:
            raise Mismatch
        yield from self.take()

    def spaces(self) -> Grammar[None]:
        """Take white space, if any."""
        while (yield from self.peek()).isspace():
            yield from self.take()

    def one_of(self, *spellings: str) -> Grammar[str]:
        """Take whichever of `spellings` stands here; none may begin another."""
        read = ""
        while read not in spellings:
            char = yield from self.peek()
            if not char or not any(spelling.startswith(read + char) for spelling in spellings):
                raise Mismatch
            read += yield from self.take()
        return read

    def items(self, close: str, item: Callable[[], Grammar[T]]) -> Grammar[list[T]]:
        """Items with commas between them, up to and with the bracket `close`; the opening one was taken."""
        if self._depth > DEEPEST:
            raise Mismatch
        self.enter()
        found: list[T] = []
        while True:
            yield from self.spaces()
            if (yield from self.peek()) == close:
                break
            found.append((yield from item()))
            yield from self.spaces()
            if (yield from self.peek()) != close:
                yield from self.expect(",")
        yield from self.take()
        self._depth -= 1
        return found

    def value(self) -> Grammar[Any]:
        """A string, a number, a word, a list or a table with strings as keys."""
        char = yield from self.peek()
        if char in ('"', "'"):
            return (yield from self.string())
        if char == "{":
            return (yield from self.table())
        if char == "[":
            yield from self.take()
            return (yield from self.items("]", self.value))
        return (yield from self._word())

    def string(self, longest: int = LONGEST) -> Grammar[str]:
        """A string in single or double quotes, at most `longest` characters as written."""
        quote = yield from self.peek()
        if quote not in ('"', "'"):
            raise Mismatch
        yield from self.take()
        start = len(self.held)
        while (char := (yield from self.take())) != quote:
            if char == "\\":
                yield from self.take()
            if len(self.held) - start > longest:
                raise Mismatch
        try:
            return unescape("".join(self.held[start:-1]))
        except ValueError:
            raise Mismatch from None

    def table(self) -> Grammar[dict[str, Any]]:
        """A JSON object or a Python dict with strings as keys; of a key that comes twice, the last counts."""
        yield from self.expect("{")
        return dict((yield from self.items("}", self._pair)))

    def _pair(self) -> Grammar[tuple[str, Any]]:
        key = yield from self.string()
        yield from self.spaces()
        yield from self.expect(":")
        yield from self.spaces()
        return key, (yield from self.value())

    def _word(self) -> Grammar[Any]:
        word = ""
        while (char := (yield from self.peek())) and (char in "+-." or (char.isascii() and char.isalnum())):
            word += char
            begun = _NUMBER_BEGUN.fullmatch(word) or any(known.startswith(word) for known in WORDS)
            if not begun or len(word) > LONGEST_NUMBER:
                raise Mismatch
            yield from self.take()
        if word in WORDS:
            return WORDS[word]
        number = _NUMBER.fullmatch(word)
        if not number:
            raise Mismatch
        return float(word) if number[1] or number[2] else int(word)
