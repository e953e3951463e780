"""Text that grows token by token, and may only be shown where it can no longer change.

Two things can still change: a token may end inside a UTF-8 character, whose rest comes with the next one; and the last
characters may turn out to be the beginning of a stop string, which is never shown. So a stream keeps back

    the bytes of an unfinished character, and
    the longest tail that is a beginning of a stop string.

Where several stop strings occur the one that is complete first ends the text, whatever the token boundaries were.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """Bytes in, showable text out. `text` is all that was shown; `stopped` says that a stop string was met.

    `errors` is the codec's way with bytes that are no UTF-8: the tokenizer's, so that the text is what it decodes.
    """

    def __init__(self, stops: Sequence[str] = (), errors: str = "replace"):
        self.stopped = False
        self._stops = [stop for stop in stops if stop]
        self._errors = errors
        self._decoder = self.decoder()
        self._shown: list[str] = []
        self._held = ""

    def decoder(self) -> codecs.IncrementalDecoder:
        """What turns such bytes into text, from their beginning."""
        return codecs.getincrementaldecoder("utf-8")(errors=self._errors)

    @property
    def text(self) -> str:
        return "".join(self._shown)

    @property
    def held(self) -> int:
        """Bytes that are kept back."""
        return len(self._held.encode()) + len(self._decoder.getstate()[0])

    def push(self, data: bytes) -> str:
        """Add a token's bytes; returns what can be shown now. Nothing is added after a stop string.

        A token without any (a control piece of SentencePiece) ends a character that was not finished.
        """
        return "" if self.stopped else self._show(self._decoder.decode(data, final=not data), last=False)

    def finish(self) -> str:
        """The text ends here: returns what was kept back. An unfinished character becomes U+FFFD."""
        return "" if self.stopped else self._show(self._decoder.decode(b"", final=True), last=True)

    def _show(self, new: str, *, last: bool) -> str:
        self._held += new
        end = self._stop_at()
        if end is None:
            end = len(self._held) if last else len(self._held) - self._beginning_of_a_stop()
        else:
            self.stopped = True
        shown, self._held = self._held[:end], self._held[end:]
        if shown:
            self._shown.append(shown)
        return shown

    def _stop_at(self) -> int | None:
        """Where the stop string that is complete first begins. One can only begin in what is held."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _beginning_of_a_stop(self) -> int:
        """The length of the longest tail of what is held that is a beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
