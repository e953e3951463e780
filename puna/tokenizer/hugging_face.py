"""Reading Hugging Face's `tokenizer.json`, where it says exactly what one of our two tokenizers does.

The file is a pipeline in JSON; only two of the pipelines it can describe are a Llama's:

                     Llama 3                               Llama 1 and 2
    normalizer       null                                  Prepend "▁", Replace " " by "▁"     or null
    pre_tokenizer    Split by a pattern, then ByteLevel    null                                or Metaspace, not split
    model            BPE over bytes (GPT-2's characters)   BPE with byte_fallback
    decoder          ByteLevel                             Replace, ByteFallback, Fuse, Strip  (the last may be absent)
    -> ours          Tokenizer                             SentencePieceTokenizer

`model.vocab` gives each token its id, `model.merges` the pairs that may be joined, first to last, as "a b" or ["a", "b"].
`added_tokens` are the special ones. Here they stay names: the library finds them in a user's text, ours never does.

Joining by rank knows no list of pairs: it joins *any* two neighbours whose concatenation is a token. So a byte-level file
can be represented if its pairs are all splits of each token into two tokens, in the order of the tokens; that is how
the released files were made. (In which order the splits of one token stand makes no difference that we know of.) A
vocabulary that was trained by the library itself lists one split for each token, and is refused, like any other part
that we would have to guess at.

What the library does around the text (BOS from `post_processor`, `truncation`, `padding`) is not `encode`'s to do.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.errors import ArtifactError, shown
from puna.tokenizer.bpe import MOST_TOKEN_BYTES, Tokenizer, as_unicode, read_bounded
from puna.tokenizer.export import byte_alphabet
from puna.tokenizer.export import merges as all_merges
from puna.tokenizer.merging import merge
from puna.tokenizer.pretokens import PATTERN
from puna.tokenizer.sentencepiece import MOST_PIECES, SPACE, Kind, Piece, SentencePieceTokenizer

JSON_FILE = "tokenizer.json"
MOST_MERGES = 1 << 22
_HINT = "only what Llama 1, 2 and 3 use is encoded here exactly; is there a tokenizer.model beside it?"
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
_TO_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_FROM_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def read_tokenizer_json(path: Path) -> Tokenizer | SentencePieceTokenizer:
    """The tokenizer in the `tokenizer.json` at `path`.

    Raises `ArtifactError` for a file that is absent or damaged, and for one whose ids ours could not give exactly.
    """
    data = _object(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise _refusal(
            path, f"model.type is {shown(model.get('type') if isinstance(model, dict) else model)}, not 'BPE'"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refusal(path, f"model.{key} is {shown(model[key])}, not null")
    vocab, merges, added = _vocab(path, model), _merges(path, model), _added(path, data)
    if any(step.get("type") == "ByteLevel" for step in _steps(data.get("pre_tokenizer"), "pretokenizers")):
        return _byte_level(path, data, vocab, merges, added)
    return _sentencepiece(path, data, vocab, merges, added)


def ranks_of(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], *, whole: bool, where: str
) -> dict[bytes, int]:
    """The ranks of a byte-level vocabulary, whose tokens are spelled in GPT-2's characters.

    `whole` says that a pre-token which is a token becomes it without any join (`ignore_merges`). Raises `ArtifactError`
    for ids with gaps, and for merges that joining by rank does not follow.
    """
    alphabet = byte_alphabet()
    try:
        ranks = {bytes(alphabet[c] for c in token): id for token, id in sorted(vocab.items(), key=lambda item: item[1])}
        pairs = [tuple(bytes(alphabet[c] for c in half) for half in pair) for pair in merges]
    except KeyError as error:
        raise _refusal(where, f"a token or a merge has {error.args[0]!r}, which stands for no byte") from None
    wrong = next((token for token in ranks if not 0 < len(token) <= MOST_TOKEN_BYTES), None)
    if wrong is not None:
        raise _refusal(where, f"it has a token of {len(wrong):,} bytes, where 1 to {MOST_TOKEN_BYTES:,} are read")
    if any(id != rank for rank, id in enumerate(ranks.values())):
        raise _refusal(where, "the ids of model.vocab are not 0, 1, 2, ... without gaps")
    absent = next((b for b in range(256) if bytes([b]) not in ranks), None)
    if absent is not None:
        raise _refusal(where, f"there is no token for the byte 0x{absent:02x}")
    expected = all_merges(ranks)
    if len(pairs) != len(expected) or set(pairs) != set(expected):
        counts = f"{len(pairs):,} merges, but its tokens split into two tokens in {len(expected):,} ways"
        raise _refusal(where, f"it lists {counts}: joining by rank would give other ids")
    made = [ranks[left + right] for left, right in pairs]
    wrong = next((i for i, (one, other) in enumerate(itertools.pairwise(made), 1) if other < one), None)
    if wrong is not None:
        raise _refusal(where, f"merge {wrong} makes an earlier token than the one before: joining by rank would differ")
    if not whole:
        _check_reachable(ranks, where)
    return ranks


def _check_reachable(ranks: Mapping[bytes, int], where: str) -> None:
    """Without `ignore_merges`, a token that no joins lead to is never encoded; ours would encode it."""
    byte_texts = {token.decode("latin-1"): rank for token, rank in ranks.items()}

    def rank_of(left: str, right: str) -> int | None:
        return byte_texts.get(left + right)

    for token in byte_texts:
        if len(merge(list(token), rank_of)) != 1:
            shown = token.encode("latin-1")
            raise _refusal(where, f"ignore_merges is false, and no joins lead to the token {shown!r}")


def _byte_level(
    path: Path, data: Mapping[str, Any], vocab: dict[str, int], merges: list[tuple[str, str]], added: dict[str, int]
) -> Tokenizer:
    if data.get("normalizer") is not None:
        raise _refusal(path, "a byte-level vocabulary has a normalizer")
    steps = _steps(data.get("pre_tokenizer"), "pretokenizers")
    if len(steps) != 2 or not (_says(steps[0], _SPLIT) and _says(steps[1], _BYTE_LEVEL)):
        raise _refusal(path, "pre_tokenizer is not Llama 3's: Split by its pattern, then ByteLevel without a pattern")
    if not _says(data.get("decoder"), {"type": "ByteLevel"}):
        raise _refusal(path, "decoder is not ByteLevel")
    model = data["model"]
    if model.get("byte_fallback"):
        raise _refusal(path, "model.byte_fallback is true in a byte-level vocabulary")
    texts = {token: id for token, id in vocab.items() if token not in added}
    ranks = ranks_of(texts, merges, whole=bool(model.get("ignore_merges")), where=str(path))
    names = sorted(added, key=added.__getitem__)
    if [added[name] for name in names] != list(range(len(ranks), len(ranks) + len(names))):
        raise _refusal(path, f"the ids of added_tokens do not follow those of the {len(ranks):,} tokens without gaps")
    return Tokenizer(ranks, names, where=str(path))


def _sentencepiece(
    path: Path, data: Mapping[str, Any], vocab: dict[str, int], merges: list[tuple[str, str]], added: dict[str, int]
) -> SentencePieceTokenizer:
    model = data["model"]
    fallback = bool(model.get("byte_fallback"))
    unknown = model.get("unk_token") or ("<unk>" if fallback else None)  # never encoded then, and left out by some
    if model.get("ignore_merges") or unknown is None or not (fallback or model.get("fuse_unk")):
        raise _refusal(path, "model needs byte_fallback, or fuse_unk with an unk_token, and no ignore_merges")
    if any(added[name] != id for name, id in vocab.items() if name in added):
        raise _refusal(path, "a token has one id in model.vocab and another in added_tokens")
    ids = vocab | added
    texts = sorted(ids, key=ids.__getitem__)
    if [ids[text] for text in texts] != list(range(len(texts))):
        raise _refusal(path, "the ids of its tokens are not 0, 1, 2, ... without gaps")
    bytes_named = {f"<0x{b:02X}>" for b in range(256)} if fallback else set()
    if bytes_named - vocab.keys():
        raise _refusal(path, f"byte_fallback is true, and there is no token {min(bytes_named - vocab.keys())}")

    # The library finds a special token's name before it merges, so that a merge which makes or uses one never happens.
    merges = [pair for pair in merges if not added.keys() & {*pair, "".join(pair)}]

    def kind(text: str) -> Kind:
        if text == unknown:
            return Kind.UNKNOWN
        return Kind.CONTROL if text in added else Kind.BYTE if text in bytes_named else Kind.NORMAL

    return SentencePieceTokenizer(
        [Piece(text, 0.0, kind(text)) for text in texts],
        merges=merges,
        prefix=_prefix(path, data),
        strip=_strips(path, data, fallback),
        where=str(path),
    )


def _prefix(path: Path, data: Mapping[str, Any]) -> str:
    """When a space is put before a text: what normalizer and pre_tokenizer say together."""
    before, after = data.get("normalizer"), data.get("pre_tokenizer")
    steps = _steps(before, "normalizers")
    if after is None and steps and _says(steps[-1], _FROM_SPACE):
        if len(steps) == 1:
            return "never"
        if len(steps) == 2 and _says(steps[0], {"type": "Prepend", "prepend": SPACE}):
            return "always"
    if before is None and _says(after, {"type": "Metaspace", "replacement": SPACE, "split": False}):
        scheme = after.get("prepend_scheme")
        if scheme in ("always", "first", "never"):
            return "never" if scheme == "never" else "unless_space"
    raise _refusal(path, "normalizer and pre_tokenizer are not Llama 2's: Prepend and Replace, or Metaspace not split")


def _strips(path: Path, data: Mapping[str, Any], fallback: bool) -> bool:
    """Whether decoding drops a first space."""
    steps = _steps(data.get("decoder"), "decoders")
    strips = bool(steps) and _says(steps[-1], _STRIP)
    middle = [{"type": "ByteFallback"}] * fallback
    wanted = [_TO_SPACE, *middle, {"type": "Fuse"}, *[_STRIP] * strips]
    if len(steps) != len(wanted) or not all(map(_says, steps, wanted)):
        raise _refusal(path, "decoder is not Llama 2's: Replace, ByteFallback, Fuse, and Strip or nothing")
    return strips


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {str(error)[:200]}", hint="fetch the file again") from None
    if not isinstance(data, dict):
        raise _refusal(path, "it is not a JSON object")
    return data


def _vocab(path: Path, model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MOST_PIECES:
        raise _refusal(path, f"model.vocab is no table of 1 to {MOST_PIECES:,} tokens")
    wrong = next((token for token, id in vocab.items() if type(id) is not int), None)
    if wrong is not None:
        raise _refusal(path, f"the id of the token {shown(wrong)} is {shown(vocab[wrong])}, not an integer")
    return vocab


def _merges(path: Path, model: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = model.get("merges")
    if not isinstance(found, list) or len(found) > MOST_MERGES:
        raise _refusal(path, f"model.merges is no list of at most {MOST_MERGES:,} pairs")
    pairs = []
    for number, given in enumerate(found):
        halves = given.split(" ") if isinstance(given, str) else given
        if not isinstance(halves, list) or len(halves) != 2 or not all(isinstance(h, str) and h for h in halves):
            raise _refusal(path, f"merge {number} is {str(given)[:40]!r}, not two tokens")
        pairs.append((halves[0], halves[1]))
    return pairs


def _added(path: Path, data: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens: name -> id."""
    found = data.get("added_tokens") or []
    added: dict[str, int] = {}
    for number, token in enumerate(found if isinstance(found, list) else [found]):
        name, id = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(name, str) or not name or as_unicode(name) != name or type(id) is not int or name in added:
            raise _refusal(path, f"added token {number} has no name and id of its own")
        if not token.get("special"):
            raise _refusal(path, f"the added token {shown(name)} is not special: the library would find it in any text")
        added[name] = id
    return added


def _steps(stage: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a stage of the pipeline: those of a Sequence, the one it is, or none where it is null."""
    if stage is None:
        return []
    steps = stage.get(key) if isinstance(stage, dict) and stage.get("type") == "Sequence" else [stage]
    return [step if isinstance(step, dict) else {} for step in (steps if isinstance(steps, list) else [steps])]


def _says(step: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a step has all that `wanted` has, with these values."""
    return isinstance(step, dict) and all(step.get(key) == value for key, value in wanted.items())


def _refusal(where: Path | str, fault: str) -> ArtifactError:
    return ArtifactError(f"{where} cannot be read exactly: {fault}", hint=_HINT)
