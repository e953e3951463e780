"""Texts to practise copying on.

Calling a tool is mostly copying: a name, two numbers, a word out of the question into the call, a result into the
answer. Transformers learn to copy suddenly, when a head that finds an earlier occurrence of the present token meets one
that knows what came before each token (Olsson et al. 2022, "In-context Learning and Induction Heads"), and on ordinary
text that takes far more than the two million tokens of the smallest recipe. Where everything has been said before, it
takes a few hundred thousand. So a part of the pretraining text looks like this, in words that mean nothing:

    tolven 45 dom                               a line three times: the form that makes copying start
    tolven makril dom; tolven makril dom        a list, said again
    "makril" = "45", "tolven" = "312". "tolven": "312"  a table, and a look into it
    tolven: TOLVEN, makril: MAKRIL, tolven: TOLVEN      capitals
    248 + 150 | 248 + 150                       numbers
    Domril comes from Palmar. ... Where does Domril come from? Domril comes from Palmar.

Words are drawn from all that the syllables can spell, but for those that evaluation is about; numbers from those of the
train part; the people in the last form have one name only and live nowhere else. No form is that of a task's dialogue.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from puna.artifacts import Artifact, stage
from puna.config import require
from puna.curation.documents import Document, write_documents
from puna.posttrain.languages import QUESTIONS, RELATIONS, STATEMENTS
from puna.posttrain.tasks.operands import operand
from puna.posttrain.world import AVOID, World, load_world

LINES = 4  # of one form per document


@dataclass(frozen=True, kw_only=True)
class PracticeConfig:
    """How much there is to practise, and of what."""

    documents: int = 9000
    plain_share: float = 0.5  # of the documents: the same line three times, the form with which copying starts
    plain_numbers: float = 0.3  # of the plain documents that have numbers among the words

    def __post_init__(self) -> None:
        require(self.documents > 0, f"documents={self.documents} must be positive")
        for name in ("plain_share", "plain_numbers"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must lie in 0..1")


@stage("documents")
def build_practice(config: PracticeConfig, world: Artifact, *, out: Path) -> dict[str, Any]:
    """Write `documents.parquet`: practice texts in the words of `world`, of the source `practice`."""
    texts = practice(load_world(world), config)
    write_documents(out / "documents.parquet", texts)
    return {"documents": len(texts), "bytes": sum(len(text.text.encode()) for text in texts)}


def practice(world: World, config: PracticeConfig) -> list[Document]:
    """The documents, each of one drawn form."""
    rng = Random(f"world/{world.seed}/practice/{config}")
    return [
        Document(id=f"practice/{number:05d}", text=_text(world, config, rng), source="practice", lang="und")
        for number in range(config.documents)
    ]


def _text(world: World, config: PracticeConfig, rng: Random) -> str:
    if rng.random() < config.plain_share:
        return again(world, config, rng)
    form = rng.choice(FORMS)
    return "".join(form(world, rng) + "\n" for _ in range(LINES))


def _word(world: World, rng: Random) -> str:
    """Two syllables, now and then one: a vocabulary that is trained on this text should learn what a syllable is."""
    while True:
        word = "".join(rng.sample(world.syllables, rng.choice((1, 2, 2, 2))))
        if word not in world.held_out and word not in AVOID:
            return word


def _words(world: World, rng: Random, count: int) -> list[str]:
    return [_word(world, rng) for _ in range(count)]


def _number(rng: Random) -> int:
    return operand(rng, "train", rng.choice((2, 3)))


def again(world: World, config: PracticeConfig, rng: Random) -> str:
    """A few words, numbers among them now and then, the very same line three times: the plainest thing to copy."""
    numbers = rng.random() < config.plain_numbers
    things = [
        str(_number(rng)) if numbers and rng.random() < 0.5 else _word(world, rng) for _ in range(rng.randint(2, 6))
    ]
    return f"{' '.join(things)}\n" * 3


def _list(world: World, rng: Random) -> str:
    words = _words(world, rng, rng.randint(2, 5))
    first, again = (rng.choice((" ", ", ", " and ")).join(words) for _ in range(2))
    return f"{first}; {again}"


def _repetition(world: World, rng: Random) -> str:
    word, times = _word(world, rng), rng.randint(2, 5)
    return f"{times} {word}: {' '.join([word] * times)}"


def _table(world: World, rng: Random) -> str:
    rows = {word: rng.choice((_word(world, rng), str(_number(rng)))) for word in _words(world, rng, rng.randint(2, 4))}
    asked = rng.sample(list(rows), len(rows))
    told = ", ".join(f'"{word}" = "{value}"' for word, value in rows.items())
    return f"{told}. " + ", ".join(f'"{word}": "{rows[word]}"' for word in asked)


def _capitals(world: World, rng: Random) -> str:
    words = _words(world, rng, rng.randint(2, 4))
    return ", ".join(f"{word}: {word.upper()}" for word in words + rng.sample(words, len(words)))


def _sums(world: World, rng: Random) -> str:
    numbers, sign = [str(_number(rng)) for _ in range(rng.randint(2, 3))], rng.choice((" + ", " - ", " * ", ", "))
    return f"{sign.join(numbers)} | {rng.choice((sign, ', ')).join(numbers)}"


def _people(world: World, rng: Random) -> str:
    name = _word(world, rng).capitalize()
    values = {relation: rng.choice(world.values(relation, "en")) for relation in RELATIONS}
    said = {r: STATEMENTS["en"][r][0].format(name=name, value=values[r]) for r in RELATIONS}
    told = " ".join(said[relation] for relation in rng.sample(RELATIONS, len(RELATIONS)))
    asked = rng.choice(RELATIONS)
    return f"{told} {rng.choice(QUESTIONS['en'][asked]).format(name=name)} {said[asked]}"


FORMS: tuple[Callable[[World, Random], str], ...] = (_list, _repetition, _table, _capitals, _sums, _people)
