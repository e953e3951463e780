"""The nouns: what each stage reads and writes.

A stage's output is a directory with a `manifest.json`, which is written last and atomically: where it is, the artifact
is complete. The manifest says what the thing is (`kind`), which stage made it from which configuration and inputs, and
the hash of every file, so that any result can be traced back to the raw data and a flipped bit is found.

A stage is a function `stage(config, *inputs, out) -> Artifact`. It is written as one that fills `out` and returns its
metrics, under the decorator `stage`, which keeps the promises:

    same config and inputs, complete     nothing is done, the artifact is returned
    same config and inputs, incomplete   the function runs again; it may continue from what it left in `out/work`
    another config or input              stops, and shows the fields that differ

Inputs are artifacts, lists of artifacts, or paths to raw data. Paths are given, never guessed.
"""

import functools
import inspect
import json
import os
import platform
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from puna import __version__, config
from puna.errors import ArtifactError, ConfigError, DataError

KINDS = [
    "documents",
    "tokenizer",
    "tokens",
    "checkpoint",
    "dialogs",
    "preferences",
    "quantised",
    "fit",
    "plan",
    "evaluation",
    "report",
]
MANIFEST = "manifest.json"
BEGUN = ".begun.json"
WORK = "work"
MEASUREMENTS = ("metrics.jsonl",)  # holds speeds, which differ from run to run: kept and hashed, but not identity
# What happened to a run, on purpose too, and what somebody watched of it, told after its end too: not content. A folder ends in "/".
JOURNALS = ("ledger.jsonl", "nodes.jsonl", "goodput.svg", "watch.html", "tensorboard/", "faults/")


@dataclass(frozen=True)
class Artifact:
    """A complete output of a stage. `file(name)` is the way to its content: it checks the hash before it is read."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest["config"]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]

    @property
    def digest(self) -> str:
        """Identity of the content: kind, stage, config, inputs and files; not of when or where it was made."""
        return self.manifest["digest"]

    def file(self, name: str) -> Path:
        """The path of one of the files, verified against the manifest once per process.

        Raises `ArtifactError` if the file is not part of the artifact, is missing, or was changed since.
        """
        record = self.manifest["files"].get(name)
        if record is None:
            names = ", ".join(sorted(self.manifest["files"])) or "none"
            raise ArtifactError(f"{self.path} has no file {name!r}", hint=f"its files are: {names}")
        path = self.path / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, though its manifest lists it", hint=_REMAKE)
        _verified(path, path.stat().st_mtime_ns, record["size"], record["hash"])
        return path


_REMAKE = "delete the directory and run the stage again, or restore it from a copy"


@functools.lru_cache(maxsize=4096)
def _verified(path: Path, _mtime_ns: int, size: int, digest: str) -> None:
    actual = path.stat().st_size
    if actual != size:
        raise ArtifactError(f"{path} has {actual:,} bytes, its manifest says {size:,}", hint=_REMAKE)
    if hash_file(path) != digest:
        raise ArtifactError(f"{path} is damaged: its content does not match the hash in the manifest", hint=_REMAKE)


def load(path: Path | str, *kinds: str) -> Artifact:
    """The artifact at `path`. Raises `ArtifactError` if there is none, or it is of none of `kinds` (any, if not given)."""
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist", hint="check the spelling; stages write where `out` says")
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        begun = (path / BEGUN).is_file()
        raise ArtifactError(
            f"{path} is not a complete artifact: it has no {MANIFEST}",
            hint="its stage was interrupted: run the same command again"
            if begun
            else "give a stage's output directory",
        )
    try:
        with open_regular(manifest_path) as file:
            manifest = json.loads(file.read().decode())
        artifact = Artifact(path, manifest)
        found, _ = artifact.kind, (artifact.stage, artifact.config, artifact.digest)
        if any(type(r["size"]) is not int or not isinstance(r["hash"], str) for r in manifest["files"].values()):
            raise ValueError("a file has no size and no hash")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{manifest_path} cannot be read: {error!r}", hint=_REMAKE) from None
    if kinds and found not in kinds:
        raise ArtifactError(f"{path} is of kind {found!r}", hint=f"this needs kind {' or '.join(map(repr, kinds))}")
    return artifact


Input = Artifact | Sequence[Artifact] | Path | None


def stage(kind: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., Artifact]]:
    """Make a stage of a function `f(config, *inputs, out) -> metrics` that fills the directory `out`.

    Files in `out/work` are the function's own scratch, kept across interruptions and removed on completion. A function
    that raises `ConfigError` or `DataError` before it has any leaves nothing behind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not one of the kinds {KINDS}")

    def decorate(function: Callable[..., dict[str, Any]]) -> Callable[..., Artifact]:
        roles = [p.name for p in inspect.signature(function).parameters.values() if p.name != "out"][1:]

        @functools.wraps(function)
        def run(settings: Any, *inputs: Input, out: Path | str) -> Artifact:
            out = Path(out)
            request = {
                "kind": kind,
                "stage": function.__name__,
                "config": config.to_json(settings, machine=False),
                "inputs": _describe(dict(zip(roles, inputs)), out),
            }
            if (out / MANIFEST).exists():
                artifact = load(out)
                _same(request, artifact.manifest, out)
                _sweep(out)
                return artifact
            there = out.is_dir()
            new = not there or not any(out.iterdir())
            out.mkdir(parents=True, exist_ok=True)
            if (out / BEGUN).exists():
                _same(request, _read_begun(out, request), out)
            else:
                write_atomic(out / BEGUN, json.dumps(request))
            started = time.time()
            try:
                metrics = function(settings, *inputs, out=out) or {}
            except (ConfigError, DataError):
                if new:
                    _withdraw(out, there)
                raise
            return _complete(out, request, metrics, started)

        return run

    return decorate


