"""Text to token ids and back as Llama 1 and 2 do it: SentencePiece's byte-pair encoding with byte fallback.

The vocabulary is a list of *pieces*, each a text with a score and a kind:

    0      <unk>             UNKNOWN        what no piece stands for, where there is no byte fallback
    1, 2   <s>, </s>         CONTROL        begin and end of a text: placed by id, never found in text
    3 ...  <0x00> ... <0xFF> BYTE           the bytes of a character that has no piece
    259 .. ▁▁, er, ▁the, ...  NORMAL         found by merging; the score of the n-th merge is -n
           [TOOL]            USER_DEFINED   never cut: found in the text before anything is merged

Encoding has no pre-tokens and no regular expression:

    "the llama"  ->  "▁the▁llama"  ->  ▁ t h e ▁ l l a m a  ->  ▁the ▁ll ama

A space becomes U+2581, and one more stands before the text. Then, among all neighbours whose concatenation is a piece,
the pair of the highest score is joined, the leftmost among equals, until no such pair is left. What remains and is no
piece becomes its UTF-8 bytes. Decoding turns U+2581 back into spaces and drops the one that was added.

Where no piece has a U+2581 after another character (Llama's have none), no join crosses from one word to the next, so
that words can be encoded one by one and remembered. A word of any length is merged in n log n (`merging.py`). From the first
long text on, a C++ kernel does the same with a table of all pairs, where it was built (`puna/kernels/pieces.py`).

A Hugging Face `tokenizer.json` of the same vocabulary lists the joins as pairs in order, in place of scores; a tokenizer
that was read from one is given these `merges` and follows them. Where a character is cut in half, each byte that is none
decodes to U+FFFD, as in the SentencePiece library.
"""

import codecs
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Literal, NamedTuple

from puna.artifacts import write_atomic
from puna.errors import ArtifactError, PunaError, shown
from puna.kernels import pieces as kernels
from puna.kernels.pieces import Merger
from puna.tokenizer.bpe import as_unicode, outside, read_bounded
from puna.tokenizer.merging import merge
from puna.tokenizer.protobuf import Wire, WireError, read_message, write_field

SPACE = "\u2581"
MOST_PIECES = 1 << 19
MOST_USER_DEFINED = 10_000
_REMEMBERED_WORDS = 1 << 16
_LONG = 2_000  # characters of a text for which the table of pairs is made: a tenth of a second
_REMEMBERED_LENGTH = 40  # characters; longer words rarely come again
_EACH_BYTE = "puna-each-byte"
codecs.register_error(_EACH_BYTE, lambda error: ("\ufffd", error.start + 1))
_HINT = "give the tokenizer.model of a Llama 1 or 2, or of a model trained from one; if it is one, fetch it again"


