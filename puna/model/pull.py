"""Fetch a checkpoint from the hub: resumable, checked, and only the files that are needed.

    pull("meta-llama/Llama-3.1-8B-Instruct", Path("models/Llama-3.1-8B-Instruct"))

The download itself is `huggingface_hub`'s, which continues where it stopped and heeds `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE`. Afterwards each file's size, and for large files the SHA-256 that the hub states, are compared with what
lies on the disk; a file that differs is removed, so that the next attempt fetches it again. Files that hold code or
pickles are not fetched, unless Meta's original folder is asked for, whose pickles are read by our own reader only.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna import log
from puna.errors import ConfigError, DataError, PunaError, shown

WANTED = ("*.safetensors", "*.json", "tokenizer.model", "LICENSE*", "USE_POLICY*", "README.md")
ORIGINAL = ("original/params.json", "original/*.pth", "original/tokenizer.model", "LICENSE*")
UNWANTED = ("original/*", "*.bin", "*.pt", "*.py", "onnx/*")
_BLOCK = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)  # an owner, or a model


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """What to fetch."""

    revision: str = "main"
    original: bool = False  # Meta's own folder instead of Hugging Face's files
    files: tuple[str, ...] = ()  # exactly these patterns (`*Q4_K_M.gguf`) instead
    check: bool = True  # compare hashes afterwards

    @property
    def patterns(self) -> tuple[list[str], list[str]]:
        """Patterns of files to fetch, and of files to leave."""
        if self.files:
            return list(self.files), []
        return (list(ORIGINAL), []) if self.original else (list(WANTED), list(UNWANTED))


def pull(name: str, out: Path, config: PullConfig | None = None) -> Path:
    """Fetch the model `name` (`owner/model`) into the folder `out`, and return the folder that holds the checkpoint.

    Raises `PunaError` where access is refused, nothing matches, the disk is too small, or the hub cannot be reached, and
    `DataError` where a file is not what the hub says it is.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    config = config or PullConfig()
    if name.count("/") != 1 or not all(map(_NAME.fullmatch, name.split("/"))) or "--" in name or ".." in name:
        raise ConfigError(f"{shown(name)} is not a model's name", hint="owner/model, as its page has it")
    wanted, unwanted = config.patterns
    with _explained(name, config.revision):
        if constants.is_offline_mode():
            found = snapshot_download(
                name, revision=config.revision, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=True
            )
            log.info(f"{name}: offline, taken from the cache and not checked")
            return Path(found) / ("original" if config.original else "")
        files = _listed(HfApi().model_info(name, revision=config.revision, files_metadata=True), wanted, unwanted)
        _room(name, files, out)
        snapshot_download(
            name, revision=config.revision, local_dir=out, allow_patterns=wanted, ignore_patterns=unwanted
        )
    if config.check:
        check(out, files)
    return out / "original" if config.original else out


@dataclass(frozen=True)
class Listed:
    """A file as the hub lists it; `sha256` is empty for small ones, which the hub keeps in git."""

    name: str
    size: int
    sha256: str


def _listed(info: Any, wanted: list[str], unwanted: list[str]) -> list[Listed]:
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects(
        info.siblings, allow_patterns=wanted, ignore_patterns=unwanted or None, key=lambda sibling: sibling.rfilename
    )
    files = [Listed(s.rfilename, s.size or 0, getattr(s.lfs, "sha256", "") or "" if s.lfs else "") for s in kept]
    if not files:
        there = ", ".join(sorted(s.rfilename for s in info.siblings)[:8]) or "nothing"
        raise PunaError(f"{info.id} has no file that matches {', '.join(wanted)}", hint=f"there are: {there}")
    return files


def _room(name: str, files: list[Listed], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    missing = sum(f.size for f in files if not (out / f.name).is_file())
    free = shutil.disk_usage(out).free
    if missing > free:
        hint = "free some space, or give another folder"
        raise PunaError(f"{name} needs {missing / 1e9:.1f} GB, {out} has {free / 1e9:.1f} GB left", hint=hint)


def check(folder: Path, files: list[Listed]) -> None:
    """Compare what lies in `folder` with the list; what differs is removed. Raises `DataError` naming it."""
    with log.progress("checking", sum(f.size for f in files), unit="bytes") as bar:
        for file in files:
            path = folder / file.name
            fault = _fault(path, file)
            if fault:
                path.unlink(missing_ok=True)
                raise DataError(f"{path}: {fault}", hint="the same command fetches it again")
            bar.advance(file.size)


def _fault(path: Path, listed: Listed) -> str:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != listed.size:
        return f"has {size:,} bytes, the hub says {listed.size:,}"
    if listed.sha256:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != listed.sha256:
            return f"has SHA-256 {digest.hexdigest()[:12]}…, the hub says {listed.sha256[:12]}…"
    return ""


@contextmanager
def _explained(name: str, revision: str) -> Iterator[None]:
    """The hub's errors as ours, with the next step."""
    from huggingface_hub import errors

    again = "check the network, HF_ENDPOINT and any proxy; the same command continues where it was"
    try:
        yield
    except errors.GatedRepoError:
        hint = "ask for access on the model's page, then log in with `hf auth login` or set HF_TOKEN"
        raise PunaError(f"{name} is gated, and this account may not fetch it", hint=hint) from None
    except errors.RepositoryNotFoundError:
        hint = "check the spelling; for a private model set HF_TOKEN"
        raise PunaError(f"{name}: there is no such model, or this account may not see it", hint=hint) from None
    except errors.RevisionNotFoundError:
        raise PunaError(
            f"{name} has no revision {revision!r}", hint="a branch, tag or commit; `main` by default"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        hint = "unset HF_HUB_OFFLINE, or fetch it once with a network"
        raise PunaError(
            f"{name} is not in the cache, and the hub cannot be asked: {_first(error)}", hint=hint
        ) from None
    except errors.HfHubHTTPError as error:
        raise PunaError(f"{name}: the hub refused: {_first(error)}", hint=again) from None
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's, which the command line explains
        raise PunaError(f"{name}: the hub cannot be reached: {_first(error)}", hint=again) from None
    except Exception as error:
        if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise PunaError(f"{name}: the hub cannot be reached: {_first(error)}", hint=again) from None
        raise


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
