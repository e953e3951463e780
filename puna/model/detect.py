"""What kind of model a path holds, told from names and first bytes, so that each goes to its reader.

    kind          looks like                                             read by
    puna          manifest.json of kind 'checkpoint'                     model.checkpoint.load_model
    quantised     config.json with our block of quantisation             quant.load_quantised
    huggingface   config.json, model.safetensors or its index            model.checkpoint.load_model
    meta          params.json, consolidated.00.pth, ...                  model.meta.load_meta
    gguf          a file that begins with the four letters GGUF          the reader of GGUF files

Nothing is guessed: a path that is none of these, or a folder that holds several models, is an error that lists what was
found and says what to give.
"""

import json
import os
from pathlib import Path
from typing import Literal

from puna import artifacts
from puna.errors import ArtifactError
from puna.model.folder import CONFIG, INDEX, QUANTISED, WEIGHTS, read_json
from puna.model.meta.params import PARAMS

Kind = Literal["puna", "huggingface", "meta", "gguf", "quantised"]

_GGUF = b"GGUF"
_FIRST_SHARD = "consolidated.00.pth"
_MOST_LISTED = 8
_ACCEPTED = (
    f"give a folder with {CONFIG} and {WEIGHTS} (or {INDEX}), a folder with {PARAMS} and {_FIRST_SHARD}, "
    "or a .gguf file"
)


def kind_of(path: Path | str) -> Kind:
    """The kind of model at `path`, a folder or a file.

    Raises `ArtifactError` if it is none: with what was found there, and what is accepted.
    """
    path = Path(path)
    if path.is_dir():
        return _kind_of_folder(path)
    if not os.path.lexists(path):
        raise ArtifactError(f"{path} does not exist", hint=f"check the spelling; {_ACCEPTED}")
    return _kind_of_file(path)


def _kind_of_file(path: Path) -> Kind:
    with artifacts.open_regular(path) as file:
        start = file.read(16)
    if start.startswith(_GGUF):
        return "gguf"
    if start.startswith(b"version https"):
        raise ArtifactError(f"{path} is a pointer that stands for a file", hint="fetch the file itself, with Git LFS")
    if path.suffix in (".safetensors", ".pth", ".json", ".model", ".bin"):
        raise ArtifactError(f"{path} is a part of a model", hint=f"give the folder it lies in: {path.parent}")
    what = "is empty" if not start else f"begins with the bytes {start[:4].hex(' ')}"
    raise ArtifactError(f"{path} is not a model: it {what}", hint=_ACCEPTED)


def _kind_of_folder(path: Path) -> Kind:
    if (path / artifacts.MANIFEST).is_file() or (path / artifacts.BEGUN).is_file():
        found = artifacts.load(path, "checkpoint", "quantised").kind
        return "quantised" if found == "quantised" else "puna"
    has_config, has_params = (path / CONFIG).is_file(), (path / PARAMS).is_file()
    if has_config and ((path / WEIGHTS).is_file() or (path / INDEX).is_file()):
        return "quantised" if QUANTISED in read_json(path, CONFIG) else "huggingface"
    if has_params and (path / _FIRST_SHARD).is_file():
        return "meta"
    raise _not_a_model(path, has_config, has_params)


def _not_a_model(path: Path, has_config: bool, has_params: bool) -> ArtifactError:
    try:
        names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
    except OSError as error:
        return ArtifactError(f"{path} cannot be read: {error.strerror}", hint="check its permissions")
    for name in {CONFIG, WEIGHTS, INDEX, PARAMS, _FIRST_SHARD} & {name.rstrip("/") for name in names}:
        artifacts.open_regular(path / name).close()  # a folder, a pipe or a broken link in place of a file is the fault
    gguf = [name for name in names if name.endswith(".gguf")]
    if has_config and any(name.endswith(".bin") for name in names):
        hint = f"weights in pytorch_model.bin are not read: fetch the model's {WEIGHTS}"
    elif has_config or has_params:
        hint = f"the weights are missing; {_ACCEPTED}"
    elif gguf:
        hint = f"give the file itself: {path / gguf[0]}"
    elif "original/" in names and (path / "original" / PARAMS).is_file():
        hint = f"give the folder {path / 'original'}"
    else:
        hint = _ACCEPTED
    listed = ", ".join(json.dumps(name[:60]) for name in names[:_MOST_LISTED]) or "nothing"
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ArtifactError(f"{path} is not a model; it holds {listed}{more}", hint=hint)
