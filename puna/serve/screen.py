"""Text from a model on somebody's terminal: shown, never obeyed.

A terminal takes orders in its text: ESC sequences move the cursor, rename the window, even answer as if typed. So each
control character is replaced by its picture (U+2400 and up), the C1 set and the characters that reverse the direction
of writing by U+FFFD. Line ends and tabs stay.
"""

import os
from typing import TextIO

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_HARMLESS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys([*range(0x80, 0xA0), 0x2028, 0x2029, *_BIDI], "\ufffd"),
}


def harmless(text: str) -> str:
    """`text` without anything that a terminal would act upon."""
    return text.translate(_HARMLESS)


class Screen:
    """Where answers go (`out`), and notices: dimmed among the answers for a person, on `err` for a pipe."""

    def __init__(self, out: TextIO, err: TextIO):
        self.out, self.err = out, err
        self.interactive = out.isatty()
        self._dim = self.interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._column = 0  # 0 where a line begins

    def say(self, text: str) -> None:
        """A bit of the model's answer, at once."""
        self.out.write(harmless(text))
        self.out.flush()
        if text:
            self._column = 0 if text.endswith("\n") else 1

    def end_line(self) -> None:
        """Begin a new line unless one was just begun."""
        if self._column:
            self.say("\n")

    def notice(self, text: str) -> None:
        """A line of ours."""
        self.end_line()
        if not self.interactive:
            print(harmless(text), file=self.err, flush=True)
            return
        text = harmless(text)
        self.out.write(f"\x1b[2m{text}\x1b[0m\n" if self._dim else f"{text}\n")
        self.out.flush()
