"""The vocabulary inside a GGUF file.

    tokenizer.ggml.model        "gpt2": byte-level BPE (Llama 3)     "llama": SentencePiece (Llama 1 and 2)
    tokenizer.ggml.pre          how text is cut before merging; "llama-bpe" is Llama 3's way
    tokenizer.ggml.tokens       one string per id: bytes in GPT-2's characters, or SentencePiece's with its "▁"
    tokenizer.ggml.token_type   1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    tokenizer.ggml.merges       "left right", the earlier the sooner it is merged (BPE)
    tokenizer.ggml.scores       the greater the sooner it is merged (SentencePiece)
    tokenizer.ggml.bos_token_id, eos_token_id, eot_token_id, ...

`Vocabulary` is that, as it stands in the file, for both kinds. `to_tokenizer` makes a byte-level one ours: the normal
tokens in front are the ranks, as long as merges follow their order, and Llama 3's special tokens follow them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import ArtifactError, ConfigError
from puna.model.gguf.format import Container, Strings
from puna.tokenizer.bpe import MOST_TOKEN_BYTES, SPECIALS, Tokenizer
from puna.tokenizer.export import CHAT_TEMPLATE, byte_alphabet, merges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_KEY = "tokenizer.ggml."
_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")
_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "default")
_HINT = "only Llama 3's byte-level vocabularies become a Tokenizer; take the model's own tokenizer files"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A vocabulary as a GGUF file has it; lists are by id, and empty where the kind has no such thing."""

    model: str  # "gpt2", "llama", or "no_vocab"
    pre: str = ""
    tokens: Sequence[str] = ()
    types: Sequence[int] = ()
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    ids: Mapping[str, int] = field(default_factory=dict)  # "bos", "eos", "eot", "eom", "unknown", "padding"
    add_bos: bool | None = None
    chat_template: str | None = None

    def settings(self) -> dict[str, Any]:
        """The vocabulary as settings of a GGUF file."""
        lists = {"pre": self.pre, "tokens": self.tokens, "scores": self.scores}
        lists |= {"token_type": self.types, "merges": self.merges}
        found = {_KEY + "model": self.model} | {_KEY + key: value for key, value in lists.items() if len(value)}
        found |= {f"{_KEY}{name}_token_id": id for name, id in self.ids.items()}
        if self.add_bos is not None:
            found[_KEY + "add_bos_token"] = self.add_bos
        if self.chat_template is not None:
            found["tokenizer.chat_template"] = self.chat_template
        return found


def read_vocabulary(container: Container) -> Vocabulary:
    """The vocabulary of a GGUF file. Raises `ArtifactError` if it has none, or lists that do not fit together."""
    settings, path = container.metadata, container.path
    model = settings.get(_KEY + "model")
    if not isinstance(model, str):
        raise ArtifactError(f"{path} has no vocabulary", hint="give a tokenizer's folder beside the file")
    tokens = _list(path, settings, "tokens", Strings)
    scores, types = (_numbers(path, settings, key) for key in ("scores", "token_type"))
    for key, values in (("scores", scores), ("token_type", types)):
        if len(values) not in (0, len(tokens)):
            raise ArtifactError(f"{path} has {len(tokens):,} tokens and {len(values):,} of {_KEY}{key}", hint=_HINT)
    ids = {name: settings[f"{_KEY}{name}_token_id"] for name in _IDS if f"{_KEY}{name}_token_id" in settings}
    wrong = [name for name, id in ids.items() if type(id) is not int or not 0 <= id < max(1, len(tokens))]
    if wrong:
        raise ArtifactError(f"{path}: the {wrong[0]} token is {ids[wrong[0]]!r}, of {len(tokens):,}", hint=_HINT)
    pre, add_bos = settings.get(_KEY + "pre"), settings.get(_KEY + "add_bos_token")
    template = settings.get("tokenizer.chat_template")
    return Vocabulary(
        model=model,
        pre=pre if isinstance(pre, str) else "",
        tokens=list(tokens),
        types=[int(t) for t in types],
        scores=[float(s) for s in scores],
        merges=list(_list(path, settings, "merges", Strings)),
        ids=ids,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=template if isinstance(template, str) else None,
    )


def _list(path: Path, settings: Mapping[str, Any], key: str, kind: type) -> Any:
    values = settings.get(_KEY + key, [])
    if not isinstance(values, (list, kind)):
        raise ArtifactError(f"{path}: {_KEY}{key} is not a list of the right type", hint=_HINT)
    return values


def _numbers(path: Path, settings: Mapping[str, Any], key: str) -> np.ndarray:
    """A list of finite numbers; whole ones from 1 to 6 for `token_type`."""
    values = np.asarray(_list(path, settings, key, np.ndarray))
    wrong = not np.isfinite(values).all()
    if key == "token_type" and len(values):
        wrong = values.dtype.kind not in "iu" or values.min() < NORMAL or values.max() > BYTE
    if wrong:
        raise ArtifactError(f"{path}: {_KEY}{key} holds what is none", hint=_HINT)
    return values