class Kind(IntEnum):
    """What a piece is, in SentencePiece's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5  # never encoded: fills a vocabulary up to the size of a model's output
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: Kind


class SentencePieceTokenizer:
    """Ids of a SentencePiece vocabulary; the interface is that of `puna.tokenizer.Tokenizer`.

    `pieces` in the order of their ids; with `merges`, joins follow that list instead of the scores. `prefix` says when a
    space is put before a text: "always", "unless_space" (where it does not begin with one) or "never"; `strip` whether
    decoding drops one. `bos` and `eos` name the pieces that begin and end a text, `unknown_text` is what an unknown
    token decodes to, `where` the vocabulary in messages.

    `bos`, `eos`, `unk` and `pad` (eos, where there is no `<pad>`) are ids; `stop_ids` end generation. Raises
    `ArtifactError` for a vocabulary that contradicts itself.
    """

    errors = _EACH_BYTE  # the codec's way with bytes that are no UTF-8

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        merges: Sequence[tuple[str, str]] | None = None,
        prefix: Literal["always", "unless_space", "never"] = "always",
        strip: bool = True,
        bos: str = "<s>",
        eos: str = "</s>",
        unknown_text: str = " \u2047 ",
        where: str = "the vocabulary",
    ):
        self.pieces = tuple(pieces)
        self._prefix, self._strip, self._unknown_text = prefix, strip, unknown_text
        self._has_scores = merges is None
        found = _sorted_out(self.pieces, where)
        self._specials, self._bytes = found.specials, found.bytes
        self.unk = found.unknown
        for name, role in ((bos, "begins"), (eos, "ends")):
            if name not in self._specials:
                raise ArtifactError(f"{where} has no control piece {name!r}, which {role} a text", hint=_HINT)
        self.bos, self.eos = self._specials[bos], self._specials[eos]
        self.pad = self._specials.get("<pad>", self.eos)
        self.stop_ids = frozenset({self.eos})
        self._text_ids = found.text_ids
        self._whole = _longest_first(found.user_defined)
        self._byte_of = {id: byte for byte, id in enumerate(self._bytes)}
        self._rank_of = _by_score(self.pieces) if merges is None else _by_merges(merges, self.pieces, where)
        apart = _words_are_apart(self.pieces)
        self._words = re.compile(_WORD if apart else "(?s).+")
        self._remembered: dict[str, list[int]] = {}
        self._space = SPACE if apart else ""
        self._merges = merges
        self._merger: Merger | None = None  # made for the first text that is long enough

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        """The tokenizer in the SentencePiece file `path`. Raises `ArtifactError` if it is none that can be read."""
        return read_sentencepiece(path)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.pieces)

    @property
    def special_names(self) -> tuple[str, ...]:
        """The names of the control pieces and of the unknown piece, in the order of their ids."""
        return tuple(self._specials)

    def special(self, name: str) -> int:
        """The id of a control piece or of the unknown piece. Raises `PunaError` for a name that is none."""
        if name not in self._specials:
            near = difflib.get_close_matches(name, self._specials, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join([*self._specials][:8])}"
            raise PunaError(f"{name!r} is not a special token", hint=hint)
        return self._specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a control one, whatever the text says. No BOS is added.

        Half of a surrogate pair is encoded as U+FFFD, as in `Tokenizer`.
        """
        text = as_unicode(text).replace(" ", SPACE)
        if text and (self._prefix == "always" or (self._prefix == "unless_space" and text[0] != SPACE)):
            text = SPACE + text
        return self._encode(text)

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that goes on from another: no space is put before it."""
        return self._encode(as_unicode(text).replace(" ", SPACE))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._whole.split(text) if self._whole else [text]):
            if number % 2:  # what the pattern matched
                ids.append(self._text_ids[part])
                continue
            if self._merger is None and len(part) >= _LONG and kernels.available():
                self._merger = Merger(self._pairs(), self._text_ids, self._bytes, self.unk, self._space)
            if self._merger is not None:
                ids += self._merger.encode(part)
                continue
            for word in self._words.findall(part):
                ids += self._remembered.get(word) or self._encode_word(word)
        return ids if self._bytes else _joined_unknowns(ids, self.unk)

    def _pairs(self) -> dict[tuple[str, str], int]:
        """All pairs that may ever be joined, with their ranks: both halves are characters or themselves joined."""
        if self._merges is not None:
            return {pair: rank for rank, pair in enumerate(self._merges)}
        joined = {p.text for p in self.pieces if p.kind in (Kind.NORMAL, Kind.USER_DEFINED) and len(p.text) > 1}
        found = {}
        for text in joined:
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if (cut == 1 or left in joined) and (len(right) == 1 or right in joined):
                    found[left, right] = self._rank_of(left, right)
        return found

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """`encode` of each text, in order. The work is Python's, so `threads` do not help and are not made."""
        return [self.encode(text) for text in texts]

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for symbol in merge(list(word), self._rank_of):
            id = self._text_ids.get(symbol)
            if id is not None:
                ids.append(id)
            else:
                ids += [self._bytes[b] for b in symbol.encode()] if self._bytes else [self.unk]
        if len(word) <= _REMEMBERED_LENGTH:
            if len(self._remembered) >= _REMEMBERED_WORDS:
                self._remembered.clear()
            self._remembered[word] = ids
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, one after the other: those of a sequence are those of its parts, as streaming needs.

        So a first piece keeps its space, which `decode` drops. Control pieces have no bytes. Raises `PunaError` for an
        id outside the vocabulary.
        """
        return b"".join(self._spelled(id) for id in ids)

    def first_bytes(self, id: int) -> bytes:
        """The bytes of a token that begins a text: without the space that `encode` adds."""
        return self._spelled(id) if id in self._byte_of else self.decode([id]).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without the space that `encode` adds; each byte that is no UTF-8 becomes U+FFFD."""
        parts: list[str] = []
        may_strip = self._strip  # until a piece gave text, or its space was dropped
        for is_byte, run in itertools.groupby(ids, self._byte_of.__contains__):
            if is_byte:
                parts.append(bytes(map(self._byte_of.__getitem__, run)).decode("utf-8", _EACH_BYTE))
                may_strip = False
                continue
            for id in run:
                text = self._spelled(id).decode()
                drops = may_strip and id != self.unk and self.pieces[id].text.startswith(SPACE)
                may_strip = may_strip and self.pieces[id].kind == Kind.CONTROL
                parts.append(text[1:] if drops else text)
        return "".join(parts)

    def _spelled(self, id: int) -> bytes:
        if not 0 <= id < len(self.pieces):
            raise outside(id, len(self.pieces))
        text, _, kind = self.pieces[id]
        if kind == Kind.BYTE:
            return bytes([self._byte_of[id]])
        if kind == Kind.CONTROL:
            return b""
        return (self._unknown_text if kind == Kind.UNKNOWN else text.replace(SPACE, " ")).encode()


