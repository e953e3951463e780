"""A checkpoint from one format into another: `puna convert`.

    huggingface   model.safetensors, config.json, tokenizer files      loads in transformers, vLLM, and here
    meta          params.json, consolidated.NN.pth, tokenizer.model    loads in Meta's own code, and here
    gguf          one file, in one of the kinds of `gguf.KINDS`        loads in llama.cpp, and here

Between the two folders nothing changes but names, order and, if asked, the number format; so there and back gives the same
bits. GGUF's quantised kinds lose what they lose. The tokenizer comes along: as it is where the target has files for it, else
written anew from the same vocabulary; its ids never change. The result appears under its name when it is whole.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from puna import log
from puna.artifacts import replacing
from puna.errors import ArtifactError, ConfigError
from puna.model.checkpoint import save_model, write_folder
from puna.model.gguf import KINDS, GgufFile, write_gguf
from puna.model.gguf.vocabulary import Vocabulary
from puna.model.meta import write_meta
from puna.model.opening import checkpoint_tokenizer, load_checkpoint, open_checkpoint
from puna.model.sizes import LlamaConfig
from puna.tokenizer.bpe import MODEL_FILE, Tokenizer, write_ranks
from puna.tokenizer.load import AnyTokenizer
from puna.tokenizer.sentencepiece import SentencePieceTokenizer

Target = Literal["huggingface", "meta", "gguf"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOKENIZER_FILES = (
    MODEL_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def convert(source: Path, out: Path, to: Target, form: str = "", shards: int = 1) -> None:
    """Write the checkpoint at `source` into `out` as `to`.

    `form` is the number format: F32, F16, BF16, and for GGUF any of its kinds; by default that of the source's matrices,
    or BF16 where these are quantised. `shards` is Meta's number of files. Needs the memory of the model in that format.
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
    model = load_checkpoint(source, DTYPES.get(form, torch.float32))
    if to == "gguf":
        write_gguf(model, _vocabulary(source, tokenizer), out, form)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        ours = None
        if isinstance(tokenizer, Tokenizer):
            ours = Path(scratch)
            write_ranks(ours / MODEL_FILE, tokenizer.ranks)
        if to == "meta":
            write_meta(model, ours, folder, shards=shards)
        else:
            save_model(model, ours, folder)
        if ours is None and source.is_dir():
            _copy_tokenizer(source, folder)


def write_folder_of(
    source: Path, config: LlamaConfig, out: Path, dtype: torch.dtype, extra: Mapping[str, Any] | None = None
) -> None:
    """Everything of a Hugging Face folder but the weights, with the tokenizer of the checkpoint at `source`, if it has one.

    `extra` is added to config.json. What cannot be carried along is said.
    """
    tokenizer = tokenizer_of(source)
    if isinstance(tokenizer, Tokenizer):
        with tempfile.TemporaryDirectory() as scratch:
            write_ranks(Path(scratch) / MODEL_FILE, tokenizer.ranks)
            write_folder(config, Path(scratch), out, dtype, extra)
        return
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos, "eos_token_id": sorted(tokenizer.stop_ids)}
    write_folder(config, None, out, dtype, ids | dict(extra or {}))
    if source.is_dir():
        _copy_tokenizer(source, out)
    elif tokenizer is not None:
        log.warn(f"the SentencePiece vocabulary inside {source} stays there: {out} will have no tokenizer of its own")


class replacing_folder:
    """A folder to write into that takes its name when all is well, and vanishes otherwise."""

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.folder.rename(self.out)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def _form_of(source: Path) -> str:
    with open_checkpoint(source) as opened:
        forms = {opened.weights.form(name) for name in opened.weights.names if name.endswith("proj.weight")}
    form = forms.pop() if len(forms) == 1 else ""
    return form if form in DTYPES else "BF16"


def tokenizer_of(source: Path) -> AnyTokenizer | None:
    """The source's tokenizer, or None if it has no file of one."""
    if source.is_dir() and not any((source / name).is_file() for name in _TOKENIZER_FILES[:2]):
        return None
    if source.is_file():
        with GgufFile(source) as file:
            if file.vocabulary().model == "no_vocab":
                return None
    return checkpoint_tokenizer(source)


def _vocabulary(source: Path, tokenizer: AnyTokenizer | None) -> Tokenizer | Vocabulary | None:
    """The tokenizer in GGUF's terms."""
    if source.is_file():
        with GgufFile(source) as file:
            return file.vocabulary()
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer
    return Vocabulary(
        model="llama",
        tokens=[piece.text for piece in tokenizer.pieces],
        scores=[piece.score for piece in tokenizer.pieces],
        types=[int(piece.kind) for piece in tokenizer.pieces],
        ids={"bos": tokenizer.bos, "eos": tokenizer.eos, "unknown": tokenizer.unk},
        add_bos=True,
    )


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            with replacing(out / name) as temporary:
                shutil.copyfile(source / name, temporary)
