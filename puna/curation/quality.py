"""Quality: a judge grades a sample, a small fast classifier learns from the grades and scores every document.

In the Llama 3 paper the judge is Llama 2 with a description of what is wanted, and the learner a DistilRoberta; here the
judge is any `Generator` and the learner a linear model over words (`classifier.py`). Where no earlier Llama exists, `HeuristicJudge` stands in: it reads the
same prompt and answers in the same words, but by counting. It is a stand-in, not a model: it knows shape, not sense.

How far the classifier follows its judge is measured on grades that it did not see: the area under the ROC curve, with
the interval of Hanley and McNeil (1982). Documents are kept by share, code and prose each on its own scale.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puna.chat import Completion, Continuation, Generator, Request, Sampling, assistant, user
from puna.config import require
from puna.errors import DataError

PROMPT = """Below is an extract from a document. Judge how much a language model would learn from it about language, facts, \
reasoning or programming.

5: clear, complete, explains or shows something worth knowing; 3: useful in part; 0: noise, boilerplate, lists or data \
without context.

<extract>
{extract}
</extract>

Answer with "Score: " and a whole number from 0 to 5, and nothing else."""
MODEL_FILE = "quality.safetensors"

_SCORE = re.compile(r"Score:\s*([0-5])\b")
_EXTRACT = re.compile(r"<extract>\n(.*)\n</extract>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What is graded, learned and kept."""

    keep_share: float = 0.9  # of the documents of code, and of prose; 1 scores without dropping
    graded_documents: int = 1200
    good_score: int = 3  # the least grade that counts as good
    extract_characters: int = 2000
    heldout_share: float = 0.3  # of the grades, kept from training to measure agreement
    min_grades: int = 100  # with fewer, nothing is learned and nothing dropped
    epochs: int = 5
    seed: int = 1

    def __post_init__(self) -> None:
        require(0 < self.keep_share <= 1, f"keep_share={self.keep_share} must be above 0 and at most 1")
        require(0 < self.heldout_share < 1, f"heldout_share={self.heldout_share} must be between 0 and 1")
        require(1 <= self.good_score <= 5, f"good_score={self.good_score} must be in 1..5")
        require(self.graded_documents >= 0, f"graded_documents={self.graded_documents} must not be negative")


class Judge:
    """Asks a generator for grades."""

    def __init__(self, generator: Generator):
        self.generator = generator

    def grade(self, extracts: Sequence[str]) -> list[int | None]:
        """A grade from 0 to 5 for each extract; None where the answer holds no score."""
        sampling = Sampling(max_tokens=8)
        requests = [Request(dialog=(user(PROMPT.format(extract=e)),), sampling=sampling) for e in extracts]
        answers = (_SCORE.search(completion.text) for completion in self.generator.generate(requests))
        return [int(match.group(1)) if match else None for match in answers]


class HeuristicJudge:
    """A `Generator` that answers the judge's prompt by counting, where no model exists yet.

    Prose earns points for sentences of ordinary length that end properly, for varied words and for paragraphs; code for
    comments and docstrings, functions of ordinary length and varied names. Digits, symbols and repeated lines cost.
    """

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """`Score: N` for each request."""
        answers = (
            self._answer(request.dialog[-1].content if request.dialog else request.prompt or "") for request in requests
        )
        return [Completion(message=assistant(a), text=a, finish_reason="stop") for a in answers]

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        """It always says the same, so its own answer has probability 1, and any other text 0."""
        asked = (c.dialog[-1].content if c.dialog else c.context for c in continuations)
        return [0.0 if c.text == self._answer(text) else -math.inf for c, text in zip(continuations, asked)]

    def _answer(self, prompt: str) -> str:
        match = _EXTRACT.search(prompt)
        return f"Score: {_grade(match.group(1) if match else prompt)}"


def _grade(text: str) -> int:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    words = re.findall(r"\w+", text)
    if len(words) < 30:
        return 0
    code = sum(line.endswith((":", "{", "}", ";", ")", ",")) for line in lines) > 0.4 * len(lines)
    points = _code_points(text, lines) if code else _prose_points(text, lines, words)
    letters = sum(c.isalpha() or c.isspace() for c in text) / len(text)
    points -= 2 * (letters < 0.6) + (letters < 0.7) + 2 * (len(set(lines)) < 0.7 * len(lines))
    return max(0, min(5, points))


def _prose_points(text: str, lines: list[str], words: list[str]) -> int:
    sentences = [s for s in re.split(r"[.!?。！？।]\s+|\n\n", text) if s.strip()]
    mean = len(words) / max(len(sentences), 1)
    variety = len({w.lower() for w in words[:200]}) / min(len(words), 200)
    ended = sum(line.endswith((".", "!", "?", ":", '"', "”", "。", "।")) for line in lines) / len(lines)
    explains = len(
        re.findall(r"\b(?:because|therefore|for example|e\.g\.|which|returns?|means|if|when|so that)\b", text, re.I)
    )
    return (8 <= mean <= 35) + (variety > 0.45) + (ended > 0.25) + (ended > 0.5) + (explains >= 4)


def _code_points(text: str, lines: list[str]) -> int:
    comments = sum(line.startswith(("#", "//", "*", "/*", '"""')) for line in lines) / len(lines)
    documented = len(re.findall(r'"""|/\*\*|\'\'\'', text)) >= 2
    defined = len(re.findall(r"^\s*(?:def|class|func|fn|public|private|static)\b", text, re.M))
    names = re.findall(r"[A-Za-z_]{2,}", text)
    variety = len(set(names[:200])) / max(min(len(names), 200), 1)
    return 2 * documented + (comments > 0.05) + (1 <= defined <= len(lines) / 4) + (variety > 0.35)


def auc(scores: Sequence[float], good: Sequence[bool]) -> tuple[float, float, float]:
    """The area under the ROC curve with its 95% interval: how often a good one scores above a bad one (ties half).

    Raises `DataError` unless both kinds are there.
    """
    values, labels = np.asarray(scores, dtype=float), np.asarray(good, dtype=bool)
    up, down = values[labels], values[~labels]
    if not (len(up) and len(down)):
        raise DataError("agreement needs good and bad examples", hint="grade more documents or change good_score")
    ordered = np.sort(down)
    wins = np.searchsorted(ordered, up, "left") + 0.5 * (
        np.searchsorted(ordered, up, "right") - np.searchsorted(ordered, up, "left")
    )
    area = float(wins.mean() / len(down))
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    variance = area * (1 - area) + (len(up) - 1) * (q1 - area**2) + (len(down) - 1) * (q2 - area**2)
    error = 1.96 * math.sqrt(max(variance, 0.0) / (len(up) * len(down)))
    return area, max(0.0, area - error), min(1.0, area + error)