_WORD = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"


class _Sorted(NamedTuple):
    """Pieces by what they are for."""

    specials: dict[str, int]
    unknown: int
    bytes: list[int]  # the id of each byte; empty where there is no byte fallback
    user_defined: list[str]
    text_ids: dict[str, int]  # what text can become


def _sorted_out(pieces: Sequence[Piece], where: str) -> _Sorted:
    specials, bytes_found, text_ids, seen = {}, {}, {}, set()
    for id, (text, _, kind) in enumerate(pieces):
        if kind == Kind.UNUSED:
            continue
        if not text or text in seen or as_unicode(text) != text:
            fault = f"is {shown(text)}, which " + ("was there before" if text in seen else "is no text")
            raise ArtifactError(f"{where}: piece {id} {fault}", hint=_HINT)
        seen.add(text)
        if kind == Kind.BYTE:
            bytes_found[text] = id
        else:
            (specials if kind in (Kind.CONTROL, Kind.UNKNOWN) else text_ids)[text] = id
    names = [f"<0x{b:02X}>" for b in range(256)]
    wrong = next((n for n in bytes_found if n not in names), next((n for n in names if n not in bytes_found), None))
    if bytes_found and wrong:
        raise ArtifactError(
            f"{where}: of the byte pieces, {shown(wrong)} is missing or spelled otherwise",
            hint="there must be all of <0x00> to <0xFF>, or none",
        )
    unknown = [id for id, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN]
    if len(unknown) != 1:
        raise ArtifactError(f"{where} has {len(unknown)} unknown pieces; there must be one", hint=_HINT)
    user_defined = [text for text, _, kind in pieces if kind == Kind.USER_DEFINED]
    if len(user_defined) > MOST_USER_DEFINED:
        raise ArtifactError(
            f"{where} has {len(user_defined):,} user-defined pieces", hint=f"at most {MOST_USER_DEFINED:,} are read"
        )
    return _Sorted(specials, unknown[0], [bytes_found[n] for n in names] if bytes_found else [], user_defined, text_ids)


def _longest_first(texts: Sequence[str]) -> re.Pattern[str] | None:
    """What finds the longest of `texts` at each place; None if there are none."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if texts else None


def _by_score(pieces: Sequence[Piece]):
    """Rank of two neighbours: the place of their concatenation's score among all scores, the highest first."""
    mergeable = [piece for piece in pieces if piece.kind in (Kind.NORMAL, Kind.USER_DEFINED) and len(piece.text) > 1]
    order = {score: rank for rank, score in enumerate(sorted({p.score for p in mergeable}, reverse=True))}
    ranks = {text: order[score] for text, score, _ in mergeable}
    return lambda left, right: ranks.get(left + right)


