"""Any checkpoint that a user may have, opened by what it is: one door to all formats.

with open_checkpoint(path) as opened:      headers only
    opened.kind, opened.config, opened.weights
model = load_checkpoint(path)              the weights, streamed
tokenizer = checkpoint_tokenizer(path)     from its files, or from inside a GGUF file
format = checkpoint_format(path)           how it is spoken to, and its tokenizer

PyTorch is imported for what needs it: a model in memory, and the files of GGUF and of Meta.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

from puna.errors import ArtifactError
from puna.model.detect import Kind as CheckpointKind
from puna.model.detect import kind_of
from puna.model.folder import CONFIG, WeightFiles, load_config, read_json
from puna.model.sizes import LlamaConfig
from puna.model.weights import Weights
from puna.tokenizer.carry import chat_template
from puna.tokenizer.formats import DialogFormat, Signs, dialog_format
from puna.tokenizer.load import AnyTokenizer, load_tokenizer
from puna.tokenizer.sentencepiece import Kind, Piece, SentencePieceTokenizer

if TYPE_CHECKING:
    import torch

    from puna.model.llama import Llama

Dtype = Union[str, "torch.dtype"]  # "float32", "bfloat16" or "float16", or PyTorch's of that name


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose headers were read."""

    kind: CheckpointKind
    config: LlamaConfig
    weights: Weights
    notes: tuple[str, ...] = ()  # what had to be concluded


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Opened]:
    """Read the headers of the checkpoint at `path`. Raises `ArtifactError` for what is none."""
    kind = kind_of(path)
    if kind == "quantised":
        raise ArtifactError(f"{path} holds a model that we quantised", hint="give the checkpoint that it was made from")
    if kind == "gguf":
        from puna.model.gguf import GgufFile

        with GgufFile(path) as file:
            yield Opened(kind=kind, config=file.config, weights=file)
    elif kind == "meta":
        from puna.model.meta import MetaFiles

        with MetaFiles(path) as files:
            yield Opened(kind=kind, config=files.config, weights=files, notes=tuple(files.notes))
    else:
        config = load_config(path)
        with WeightFiles(path) as files:
            files.expect_llama(config)
            yield Opened(kind=kind, config=config, weights=files)


def checkpoint_config(path: Path) -> LlamaConfig:
    """The shape of the model at `path`, of any format, quantised by us or not. Raises `ArtifactError`."""
    if kind_of(path) == "quantised":
        return load_config(path)
    with open_checkpoint(path) as opened:
        return opened.config


def load_checkpoint(path: Path, dtype: Dtype = "float32") -> "Llama":
    """The model at `path`, whatever its format, with weights in `dtype`.

    Needs the model's memory and a few megabytes more. Raises `ArtifactError` for what is no model, or a damaged one.
    """
    import torch

    from puna.model.checkpoint import load_model
    from puna.model.gguf import load_gguf
    from puna.model.meta import load_meta

    readers = {"gguf": load_gguf, "meta": load_meta}
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return readers.get(kind_of(path), load_model)(path, dtype)


def checkpoint_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer of the checkpoint at `path`. Raises `ArtifactError` if it has none whose ids would be exact."""
    if kind_of(path) != "gguf":
        return load_tokenizer(path)
    from puna.model.gguf import GgufFile
    from puna.model.gguf.vocabulary import to_tokenizer

    with GgufFile(path) as file:
        vocabulary = file.vocabulary()
    if vocabulary.model != "llama":
        return to_tokenizer(vocabulary, path)
    if not len(vocabulary.tokens) == len(vocabulary.scores) == len(vocabulary.types):
        raise ArtifactError(f"{path}: the pieces have no scores, or no types", hint="convert the model again")
    pieces = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    return SentencePieceTokenizer([Piece(text, score, Kind(kind)) for text, score, kind in pieces], where=str(path))


def checkpoint_format(path: Path, name: str = "") -> DialogFormat:
    """The dialog format of the checkpoint at `path`, with its tokenizer: `name`, or what the checkpoint says.

    Raises `ArtifactError` as `checkpoint_tokenizer` does, and `ConfigError` for a name that is no format for it.
    """
    path = Path(path)
    return dialog_format(checkpoint_tokenizer(path), name, _signs(path))


def _signs(path: Path) -> Signs:
    """What the checkpoint says about its dialog format."""
    kind = kind_of(path)
    template = title = ""
    if kind == "gguf":
        from puna.model.gguf import GgufFile

        with GgufFile(path) as file:
            config, template = file.config, file.vocabulary().chat_template or ""
            title = file.settings.get("general.name")
    elif kind == "meta":
        from puna.model.meta import MetaFiles

        with MetaFiles(path) as files:
            config, template = files.config, chat_template(path)
    else:
        config, template = load_config(path), chat_template(path)
        title = read_json(path, CONFIG).get("_name_or_path")
    return Signs(
        context=config.context,
        outputs=0 if kind == "puna" else config.vocab_size,  # what was trained here is of no release
        rope_factor=config.rope_scaling.factor if config.rope_scaling else 0.0,
        template=template,
        title=title if isinstance(title, str) else "",
    )
