"""One way to any Llama's tokenizer: `load_tokenizer` looks at what a file holds, not at what it is called.

    tokenizer.model     begins with a protobuf field, 0a ...      SentencePiece: Llama 1 and 2
    tokenizer.model     begins with base64, a space, a number     ranks: Llama 3
    tokenizer.json      begins with {                             either, in Hugging Face's form

Of a folder the first that is there is read: `tokenizer.model` is what the model was trained with, the JSON a conversion
of it. Tokens that were added to a SentencePiece vocabulary afterwards stand in files beside it (`added_tokens.json`, or
`added_tokens_decoder` in `tokenizer_config.json`) and become control pieces: names without text. Ranks say nothing about
special tokens either: the same files name those, and where there are none they are Llama 3.1's.
"""

import json
import os
import re
from pathlib import Path

from puna.artifacts import open_regular
from puna.errors import ArtifactError
from puna.tokenizer.bpe import MODEL_FILE, SPECIALS, Tokenizer, read_bounded, read_ranks
from puna.tokenizer.hugging_face import JSON_FILE, read_tokenizer_json
from puna.tokenizer.sentencepiece import SentencePieceTokenizer, read_sentencepiece

AnyTokenizer = Tokenizer | SentencePieceTokenizer

_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")
_PROTOBUF = b"\x0a\x12\x1a"  # the keys of a SentencePiece model's first three fields
_ADDED_FILE, _CONFIG_FILE = "added_tokens.json", "tokenizer_config.json"


def load_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer in the folder or file `path`.

    Raises `ArtifactError` if there is none, or if it is damaged or of a kind whose ids would not be exact.
    """
    path = Path(path)
    if os.path.lexists(path) and not path.is_dir():
        return _from_file(path, [])
    for name in (MODEL_FILE, JSON_FILE):
        if os.path.lexists(path / name):
            return _from_file(path / name, [path / _ADDED_FILE, path / _CONFIG_FILE])
    what = "has no tokenizer" if path.is_dir() else "does not exist"
    others = sorted(p.name for p in path.glob("*") if "token" in p.name or "vocab" in p.name) if path.is_dir() else []
    seen = f"; it has {', '.join(others[:5])}" if others else ""
    raise ArtifactError(
        f"{path} {what}: looked for {MODEL_FILE} (SentencePiece or ranks), then {JSON_FILE}{seen}",
        hint="give the folder or the file of a Llama's tokenizer",
    )


def names_with(folder: Path, ranks: int) -> list[str]:
    """The special tokens' names if `folder` had `ranks` tokens in a `tokenizer.model`. Raises `ArtifactError`."""
    return _names_beside([folder / _ADDED_FILE, folder / _CONFIG_FILE], ranks)


def _from_file(path: Path, beside: list[Path]) -> AnyTokenizer:
    with open_regular(path) as file:
        start = file.read(4096)
    if start.lstrip()[:1] == b"{":
        return read_tokenizer_json(path)
    if start[:1] and start[:1] in _PROTOBUF:
        return read_sentencepiece(path, _added_beside(beside))
    if _RANK.match(start):
        ranks = read_ranks(path)
        return Tokenizer(ranks, _names_beside(beside, len(ranks)), where=str(path))
    if start.startswith(b"version https://git-lfs"):
        raise ArtifactError(f"{path} is a placeholder of Git LFS, not the file", hint="run: git lfs pull")
    raise ArtifactError(
        f"{path} is no tokenizer: it begins with {start[:16]!r}",
        hint="it may be a SentencePiece model, a file of ranks (base64, a space, a number), or a tokenizer.json",
    )


def _names_beside(files: list[Path], ranks: int) -> list[str]:
    """The names of the special tokens that follow `ranks` tokens: Llama 3.1's, where files beside give no others."""
    names: dict[int, str] = dict(enumerate(SPECIALS, ranks))
    found = {id: name for name, id in _added_beside(files).items()}
    names |= found
    if sorted(names) != list(range(ranks, ranks + len(names))):
        odd = next(id for id in sorted(names) if not ranks <= id < ranks + len(names))
        raise ArtifactError(
            f"{names[odd]!r} was added as {odd}; after {ranks:,} ranks the ids go on from {ranks:,} without gaps",
            hint="are the files beside tokenizer.model another model's? give the path of the file alone to read it without",
        )
    return [names[id] for id in sorted(names)]


def _added_beside(files: list[Path]) -> dict[str, int]:
    """Name -> id of the tokens that files beside a vocabulary add or repeat."""
    added: dict[str, int] = {}
    for file in files:
        if not os.path.lexists(file):
            continue
        try:
            data = json.loads(read_bounded(file))
            found = data if file.name == _ADDED_FILE else _decoder_names(data.get("added_tokens_decoder") or {})
            if any(not isinstance(name, str) or type(id) is not int for name, id in found.items()):
                raise ValueError("a token has no name and number")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{file} does not list added tokens: {str(error)[:200]}", hint="fetch the file again"
            ) from None
        added |= found
    return added


def _decoder_names(table: dict[str, dict]) -> dict[str, int]:
    return {token["content"]: int(id) for id, token in table.items()}