def _by_merges(merges: Sequence[tuple[str, str]], pieces: Sequence[Piece], where: str):
    """Rank of two neighbours: the place of the pair in `merges`."""
    normal = {piece.text for piece in pieces if piece.kind == Kind.NORMAL}
    ranks: dict[tuple[str, str], int] = {}
    for rank, (left, right) in enumerate(merges):
        if (left, right) in ranks or not {left, right, left + right} <= normal:
            fault = "was given before" if (left, right) in ranks else "joins or gives what is no ordinary piece"
            raise ArtifactError(f"{where}: merge {rank} ({shown(left)} and {shown(right)}) {fault}", hint=_HINT)
        ranks[left, right] = rank
    return lambda left, right: ranks.get((left, right))


def _words_are_apart(pieces: Sequence[Piece]) -> bool:
    """Whether no piece that merging makes reaches from a word into the next."""
    crossing = re.compile(f"(?s)[^{SPACE}]{SPACE}")
    return not any(p.kind in (Kind.NORMAL, Kind.USER_DEFINED) and crossing.search(p.text) for p in pieces)


def _joined_unknowns(ids: list[int], unknown: int) -> list[int]:
    """`ids` with one unknown in place of several in a row."""
    return [id for id, before in zip(ids, [None, *ids]) if not id == unknown == before]


