"""Text to token ids and back: byte-level BPE with Llama 3.1's layout.

A vocabulary is a list of byte strings, the *ranks*: first the 256 single bytes, then merged strings in the order in
which training found them. To encode, text is split into pre-tokens (`pretokens.py`); in each, the adjacent pair whose
concatenation has the lowest rank is merged, again and again, until no pair is in the vocabulary. Every byte string can
be encoded, and decoding gives exactly the bytes back.

After the ranks stand 256 special tokens, which have names but no text:

    rank 0 ... R-1                    byte strings
    R + 0   <|begin_of_text|>         R + 6   <|start_header_id|>     R + 10  <|python_tag|>
    R + 1   <|end_of_text|>           R + 7   <|end_header_id|>       R + 11  <|image|>
    R + 4   <|finetune_right_pad_id|> R + 8   <|eom_id|>              the others: reserved, for
    R + 5   <|step_id|>               R + 9   <|eot_id|>              later use without a new vocabulary

`encode` knows no special token: the nine characters `<|eot_id|>` in a user's text become ordinary tokens, so that
nobody can end a turn or open a system message by typing. Specials are placed by id, in `dialog.py`.

On disk a tokenizer is a directory with `tokenizer.model`, one line per rank: the bytes in base64, a space, the rank.

Not every release spells the names so. Llama 3.0 has no `<|eom_id|>` and no `<|python_tag|>` yet, Hugging Face's files
call the places 5 and 11 reserved, and models trained on from a Llama have more names at the end. `names` are then those
of the file, and a token that is missing among them is the reserved one at its place.
"""

import base64
import binascii
import difflib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken

from puna import artifacts
from puna.errors import ArtifactError, PunaError
from puna.tokenizer.pretokens import PATTERN, pieces

SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 246)),
)
MODEL_FILE = "tokenizer.model"
MOST_FILE_BYTES = 64 << 20  # of a vocabulary; Llama 3's largest form has 17 million
MOST_TOKENS = 1 << 19
MOST_TOKEN_BYTES = 1024  # Llama 3's longest has 128; what a token can be split into grows with the square
MOST_SPECIALS = 10_000
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")


