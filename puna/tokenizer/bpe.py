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
"""

import base64
import binascii
import difflib
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


class Tokenizer:
    """Ids of a vocabulary with Llama 3.1's special tokens.

    `ranks` maps each byte string to its rank, 0 ... R-1 without gaps, and holds all single bytes.
    `vocab_size` is R + 256; the attributes `bos`, `eos` (end of text), `eot` (end of turn), `eom` (end of a message that
    waits for a tool), `pad`, `python_tag`, `start_header` and `end_header` are ids, `stop_ids` those that end generation.
    """

    def __init__(self, ranks: Mapping[bytes, int]):
        self.ranks = dict(ranks)
        self._specials = {name: len(self.ranks) + i for i, name in enumerate(SPECIALS)}
        self._encoding = tiktoken.Encoding(
            name="llama3", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self._specials
        )
        self.bos = self.special("<|begin_of_text|>")
        self.eos = self.special("<|end_of_text|>")
        self.eot = self.special("<|eot_id|>")
        self.eom = self.special("<|eom_id|>")
        self.pad = self.special("<|finetune_right_pad_id|>")
        self.python_tag = self.special("<|python_tag|>")
        self.start_header = self.special("<|start_header_id|>")
        self.end_header = self.special("<|end_header_id|>")
        self.stop_ids = frozenset({self.eos, self.eom, self.eot})

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer in the directory `path`. Raises `ArtifactError` if there is none or its file is damaged."""
        return cls(read_ranks(Path(path) / MODEL_FILE))

    @property
    def vocab_size(self) -> int:
        """Number of ids: ranks and specials."""
        return len(self.ranks) + len(SPECIALS)

    @property
    def special_names(self) -> tuple[str, ...]:
        """The names of the special tokens, in the order of their ids."""
        return SPECIALS

    def special(self, name: str) -> int:
        """The id of a special token. Raises `PunaError` for a name that is none."""
        if name not in self._specials:
            near = difflib.get_close_matches(name, SPECIALS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "the names are in Tokenizer.special_names"
            raise PunaError(f"{name!r} is not a special token", hint=hint)
        return self._specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special one, whatever the text says. No BOS is added.

        Half of a surrogate pair, which no UTF-8 text can hold, is encoded as U+FFFD; two that belong together as their
        character.
        """
        if not _is_unicode(text):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        for piece in pieces(text):
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
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise PunaError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size}",
                hint="the ids come from another tokenizer, or from a model with more outputs than this one has tokens",
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_DAMAGED = "it must hold one line per rank: the bytes in base64, a space, the rank; make or download it anew"


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks in the file `path`. Raises `ArtifactError` if it is absent, damaged, truncated, or has gaps."""
    if not path.is_file():
        raise ArtifactError(
            f"{path.parent} is not a tokenizer: it has no {MODEL_FILE}",
            hint="give the directory that train_tokenizer wrote, or a checkpoint's",
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            shown = line[:40].decode("utf-8", errors="replace")
            raise ArtifactError(f"{path}, line {number + 1}: {shown!r} is not a rank", hint=_DAMAGED) from None
        if int(rank) != number or len(ranks) != number + 1:
            raise ArtifactError(f"{path}, line {number + 1}: expected rank {number}, not given before", hint=_DAMAGED)
    absent = next((b for b in range(256) if bytes([b]) not in ranks), None)
    if absent is not None:
        raise ArtifactError(f"{path} has no rank for the byte 0x{absent:02x}", hint=_DAMAGED)
    return ranks


def write_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    """Write `ranks` to `path` in the form that `read_ranks` and tiktoken read."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)
    artifacts.write_atomic(path, b"".join(lines))