# The parts of SentencePiece's messages that matter here: field number -> name, wire type.
_MODEL = {
    1: ("pieces", Wire.BYTES),
    2: ("trainer", Wire.BYTES),
    3: ("normalizer", Wire.BYTES),
    5: ("denormalizer", Wire.BYTES),
}
_PIECE = {1: ("text", Wire.BYTES), 2: ("score", Wire.FOUR_BYTES), 3: ("kind", Wire.INTEGER)}
_TRAINER = {
    3: ("model_type", Wire.INTEGER),
    24: ("treat_whitespace_as_suffix", Wire.INTEGER),
    35: ("byte_fallback", Wire.INTEGER),
    44: ("unk_surface", Wire.BYTES),
    46: ("bos_piece", Wire.BYTES),
    47: ("eos_piece", Wire.BYTES),
}
_NORMALIZER = {
    2: ("precompiled_charsmap", Wire.BYTES),
    3: ("add_dummy_prefix", Wire.INTEGER),
    4: ("remove_extra_whitespaces", Wire.INTEGER),
    5: ("escape_whitespaces", Wire.INTEGER),
}
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def read_sentencepiece(path: Path, added: Mapping[str, int] | None = None) -> SentencePieceTokenizer:
    """The tokenizer in the SentencePiece file `path`; `added` are control pieces that follow the file's own: name -> id.

    Raises `ArtifactError` for a file that is absent, damaged, or of a kind that is not encoded here exactly: another
    model type than BPE, a normaliser that changes characters or spaces.
    """
    data = read_bounded(path)
    try:
        model = read_message(memoryview(data), _MODEL)
        trainer = read_message(memoryview(b"".join(model["trainer"])), _TRAINER)
        normalizer = read_message(memoryview(b"".join(model["normalizer"])), _NORMALIZER)
        denormalizer = read_message(memoryview(b"".join(model["denormalizer"])), _NORMALIZER)
        if not 0 < len(model["pieces"]) <= MOST_PIECES:
            raise WireError(f"it has {len(model['pieces']):,} pieces, where 1 to {MOST_PIECES:,} are read")
        pieces = [_piece(id, message) for id, message in enumerate(model["pieces"])]
        bos, eos = (_text(trainer[name], default) for name, default in (("bos_piece", "<s>"), ("eos_piece", "</s>")))
        unknown_text = _text(trainer["unk_surface"], " \u2047 ")
    except (WireError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not a SentencePiece model, or is damaged: {error}", hint=_HINT) from None
    fault = _unsupported(trainer, normalizer, denormalizer, pieces)
    if fault:
        raise ArtifactError(f"{path} {fault}", hint="only what Llama 1 and 2 use is encoded here exactly")
    prefix = "always" if _last(normalizer["add_dummy_prefix"], 1) else "never"
    return SentencePieceTokenizer(
        [*pieces, *_further(pieces, added or {}, path)],
        prefix=prefix,
        strip=prefix == "always",
        bos=bos,
        eos=eos,
        unknown_text=unknown_text,
        where=str(path),
    )


def write_sentencepiece(path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """Write `tokenizer` to `path`, so that `read_sentencepiece` and the library give its ids.

    Raises `ArtifactError` for one that the file cannot hold: with a list of merges in place of scores, with a rule about
    the first space that SentencePiece does not know, or with unused pieces before the last used one.
    """
    pieces = list(tokenizer.pieces)
    while pieces and pieces[-1].kind == Kind.UNUSED:  # what fills a GGUF file up to the model's size
        pieces.pop()
    plain = tokenizer._prefix == ("always" if tokenizer._strip else "never")
    if not (tokenizer._has_scores and plain) or any(piece.kind == Kind.UNUSED for piece in pieces):
        raise ArtifactError(
            f"{path} cannot hold this vocabulary: its merges, spaces or unused pieces have no place in SentencePiece's form",
            hint="keep the tokenizer.json that it comes from",
        )
    bos, eos, unknown = (tokenizer.pieces[id].text for id in (tokenizer.bos, tokenizer.eos, tokenizer.unk))
    has_bytes = any(piece.kind == Kind.BYTE for piece in pieces)
    trainer = {3: 2, 4: len(pieces), 35: int(has_bytes), 40: tokenizer.unk, 41: tokenizer.bos, 42: tokenizer.eos}
    trainer |= {44: tokenizer._unknown_text, 45: unknown, 46: bos, 47: eos}
    normalizer = {1: "identity", 3: int(tokenizer._prefix == "always"), 4: 0, 5: 1}
    data = [write_field(1, _message({1: text, 2: float(score), 3: int(kind)})) for text, score, kind in pieces]
    write_atomic(path, b"".join([*data, write_field(2, _message(trainer)), write_field(3, _message(normalizer))]))


def _message(fields: Mapping[int, int | float | str]) -> bytes:
    return b"".join(write_field(number, value) for number, value in fields.items())


def _further(pieces: Sequence[Piece], added: Mapping[str, int], path: Path) -> list[Piece]:
    """The pieces of `added` that come after `pieces`; it may repeat some of those under their ids."""
    further = sorted((id, name) for name, id in added.items() if not 0 <= id < len(pieces) or pieces[id].text != name)
    for place, (id, name) in enumerate(further, len(pieces)):
        if id != place:
            raise ArtifactError(
                f"{path} has {len(pieces):,} pieces; {shown(name)} was added as {shown(id)}, where {place} would follow",
                hint="are the files beside it another model's? give the path of the file alone to read it without them",
            )
    return [Piece(name, 0.0, Kind.CONTROL) for _, name in further]


def _piece(id: int, message: memoryview) -> Piece:
    try:
        fields = read_message(message, _PIECE)
        score, kind = _last(fields["score"], 0.0), _last(fields["kind"], Kind.NORMAL)
        if not math.isfinite(score) or kind not in Kind.__members__.values():
            raise WireError(f"its score is {score} and its kind {kind}")
        return Piece(_text(fields["text"], ""), score, Kind(kind))
    except (WireError, UnicodeDecodeError) as error:
        raise WireError(f"piece {id}: {error}") from None


def _last(values: list, default):
    return values[-1] if values else default


def _text(values: list[memoryview], default: str) -> str:
    return str(values[-1], "utf-8") if values else default


def _unsupported(trainer: dict, normalizer: dict, denormalizer: dict, pieces: Sequence[Piece]) -> str:
    """Why the model cannot be encoded exactly; empty if it can."""
    kind = _last(trainer["model_type"], 1)
    if kind != 2:
        return f"is of the model type {_MODEL_TYPES.get(kind, kind)!r}, not 'bpe'"
    if any(map(len, normalizer["precompiled_charsmap"] + denormalizer["precompiled_charsmap"])):
        return "has a normaliser that changes characters"
    if _last(normalizer["remove_extra_whitespaces"], 1):
        return "has a normaliser that removes spaces (remove_extra_whitespaces)"
    if not _last(normalizer["escape_whitespaces"], 1) or _last(trainer["treat_whitespace_as_suffix"], 0):
        return "does not mark spaces with U+2581 before a word (escape_whitespaces, treat_whitespace_as_suffix)"
    if any(piece.kind == Kind.UNUSED for piece in pieces):
        return "has pieces of the kind UNUSED"
    if bool(_last(trainer["byte_fallback"], 0)) != any(piece.kind == Kind.BYTE for piece in pieces):
        return "has byte pieces without byte_fallback, or byte_fallback without byte pieces"
    return ""
