"""The embedded default corpus: the text that is on every machine with Python, without shipping or fetching any.

    python-stdlib       the standard library's modules
    python-tests        its tests, and those inside packages
    python-packages     the modules of the packages that are installed beside Puna
    python-docstrings   the long documentation strings of other modules of both, as prose
    documentation       the interpreter's help topics; packages' descriptions, guides, change logs and licences

It is real text with everything curation is for: licences a hundred times over, files that differ in a name, generated
tables, test data in strange encodings, prose in several languages. Which files there are depends on the installation;
given the installation, the choice is fixed: in each source the files are taken in the order of the hash of their path
until the source's part of `max_bytes` is full. A module gives its code or its docstrings, never both: the same hash
decides, so that no docstring is held out here and trained on there.
"""

import importlib.metadata
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import xxhash

from puna import log
from puna.curation.documents import Document
from puna.curation.readers import Fault, Item, ReaderConfig, document

PARTS = {
    "documentation": 0.15,
    "python-docstrings": 0.30,
    "python-packages": 0.25,
    "python-stdlib": 0.20,
    "python-tests": 0.10,
}
MAX_BYTES = 24_000_000
SAMPLE_BYTES, MIN_SAMPLE = 3_000_000, 200  # of a sample in all; characters of a document of it
READ = {".md", ".rst", ".txt", ".py"}
MIN_DOCSTRING, MIN_DOCSTRINGS = 300, 1000  # characters: of one that is taken, of all taken from a module

_DOCSTRING = re.compile(r'^[ \t]*[rRuU]?("""|\'\'\')(.*?)\1', re.MULTILINE | re.DOTALL)
_PASSED_OVER = {"site-packages", "dist-packages", "__pycache__"}
_OURS = re.compile(r"^(?:puna|__editable__)", re.IGNORECASE)


def read_embedded(config: ReaderConfig, *, max_bytes: int = MAX_BYTES) -> Iterator[Item]:
    """The embedded corpus, at most about `max_bytes` of it, sorted by source and path of the hash's choice."""
    with log.progress("reading", max_bytes, unit="bytes") as progress:
        files = _files()
        for source, part in PARTS.items():
            room = int(part * max_bytes)
            for item in _source(source, files, config):
                size = item.bytes if isinstance(item, Fault) else len(item.text.encode())
                room -= size
                progress.advance(size)
                yield item
                if room <= 0:
                    break


def embedded_sample(part: Literal["heldout", "calibration"], *, max_bytes: int = SAMPLE_BYTES) -> Iterator[Document]:
    """A small embedded corpus in two parts, to measure on and to calibrate with.

    A document belongs to one of the two by a hash of its text, so that copies stay together; a third is held out. `max_bytes` is of both together.
    """
    for item in read_embedded(ReaderConfig(), max_bytes=max_bytes):
        if isinstance(item, Fault) or len(item.text) < MIN_SAMPLE:
            continue
        if (_order(item.text) % 3 == 0) == (part == "heldout"):
            yield item


def _source(source: str, files: dict[str, Path], config: ReaderConfig) -> Iterator[Item]:
    if source == "documentation":
        yield from _topics(config)
        yield from _descriptions(config)
    for name in sorted(files, key=_order):
        if _belongs(name) == source:
            yield from _item(f"{source}/{name}", files[name], source, config)


def _order(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def _files() -> dict[str, Path]:
    """Every text file of the standard library and of the installed packages, by its path inside them."""
    paths = sysconfig.get_paths()
    found: dict[str, Path] = {}
    for place, root in (("stdlib", paths["stdlib"]), ("packages", paths["purelib"])):
        for folder, folders, files in os.walk(root):
            top = folder == root
            folders[:] = [f for f in folders if f not in _PASSED_OVER and f[0] != "." and not (top and _OURS.match(f))]
            inside = os.path.relpath(folder, root)
            for name in files:
                if os.path.splitext(name)[1] in READ and not (top and _OURS.match(name)):
                    found[Path(place, inside, name).as_posix()] = Path(folder, name)
    return found


def _belongs(name: str) -> str:
    """The source that a file goes to."""
    if not name.endswith(".py"):
        return "documentation" if not name.endswith((".dist-info/top_level.txt", "entry_points.txt")) else ""
    if _is_test(name):
        return "python-tests"
    if _order(f"docstrings of {name}") % 2:
        return "python-docstrings"
    return "python-stdlib" if name.startswith("stdlib/") else "python-packages"


def _is_test(name: str) -> bool:
    return any(part in ("test", "tests", "testing") or part.startswith("test_") for part in name.split("/"))


def _item(name: str, path: Path, source: str, config: ReaderConfig) -> Iterator[Item]:
    try:
        data = path.read_bytes()
        text = data.decode()
    except OSError as error:
        yield Fault(name, source, "file cannot be opened or read", 0, str(error.strerror or error))
        return
    except UnicodeDecodeError as error:
        yield Fault(name, source, "invalid UTF-8", len(data), f"byte {error.start:,}: 0x{data[error.start]:02x}")
        return
    if source == "python-docstrings":
        text, name = docstrings(text), f"{name}.rst"
        if len(text) < MIN_DOCSTRINGS:
            return
    yield document(name, text, source, "", config)


def docstrings(code: str) -> str:
    """The long documentation strings of a module, one after another, each paragraph once."""
    strings = (inspect.cleandoc(match.group(2)) for match in _DOCSTRING.finditer(code))
    seen: set[str] = set()
    parts = []
    for paragraphs in (s.split("\n\n") for s in strings if len(s) >= MIN_DOCSTRING):
        new = [p for p in dict.fromkeys(paragraphs) if p.strip() not in seen]
        seen.update(p.strip() for p in new)
        parts.append("\n\n".join(new))
    return "\n\n".join(part for part in parts if part.strip())


def _topics(config: ReaderConfig) -> Iterator[Item]:
    """What `help()` knows about the language itself."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield document(f"documentation/pydoc/{name}.rst", topics[name], "documentation", "", config)


def _descriptions(config: ReaderConfig) -> Iterator[Document | Fault]:
    """The long descriptions of the installed packages."""
    texts: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"] or ""
        text = package.metadata.get_payload()
        if name and not _OURS.match(name) and isinstance(text, str) and text.strip():
            texts[name.lower()] = text
    for name in sorted(texts):
        item = document(f"documentation/packages/{name}.md", texts[name], "documentation", "", config)
        if isinstance(item, Document) or item.reason != "empty text":
            yield item