def from_tokenizer(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Our tokenizer as a vocabulary of `size` tokens; ids that the tokenizer lacks become unused ones.

    Raises `ConfigError` if the tokenizer has more tokens.
    """
    if tokenizer.vocab_size > size:
        message = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model has {size:,}"
        raise ConfigError(message, hint="give the tokenizer it was trained with")
    character = {byte: c for c, byte in byte_alphabet().items()}

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    ranks = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    spare = [f"[PAD{id}]" for id in range(tokenizer.vocab_size, size)]
    return Vocabulary(
        model="gpt2",
        pre="llama-bpe",
        tokens=[*map(written, ranks), *tokenizer.special_names, *spare],
        types=[NORMAL] * len(ranks) + [CONTROL] * len(tokenizer.special_names) + [UNUSED] * len(spare),
        merges=[f"{written(left)} {written(right)}" for left, right in merges(tokenizer.ranks)],
        ids={
            "bos": tokenizer.bos,
            "eos": tokenizer.eot,
            "eot": tokenizer.eot,
            "eom": tokenizer.eom,
            "padding": tokenizer.pad,
        },
        add_bos=True,
        chat_template=CHAT_TEMPLATE,
    )


def to_tokenizer(vocabulary: Vocabulary, path: Path) -> Tokenizer:
    """A byte-level vocabulary as our tokenizer; `path` is the file it is from, for messages.

    Raises `ArtifactError` if it is another kind, if its ids do not follow its merges, or if its special tokens are not
    Llama 3's.
    """
    if vocabulary.model != "gpt2" or (vocabulary.pre or "default") not in _LLAMA_3:
        kind = f"{vocabulary.model!r}, cut in the way {vocabulary.pre!r}"
        raise ArtifactError(f"{path}: the vocabulary is of the kind {kind}", hint=_HINT)
    count = next((id for id, kind in enumerate(vocabulary.types) if kind != NORMAL), len(vocabulary.types))
    ranks = _ranks(vocabulary.tokens[:count], path)
    _check_order(vocabulary.merges, ranks, path)
    if NORMAL in vocabulary.types[count:]:
        raise ArtifactError(f"{path}: normal tokens follow the special ones from id {count}", hint=_HINT)
    _check_specials(vocabulary.tokens[count:], path)
    names = list(vocabulary.tokens[count:])
    while names and vocabulary.types[count + len(names) - 1] == UNUSED:  # what fills the list up to the model's size
        names.pop()
    return Tokenizer(ranks, names, where=str(path))


def _ranks(tokens: Sequence[str], path: Path) -> dict[bytes, int]:
    alphabet = byte_alphabet()
    try:
        ranks = {bytes(map(alphabet.__getitem__, token)): id for id, token in enumerate(tokens)}
    except KeyError as error:
        message = f"{path}: a token has the character {error.args[0]!r}, which stands for no byte"
        raise ArtifactError(message, hint=_HINT) from None
    longest = max(map(len, ranks), default=0)
    if longest > MOST_TOKEN_BYTES:
        raise ArtifactError(f"{path}: a token has {longest:,} bytes, {MOST_TOKEN_BYTES:,} at most", hint=_HINT)
    if len(ranks) != len(tokens) or b"" in ranks or any(bytes([b]) not in ranks for b in range(256)):
        raise ArtifactError(f"{path}: the tokens are not all different, or lack one of the 256 bytes", hint=_HINT)
    return ranks


def _check_order(merges: Sequence[str], ranks: Mapping[bytes, int], path: Path) -> None:
    """Merging by rank is merging by list only if the list's results come in the order of ranks."""
    alphabet = byte_alphabet()
    before = -1
    for number, merge in enumerate(merges):
        result = bytes(alphabet.get(c, 0) for c in merge.replace(" ", "", 1))
        rank = ranks.get(result, -1)
        if rank < before or rank < 0:
            message = f"{path}: merge {number} {merge[:40]!r} does not follow the order of the tokens"
            raise ArtifactError(message, hint=_HINT)
        before = rank


def _check_specials(names: Sequence[str], path: Path) -> None:
    """Llama 3's special tokens, some of which other releases call reserved, and nothing but padding after them."""
    for place, ours in enumerate(SPECIALS):
        theirs = names[place] if place < len(names) else None
        renamed = (theirs or "").startswith("<|reserved_special_token_")
        if theirs is None or (theirs != ours and not (renamed or ours.startswith("<|reserved"))):
            message = f"{path}: special token {place} is {theirs!r}, Llama 3's is {ours!r}"
            raise ArtifactError(message, hint=_HINT)
