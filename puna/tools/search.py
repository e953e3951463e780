"""Search over a set of documents: BM25, the ranking that most search engines start from.

A document is cut into passages of whole sentences, and passages are what is ranked. With N passages, of which n(w)
contain the word w, and f(w, p) occurrences of w in passage p of length |p|:

    score(q, p) = sum over w in q of  ln(1 + (N - n(w) + 0.5) / (n(w) + 0.5)) * f * (k1 + 1) / (f + k1 * (1 - b + b * |p| / mean))

(Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", 3.) All of it but the sum is known when the index
is built, so it stores that product as one float32 per (word, passage) pair, sorted by word, and a query adds a few
slices. A title counts as words of every passage of its document, so that "Where was X born?" finds the passage that
says only "she".

The same documents give the same index, and equal scores are ordered by position.
"""

import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.config import require
from puna.tools.definition import Tool, ToolError

_CJK = "぀-ヿ㐀-䶿一-鿿豈-﫿"  # kana and Han, written without spaces: each character counts as a word
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How documents are cut and ranked."""

    passage_chars: int = 300
    k1: float = 1.2  # how soon further occurrences of a word stop counting
    b: float = 0.75  # how much a long passage is held against it, 0 to 1

    def __post_init__(self) -> None:
        require(self.passage_chars >= 20, f"passage_chars={self.passage_chars} must be at least 20")
        require(self.k1 >= 0, f"k1={self.k1} must not be negative")
        require(0 <= self.b <= 1, f"b={self.b} must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage that was found, with its document's title (or URL)."""

    title: str
    text: str
    score: float


class SearchIndex:
    """The index of a sequence of documents, each (title or URL, text)."""

    def __init__(self, documents: Iterable[tuple[str, str]], config: SearchConfig | None = None):
        config = config or SearchConfig()
        self.titles: list[str] = []  # of each document
        self.passages: list[str] = []
        document_of = array("i")
        self.vocabulary: dict[str, int] = {}
        words, ends = array("i"), array("q")  # the words of all passages, and where each passage's end
        for number, (title, text) in enumerate(documents):
            self.titles.append(title)
            head = self._numbered(title)
            for passage in cut(text, config.passage_chars):
                self.passages.append(passage)
                document_of.append(number)
                words.extend(head)
                words.extend(self._numbered(passage))
                ends.append(len(words))
        self.document_of = np.asarray(document_of, dtype=np.int32)
        self._weigh(np.asarray(words, dtype=np.int64), np.asarray(ends, dtype=np.int64), config)

    def __len__(self) -> int:
        """The number of passages."""
        return len(self.passages)

    def _numbered(self, text: str) -> list[int]:
        vocabulary = self.vocabulary
        return [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)]

    def _weigh(self, words: np.ndarray, ends: np.ndarray, config: SearchConfig) -> None:
        """Count, and fill `starts` (W + 1,), `postings` and `weights` (one per pair of word and passage)."""
        passages = len(ends)
        lengths = np.diff(ends, prepend=0)
        pairs = words * max(passages, 1) + np.repeat(np.arange(passages), lengths)
        pairs, counts = np.unique(pairs, return_counts=True)
        word, passage = np.divmod(pairs, max(passages, 1))
        containing = np.bincount(word, minlength=len(self.vocabulary))
        self.starts = np.concatenate([[0], np.cumsum(containing)])
        self.postings = passage.astype(np.int32)
        rarity = np.log1p((passages - containing + 0.5) / (containing + 0.5))
        relative = lengths / lengths.mean() if len(words) else lengths
        damping = config.k1 * (1 - config.b + config.b * relative)
        self.weights = (rarity[word] * counts * (config.k1 + 1) / (counts + damping[passage])).astype(np.float32)

    def search(self, query: str, count: int = 1) -> list[Hit]:
        """The `count` best passages, best first; fewer if fewer share a word with the query."""
        scores = np.zeros(len(self.passages), dtype=np.float32)
        for word in dict.fromkeys(words_of(query)):
            number = self.vocabulary.get(word)
            if number is not None:
                span = slice(self.starts[number], self.starts[number + 1])
                scores[self.postings[span]] += self.weights[span]  # a passage is there once per word
        found = np.flatnonzero(scores)
        best = found[np.argsort(-scores[found], kind="stable")[:count]]
        return [
            Hit(title=self.titles[self.document_of[i]], text=self.passages[i], score=float(scores[i])) for i in best
        ]


def words_of(text: str) -> list[str]:
    """What counts as a word: runs of letters, digits and underscores, in lower case; each Chinese or Japanese sign."""
    return _WORD.findall(text.casefold())


def cut(text: str, chars: int) -> list[str]:
    """Passages of at most `chars` characters: as many whole sentences as fit; a longer sentence is cut between words."""
    passages: list[str] = []
    current = ""
    for sentence in _SENTENCE_END.split(text):
        sentence = " ".join(sentence.split())
        if current and len(current) + 1 + len(sentence) > chars:
            passages.append(current)
            current = ""
        while len(sentence) > chars:
            piece = trim(sentence, chars)
            passages.append(piece)
            sentence = sentence[len(piece) :].lstrip()
        current = f"{current} {sentence}".strip()
    return [*passages, current] if current else passages


def trim(text: str, chars: int) -> str:
    """The beginning of a text, at most `chars` characters, ending with a whole word where there is one."""
    if len(text) <= chars:
        return text
    space = text.rfind(" ", 1, chars + 1)
    return text[: space if space > 0 else chars]


def search_tool(index: SearchIndex, *, passages: int = 1, chars: int = 300) -> Tool:
    """Llama's built-in `brave_search` over an index: the best passages, one a line, together at most `chars` long."""

    def function(arguments: dict[str, Any]) -> str:
        hits = index.search(arguments["query"], passages)
        if not hits:
            raise ToolError("nothing was found")
        return trim("\n".join(f"{hit.title}: {hit.text}" if hit.title else hit.text for hit in hits), chars)

    return Tool(
        name="brave_search",
        description="Searches the documents and returns the passages that match best.",
        parameters={
            "type": "object",
            "properties": {"query": {"type": "string", "description": "the words to look for"}},
            "required": ["query"],
        },
        function=function,
    )
