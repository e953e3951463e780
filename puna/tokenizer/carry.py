"""A tokenizer on its way from one checkpoint to another: what is written has the ids of what was read.

    the source                                     what a folder gets
    files of our own, or Meta's ranks alone        both forms, written anew for this model's context
    any other files                                those files, byte for byte; with a tokenizer.json alone the ranks
                                                   beside it, which are read in a seventh of the time
    a vocabulary from inside a GGUF file           both forms, or a SentencePiece model

Files are copied wherever they say something that writing anew would lose: names of added special tokens, a chat template
of their own, a SentencePiece model's training record.
"""

import json
import shutil
from pathlib import Path

from puna.artifacts import replacing
from puna.errors import ArtifactError
from puna.tokenizer.bpe import MODEL_FILE, SPECIALS, Tokenizer, read_bounded, write_ranks
from puna.tokenizer.export import CHAT_TEMPLATE, write_hugging_face
from puna.tokenizer.hugging_face import JSON_FILE
from puna.tokenizer.load import AnyTokenizer, load_tokenizer, names_with
from puna.tokenizer.sentencepiece import write_sentencepiece

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
FILES = (MODEL_FILE, JSON_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has the file of a tokenizer."""
    return any((folder / name).is_file() for name in (MODEL_FILE, JSON_FILE))


def carry(source: Path | AnyTokenizer, out: Path, *, context: int) -> AnyTokenizer:
    """Write the tokenizer of the folder `source`, or one in memory, into the folder `out`; returns it.

    `context` is the model's, in tokens. Raises `ArtifactError` for a source whose ids could not be kept.
    """
    tokenizer = load_tokenizer(source) if isinstance(source, Path) else source
    if isinstance(source, Path) and not _is_ours(source, tokenizer):
        for name in FILES:
            if (source / name).is_file():
                with replacing(out / name) as temporary:
                    shutil.copyfile(source / name, temporary)
        if isinstance(tokenizer, Tokenizer) and _ranks_suffice(out, tokenizer):
            write_ranks(out / MODEL_FILE, tokenizer.ranks)
    elif isinstance(tokenizer, Tokenizer):
        write_ranks(out / MODEL_FILE, tokenizer.ranks)
        write_hugging_face(out, tokenizer, context=context)
    else:
        write_sentencepiece(out / MODEL_FILE, tokenizer)
    return tokenizer


def _ranks_suffice(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether ranks, which `folder` has not yet, make this tokenizer together with the other files there."""
    if (folder / MODEL_FILE).exists():
        return False
    try:
        return tuple(names_with(folder, len(tokenizer.ranks))) == tokenizer.special_names
    except ArtifactError:
        return False


def _is_ours(folder: Path, tokenizer: AnyTokenizer) -> bool:
    """Whether writing anew loses nothing: Llama 3.1's own names, and no chat template but ours."""
    if not isinstance(tokenizer, Tokenizer) or tokenizer.special_names != SPECIALS:
        return False
    return (folder / MODEL_FILE).is_file() and chat_template(folder) in ("", CHAT_TEMPLATE)


def chat_template(folder: Path) -> str:
    """The text of the chat template in a folder of Hugging Face's: of several the default one; empty if it has none.

    Raises `ArtifactError` for a file that cannot be read.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return read_bounded(folder / TEMPLATE_FILE).decode(errors="replace")
    if not (folder / CONFIG_FILE).is_file():
        return ""
    try:
        data = json.loads(read_bounded(folder / CONFIG_FILE))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / CONFIG_FILE} is not JSON: {error}", hint="fetch the file again") from None
    found = data.get("chat_template") if isinstance(data, dict) else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""