def _withdraw(out: Path, there: bool) -> None:
    """The stage cannot be with these settings or inputs: unless it has kept work, `out` is as it was (empty or not
    there)."""
    if not any(path.is_file() for path in (out / WORK).rglob("*")):
        shutil.rmtree(out)
        if there:
            out.mkdir()


def _read_begun(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads((out / BEGUN).read_text())
    except json.JSONDecodeError:
        return request


def _same(request: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    def identity(record: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {role: [i["digest"] for i in given] for role, given in record["inputs"].items()}
        return {
            "kind": record["kind"],
            "stage": record["stage"],
            "config": record["config"],
            "inputs": inputs,
        }

    lines = config.differences(identity(earlier), identity(request))
    if lines:
        shown = "\n  ".join(lines)
        raise ArtifactError(
            f"{out} was made with other settings or inputs:\n  {shown}",
            hint="choose another out=, or delete the directory to make it anew",
        )


def _complete(out: Path, request: dict[str, Any], metrics: dict[str, Any], started: float) -> Artifact:
    files = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        told = name in JOURNALS or f"{name.partition('/')[0]}/" in (*JOURNALS, f"{WORK}/")
        if name not in (MANIFEST, BEGUN) and not told and not name.endswith(".tmp"):
            files[name] = {"size": path.stat().st_size, "hash": hash_file(path)}
    inputs = {role: [i["digest"] for i in given] for role, given in request["inputs"].items()}
    content = {name: f["hash"] for name, f in files.items() if name not in MEASUREMENTS}
    identity = {**request, "inputs": inputs, "files": content}
    manifest = {
        **request,
        "digest": config.digest(identity),
        "files": files,
        "metrics": metrics,
        "code": code_revision(),
        "environment": environment(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.time() - started, 3),
    }
    write_atomic(out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    _sweep(out)
    return Artifact(out, manifest)


def _sweep(out: Path) -> None:
    """Remove what only an unfinished stage needs (again, if a kill came between the manifest and this)."""
    (out / BEGUN).unlink(missing_ok=True)
    shutil.rmtree(out / WORK, ignore_errors=True)


def _describe(inputs: Mapping[str, Input], out: Path) -> dict[str, list[dict[str, str]]]:
    """Role -> what was given: path (relative to `out` for artifacts, so that a run can be moved as a whole) and digest."""
    described: dict[str, list[dict[str, str]]] = {}
    for role, given in inputs.items():
        items = [] if given is None else [given] if isinstance(given, Artifact | Path) else list(given)
        described[role] = [
            {"path": os.path.relpath(i.path, out), "digest": i.digest}
            if isinstance(i, Artifact)
            else {"path": str(Path(i).resolve()), "digest": fingerprint(Path(i))}
            for i in items
        ]
    return described


def fingerprint(path: Path) -> str:
    """Identity of raw data by the names, sizes and change times of its files (not by content: it may be terabytes)."""
    if not path.exists():
        raise DataError(f"{path} does not exist", hint="give a file or a folder that exists")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    root = path if path.is_dir() else path.parent
    stats = ((p.relative_to(root).as_posix(), p.stat()) for p in files)
    return "raw:" + config.digest([[name, s.st_size, s.st_mtime_ns] for name, s in stats])


def ancestry(artifact: Artifact) -> Iterator[tuple[int, str, str, Artifact | None]]:
    """The lineage, depth first: (depth, role, path as recorded, the artifact or None if it is raw data or gone)."""

    def visit(node: Artifact, depth: int) -> Iterator[tuple[int, str, str, Artifact | None]]:
        for role, given in node.manifest["inputs"].items():
            for item in given:
                path = node.path / item["path"]
                parent = None
                if not item["digest"].startswith("raw:") and (path / MANIFEST).is_file():
                    parent = load(Path(os.path.normpath(path)))
                    if parent.digest != item["digest"]:
                        parent = None
                yield depth, role, item["path"], parent
                if parent is not None:
                    yield from visit(parent, depth + 1)

    yield from visit(artifact, 1)


def hash_file(path: Path) -> str:
    """The xxh3-128 hash of a file's content."""
    state = xxhash.xxh3_128()
    room = memoryview(bytearray(1 << 20))  # stays in the processor's cache
    with open_regular(path) as file:
        while count := file.raw.readinto(room):
            state.update(room[:count])
    return state.hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """The file at `path`, open for reading; links are followed, as the hub's cache is made of them.

    Raises `ArtifactError` for what cannot be read and for what is no file: a pipe would be waited for, a device has no end.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"{path} cannot be read: {why}", hint="check the name and its permissions") from None
    what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
    raise ArtifactError(f"{path} is {what}, not a file", hint="give what the model was published as: plain files")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` if all went well, removed if not."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole small file so that a reader sees the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)


def environment() -> dict[str, Any]:
    """What the machine is, for the manifest."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def code_revision() -> str:
    """The package's version and, in a git checkout, the commit (with `+` if files were changed since)."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return __version__
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__} {done.stdout.strip()}"
