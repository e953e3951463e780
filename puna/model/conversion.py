"""A checkpoint from one format into another: `puna convert`.

    huggingface   model.safetensors, config.json, tokenizer files      loads in transformers, vLLM, and here
    meta          params.json, consolidated.NN.pth, tokenizer.model    loads in Meta's own code, and here
    gguf          one file, in one of the kinds of `gguf.KINDS`        loads in llama.cpp, and here

Between the two folders nothing changes but names, order and, if asked, the number format; so there and back gives the same
bits. GGUF's quantised kinds lose what they lose. The tokenizer comes along: as it is where the target has files for it, else
written anew from the same vocabulary; its ids never change. The result appears under its name when it is whole.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from puna import log
from puna.artifacts import write_atomic
from puna.errors import ArtifactError, ConfigError
from puna.model.checkpoint import save_model, write_folder
from puna.model.gguf import KINDS, GgufFile, write_gguf
from puna.model.gguf.vocabulary import Vocabulary, from_tokenizer
from puna.model.meta import write_meta
from puna.model.opening import checkpoint_tokenizer, open_checkpoint
from puna.model.sizes import LlamaConfig
from puna.model.stored import StoredModel, give_back_at_once
from puna.tokenizer.bpe import MODEL_FILE, SPECIALS, Tokenizer, write_ranks
from puna.tokenizer.carry import FILES, TEMPLATE_FILE, carry, chat_template, has_tokenizer
from puna.tokenizer.export import CHAT_TEMPLATE
from puna.tokenizer.load import AnyTokenizer
from puna.tokenizer.sentencepiece import Kind, Piece

Target = Literal["huggingface", "meta", "gguf"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(source: Path, out: Path, to: Target, form: str = "", shards: int = 1) -> None:
    """Write the checkpoint at `source` into `out` as `to`.

    `form` is the number format: F32, F16, BF16, and for GGUF any of its kinds; by default that of the source's matrices,
    or BF16 where these are quantised. `shards` is Meta's number of files. Weights are streamed: what this needs is the memory of
    the largest tensor, and for Meta's format of one of its files.
    Raises `ConfigError` for a form that the target has not, `ArtifactError` if `out` exists or `source` is no model.
    """
    form = form.upper() or _form_of(source)
    accepted = KINDS if to == "gguf" else DTYPES
    if form not in accepted:
        raise ConfigError(f"{form!r} is not a number format of {to}", hint=f"one of {', '.join(accepted)}")
    if out.exists():
        raise ArtifactError(f"{out} exists", hint="give a new name, or remove it")
    tokenizer = tokenizer_of(source)
    # Quantised kinds are made from what the source holds exactly; bfloat16 would be rounded twice.
    out.parent.mkdir(parents=True, exist_ok=True)
    carried = source if tokenizer is not None and source.is_dir() else tokenizer
    if to == "meta":
        give_back_at_once()
    with open_checkpoint(source) as opened, _taking_its_name(out) as made:
        for note in opened.notes:
            log.info(note)
        model = StoredModel(opened.config, opened.weights, DTYPES.get(form, torch.float32))
        if to == "gguf":
            write_gguf(model, _vocabulary(source, tokenizer, model.config.vocab_size), made, form)
        elif to == "meta":
            write_meta(model, None, made, shards=shards)
            if carried is not None:
                _carry_to_meta(carried, made, model.config.context)
        else:
            save_model(model, carried, made)
            if source.is_file() and tokenizer is not None:
                _carry_template(source, made)


def write_folder_of(
    source: Path, config: LlamaConfig, out: Path, dtype: torch.dtype, extra: Mapping[str, Any] | None = None
) -> None:
    """Everything of a Hugging Face folder but the weights, with the tokenizer and the chat template of the checkpoint at
    `source`, if it has them. `extra` is added to config.json.
    """
    tokenizer = tokenizer_of(source)
    write_folder(config, source if tokenizer is not None and source.is_dir() else tokenizer, out, dtype, extra)
    if source.is_file() and tokenizer is not None:
        _carry_template(source, out)


@contextmanager
def _taking_its_name(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `out` when all is well, and vanishes otherwise.

    It lies in a hidden folder beside `out`; what a kill leaves there, the next attempt removes.
    """
    hidden = out.with_name(f".{out.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    try:
        yield hidden / out.name
        (hidden / out.name).rename(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _form_of(source: Path) -> str:
    with open_checkpoint(source) as opened:
        forms = {opened.weights.form(name) for name in opened.weights.names if name.endswith("proj.weight")}
    form = forms.pop() if len(forms) == 1 else ""
    return form if form in DTYPES else "BF16"


def tokenizer_of(source: Path) -> AnyTokenizer | None:
    """The source's tokenizer, or None if it has no file of one."""
    if source.is_dir() and not has_tokenizer(source):
        return None
    if source.is_file():
        with GgufFile(source) as file:
            if file.vocabulary().model == "no_vocab":
                return None
    return checkpoint_tokenizer(source)


def _vocabulary(source: Path, tokenizer: AnyTokenizer | None, size: int) -> Vocabulary | None:
    """The tokenizer in GGUF's terms, as `size` tokens, with the chat template that the source has."""
    if source.is_file():
        with GgufFile(source) as file:
            return file.vocabulary()
    if tokenizer is None:
        return None
    template = chat_template(source)
    if isinstance(tokenizer, Tokenizer):
        vocabulary = from_tokenizer(tokenizer, size)
        return replace(vocabulary, chat_template=template or vocabulary.chat_template)
    spare = (Piece(f"[PAD{id}]", 0.0, Kind.UNUSED) for id in range(tokenizer.vocab_size, size))
    pieces = [*tokenizer.pieces, *spare]
    return Vocabulary(
        model="llama",
        tokens=[piece.text for piece in pieces],
        scores=[piece.score for piece in pieces],
        types=[int(piece.kind) for piece in pieces],
        ids={"bos": tokenizer.bos, "eos": tokenizer.eos, "unknown": tokenizer.unk},
        add_bos=True,
        chat_template=template or None,
    )


def _carry_template(source: Path, folder: Path) -> None:
    """Give the folder the chat template of a GGUF file, unless it is ours, which is there."""
    with GgufFile(source) as file:
        template = file.vocabulary().chat_template
    if template and template != CHAT_TEMPLATE:
        write_atomic(folder / TEMPLATE_FILE, template)


def _carry_to_meta(carried: Path | AnyTokenizer, folder: Path, context: int) -> None:
    """Write the tokenizer as Meta's code reads it, with files of other forms only where they say more."""
    tokenizer = carry(carried, folder, context=context)
    if not isinstance(tokenizer, Tokenizer):
        return
    write_ranks(folder / MODEL_FILE, tokenizer.ranks)
    if tokenizer.special_names == SPECIALS:
        for name in set(FILES) - {MODEL_FILE}:
            (folder / name).unlink(missing_ok=True)
