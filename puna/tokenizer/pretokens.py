r"""Where text may be cut before byte pairs are merged.

Byte-pair merging never crosses a pre-token: a word with the space before it, up to three digits, a run of signs, a run
of whitespace. `PATTERN` is Llama 3's; the alternatives are tried in this order at each position:

    (?i:'s|'t|'re|'ve|'m|'ll|'d)       an English contraction
    [^\r\n\p{L}\p{N}]?\p{L}+           letters, with one sign or space before them
    \p{N}{1,3}                         digits, at most three
     ?[^\s\p{L}\p{N}]+[\r\n]*          signs, with one space before and the line ends after them
    \s*[\r\n]+                         whitespace up to the last line end of a run
    \s+(?!\S)                          whitespace, less its last character if a word follows
    \s+                                whitespace

The regular-expression engine keeps one entry of a bounded stack for each character of a whitespace run and fails at
about a million, so a long text goes to it in pieces. A piece ends at a *safe cut*: a place where a pre-token ends
whatever stands around it, so that the ids are those of the whole text. Such places are

    before a space or tab that follows a non-space      before signs or a line end that follow a letter
    after a line end, before a non-space                before a digit that follows an ASCII letter or sign

Only a run of `PIECE` characters without any of them (a megabyte of nothing but spaces, or of letters) is cut anyway.
"""

import re
from collections.abc import Iterator

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECE = 399_999  # characters; a multiple of three, so that a cut run of digits keeps its groups of three

_SIGNS = r"!-/:-@\[-`{-~"  # ASCII
# Python's classes differ from the engine's at the edges (its \s also has the separators U+001C to U+001F, its letters
# are those of an older Unicode), so each rule uses only the side on which the difference is harmless.
_SAFE_CUT = re.compile(
    r"(?<=\S)(?=[ \t])"
    r"|(?<=[\r\n])(?=\S)"
    rf"|(?<=[^\W\d_])(?=[\r\n{_SIGNS}、。，；：！？])"
    rf"|(?<=[A-Za-z{_SIGNS}])(?=[0-9])"
)
_TAIL = 1000  # characters searched first: nearly every piece of real text ends there


def pieces(text: str, limit: int = PIECE) -> Iterator[str]:
    """`text` in order, in pieces of at most `limit` characters, ended at safe cuts wherever there are any."""
    start = 0
    while len(text) - start > limit:
        end = _last_safe_cut(text, start, start + limit) or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _last_safe_cut(text: str, start: int, stop: int) -> int | None:
    """The last safe cut in (start, stop], or None."""
    for begin in (max(start, stop - _TAIL), start):
        cuts = [m.start() for m in _SAFE_CUT.finditer(text, begin, stop + 1) if start < m.start() <= stop]
        if cuts:
            return cuts[-1]
    return None