class Tokenizer:
    """Ids of a vocabulary with Llama 3.1's special tokens.

    `ranks` maps each byte string to its rank, 0 ... R-1 without gaps, and holds all single bytes; `names` are those of
    the special tokens, whose ids follow. `vocab_size` is R and the number of names, 256 in every Llama 3; the attributes
    `bos`, `eos` (end of text), `eot` (end of turn), `eom` (end of a message that waits for a tool), `pad`, `python_tag`,
    `start_header` and `end_header` are ids, `stop_ids` those that end generation. Raises `ArtifactError` for names that
    lack one of these, or that repeat; its message begins with `where`, the file that they are from.
    """

    def __init__(self, ranks: Mapping[bytes, int], names: Sequence[str] = SPECIALS, *, where: str = "the vocabulary"):
        self.ranks = dict(ranks)
        self._where = where
        if len(names) > MOST_SPECIALS:
            raise ArtifactError(
                f"{where}: there are {len(names):,} special tokens, {MOST_SPECIALS:,} at most", hint=_NAMES_HINT
            )
        self.special_names = tuple(names)  # in the order of their ids
        self._specials = {name: len(self.ranks) + i for i, name in enumerate(names)}
        if len(self._specials) != len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise ArtifactError(f"{where}: the special token {twice!r} is there twice", hint=_NAMES_HINT)
        self._encoding = tiktoken.Encoding(
            name="llama3", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self._specials
        )
        self.bos = self._placed("<|begin_of_text|>")
        self.eos = self._placed("<|end_of_text|>")
        self.eot = self._placed("<|eot_id|>")
        self.eom = self._placed("<|eom_id|>")
        self.pad = self._placed("<|finetune_right_pad_id|>")
        self.python_tag = self._placed("<|python_tag|>")
        self.start_header = self._placed("<|start_header_id|>")
        self.end_header = self._placed("<|end_header_id|>")
        self.stop_ids = frozenset({self.eos, self.eom, self.eot})

    def _placed(self, name: str) -> int:
        """The id of `name`; where the file knows no such name, of the reserved token at its place."""
        place = SPECIALS.index(name)
        there = self.special_names[place] if place < len(self.special_names) else None
        if name not in self._specials and not (there and _RESERVED.fullmatch(there)):
            found = f"{there!r} at its place" if there else f"only {len(self.special_names)} special tokens"
            raise ArtifactError(f"{self._where}: there is no {name!r}, and {found}", hint=_NAMES_HINT)
        return self._specials.get(name, len(self.ranks) + place)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer in the directory `path`. Raises `ArtifactError` if there is none or its file is damaged."""
        return cls(read_ranks(Path(path) / MODEL_FILE), where=str(Path(path) / MODEL_FILE))

    @property
    def vocab_size(self) -> int:
        """Number of ids: ranks and specials."""
        return len(self.ranks) + len(self.special_names)

    def special(self, name: str) -> int:
        """The id of a special token. Raises `PunaError` for a name that is none."""
        if name not in self._specials:
            near = difflib.get_close_matches(name, self.special_names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "the names are in Tokenizer.special_names"
            raise PunaError(f"{name!r} is not a special token", hint=hint)
        return self._specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special one, whatever the text says. No BOS is added.

        Half of a surrogate pair, which no UTF-8 text can hold, is encoded as U+FFFD; two that belong together as their
        character.
        """
        ids: list[int] = []
        for piece in pieces(as_unicode(text)):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """`encode` of each text, in order, on `threads` threads (the work is done outside Python's lock)."""
        if threads == 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; a special token gives its name. Raises `PunaError` for an id outside the vocabulary."""
        ids = list(ids)
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            raise outside(next(i for i in ids if not 0 <= i < self.vocab_size), self.vocab_size) from None

    errors = "replace"  # the codec's way with bytes that are no UTF-8

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that goes on from another: here, those of any text."""
        return self.encode(text)

    def first_bytes(self, id: int) -> bytes:
        """The bytes of a token that begins a text: here, those that it has anywhere."""
        return self.decode_bytes([id])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def as_unicode(text: str) -> str:
    """`text` as UTF-8 can hold it: half of a surrogate pair becomes U+FFFD, two that belong together their character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def outside(id: int, vocab_size: int) -> PunaError:
    """The error for a token id that no vocabulary of `vocab_size` has."""
    return PunaError(
        f"token id {id} is outside the vocabulary of {vocab_size}",
        hint="the ids come from another tokenizer, or from a model with more outputs than this one has tokens",
    )


_NAMES_HINT = "the special tokens must be Llama 3's: begin and end of text, headers, eot_id, and 256 places in all"
_DAMAGED = "it must hold one line per rank: the bytes in base64, a space, the rank; make or download it anew"


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks in the file `path`. Raises `ArtifactError` if it is absent, damaged, truncated, or has gaps."""
    if not os.path.lexists(path):
        raise ArtifactError(
            f"{path.parent} is not a tokenizer: it has no {MODEL_FILE}",
            hint="give the directory that train_tokenizer wrote, or a checkpoint's",
        )
    data = read_bounded(path)
    ranks = _as_written(data)
    if ranks is None:
        ranks = _line_by_line(path, data)
    absent = next((b for b in range(256) if bytes([b]) not in ranks), None)
    if absent is not None:
        raise ArtifactError(f"{path} has no rank for the byte 0x{absent:02x}", hint=_DAMAGED)
    return ranks


def _as_written(data: bytes) -> dict[bytes, int] | None:
    """The ranks of a file as `write_ranks` writes it, in about half the time; None for any other."""
    encoded = data.split()[::2]
    try:
        tokens = [binascii.a2b_base64(word, strict_mode=True) for word in encoded]
    except binascii.Error:
        return None
    ranks = dict(zip(tokens, range(len(tokens))))
    lengths = set(map(len, ranks))
    fine = len(ranks) == len(tokens) <= MOST_TOKENS and min(lengths, default=0) > 0 and max(lengths) <= MOST_TOKEN_BYTES
    written = b"".join(b"%b %d\n" % (word, n) for n, word in enumerate(encoded))
    return ranks if fine and written == data else None


def _line_by_line(path: Path, data: bytes) -> dict[bytes, int]:
    """The ranks, or an `ArtifactError` that says which line is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(io.BytesIO(data)):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if not 0 < len(token) <= MOST_TOKEN_BYTES or number >= MOST_TOKENS:
                raise ValueError("too long, or too many")
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            shown = line[:40].decode("utf-8", errors="replace")
            raise ArtifactError(f"{path}, line {number + 1}: {shown!r} is not a rank", hint=_DAMAGED) from None
        if int(rank) != number or len(ranks) != number + 1:
            raise ArtifactError(f"{path}, line {number + 1}: expected rank {number}, not given before", hint=_DAMAGED)
    return ranks


def read_bounded(path: Path) -> bytes:
    """The content of a vocabulary's file. Raises `ArtifactError` if it is too large to be one, or cannot be read."""
    with artifacts.open_regular(path) as file:
        large = os.fstat(file.fileno()).st_size > MOST_FILE_BYTES
        data = b"" if large else file.read(MOST_FILE_BYTES)
    if large:
        raise ArtifactError(
            f"{path} is no vocabulary: it has more than {MOST_FILE_BYTES:,} bytes", hint="give the file of a tokenizer"
        )
    return data


def write_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Write `ranks` to `path` in the form that `read_ranks` and tiktoken read."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)
    artifacts.write_atomic(path, b"".join(lines))
