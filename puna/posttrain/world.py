"""An invented world, drawn from a seed: what a small model can be taught, and tested on, without any doubt about what it
has read.

Real questions cannot tell knowing from guessing in a model this small, and real corpora cannot promise that an answer
was never in them. So people with made-up names get a home, a birth year and a job, and each person belongs to one group:

    known      their facts are in the pretraining text, as several short articles in four languages
    unknown    they are in no text at all: the right answer to any question about them is "I don't know."
    library    their facts are only in the index that the search tool reads: the answer must be looked up

and within the group to one part: `train` people may be asked about in training dialogues; `dev` people only when a
choice is made (which checkpoint, which threshold); `eval` people only in the final evaluation. A known person of the
eval part is thus read about in pretraining and never asked about before the evaluation.

All groups draw first and last names from the same two pools. Every name part of an unknown person also belongs to
known ones, so there is no surface cue, and no token, that tells the groups apart: only the pair does.

The world also owns the invented words: what constraints are about and what functions are called. They are divided among
the parts in the same way, and are pairs of syllables from a small inventory: `tolven`, `makril`. An evaluation word is
then new, but its syllables are not, and a byte-level vocabulary that has met them gives each one token. Of words made
of free letters it would make tokens such as `amo`, cut differently in each place, and copying them would be a matter
of spelling.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

from puna import config as configuration
from puna.artifacts import Artifact, stage, write_atomic
from puna.config import require
from puna.curation.documents import Document, write_documents
from puna.posttrain.languages import JOBS, LANGUAGES, RELATIONS, STATEMENTS, job_in

Group = Literal["known", "unknown", "library"]
Part = Literal["train", "dev", "eval"]
PARTS: tuple[Part, ...] = ("train", "dev", "eval")

ONSETS, VOWELS, CODAS = "bdfgklmnprstvz", "aeiou", "klmnrs"
PLACE_ENDINGS = ("mar", "dor", "vik", "stad", "lund", "berg")
# Real or rude words that two syllables can spell.
AVOID = ("dildos", "muslim", "person", "parson", "normal", "formal", "salmon", "sermon", "mammal", "kansas", "dallas")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How large the world is."""

    seed: int = 0
    # People in the pretraining text. Few people with many articles are known well, and their names are soon learnt by
    # heart, as a list of whom not to refuse; many people are needed to learn what knowing somebody is like.
    known: int = 160
    articles: int = 24  # about each of them
    unknown: int = 600  # people in no text; many, or a model learns the list of names to refuse
    library: int = 300  # people in the search index only
    first_names: int = 40
    last_names: int = 60
    places: int = 24
    years: int = 40  # birth years, from 1940
    syllables: int = 64  # that words are made of
    words: int = 1400  # invented words that constraints and one-liners are about
    functions: int = 1600  # invented names of functions
    train_share: float = 0.5  # of the people of each group
    dev_share: float = 0.1  # likewise; the rest is for evaluation

    def __post_init__(self) -> None:
        people = self.known + self.unknown + self.library
        room = self.first_names * self.last_names // 2
        require(
            people <= room,
            f"{people} people need more names: {self.first_names} first and {self.last_names} last names give {room}",
            hint="raise first_names or last_names",
        )
        least = len(LANGUAGES)
        require(self.articles >= least, f"articles={self.articles} must be at least {least}: one in each language")
        names = max(self.first_names, self.last_names)
        require(
            self.known >= names,
            f"known={self.known} people cannot bear {names} names, and a name that no known person has would be a cue",
            hint="lower first_names and last_names",
        )
        require(self.first_names <= 400, f"first_names={self.first_names} is above 400, which the syllables give")
        require(self.last_names <= 800, f"last_names={self.last_names} is above 800, which the syllables give")
        require(4 <= self.places <= 600, f"places={self.places} must be between 4 and 600")
        require(4 <= self.years <= 60, f"years={self.years} must be between 4 and 60")
        words = self.words + self.functions
        room = self.syllables * (self.syllables - 1) * 3 // 4
        require(words <= room, f"words + functions = {words} is above {room}", hint="raise syllables")
        require(
            min(self.train_share, self.dev_share) > 0 and self.train_share + self.dev_share < 1,
            f"train_share={self.train_share} and dev_share={self.dev_share} leave nothing for evaluation",
        )


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody who never was, and the three facts about them."""

    name: str
    group: Group
    part: Part
    place: str
    year: int
    job: str  # the English word; `languages.job_in` has the others

    def value(self, relation: str, language: str) -> str:
        """The value of one fact, as that language writes it."""
        return job_in(self.job, language) if relation == "job" else str(getattr(self, relation))

    def statement(self, relation: str, language: str, form: int = 0) -> str:
        """One fact as a sentence."""
        text = STATEMENTS[language][relation][form]
        return text.format(name=self.name, value=self.value(relation, language))


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that was drawn. `words` and `functions` are divided among the parts."""

    seed: int
    articles: int
    people: tuple[Person, ...]
    places: tuple[str, ...]
    years: tuple[int, ...]
    syllables: tuple[str, ...]
    words: dict[str, tuple[str, ...]]
    functions: dict[str, tuple[str, ...]]

    def of(self, group: Group, *parts: Part) -> tuple[Person, ...]:
        """The people of a group and, if given, of some parts."""
        return tuple(person for part in parts or PARTS for person in self._groups.get((group, part), ()))

    @cached_property
    def held_out(self) -> frozenset[str]:
        """The words and function names that no training text may contain."""
        return frozenset(w for pool in (self.words, self.functions) for part in ("dev", "eval") for w in pool[part])

    @cached_property
    def _groups(self) -> dict[tuple[str, str], list[Person]]:
        groups: dict[tuple[str, str], list[Person]] = {}
        for person in self.people:
            groups.setdefault((person.group, person.part), []).append(person)
        return groups

    def values(self, relation: str, language: str) -> tuple[str, ...]:
        """All values that a relation can take, as that language writes them."""
        if relation == "job":
            return tuple(job_in(job, language) for job in JOBS)
        return tuple(map(str, self.places if relation == "place" else self.years))


def make_world(config: WorldConfig) -> World:
    """Draw the world of `config`; the same configuration gives the same world."""
    syllables = _syllables(config)
    words = _words(config, syllables)
    places = _names(config, "places", config.places)
    years = tuple(range(1940, 1940 + config.years))
    return World(
        seed=config.seed,
        articles=config.articles,
        people=tuple(_people(config, places, years)),
        places=places,
        years=years,
        syllables=syllables,
        words=_divide(words[: config.words], config),
        functions=_divide(words[config.words : config.words + config.functions], config),
    )


def _random(config: WorldConfig, purpose: str) -> Random:
    return Random(f"world/{config.seed}/{purpose}")


def _syllables(config: WorldConfig) -> tuple[str, ...]:
    rng = _random(config, "syllables")
    return tuple(rng.sample([o + v + c for o in ONSETS for v in VOWELS for c in CODAS], config.syllables))


def _words(config: WorldConfig, syllables: Sequence[str]) -> list[str]:
    """All words of two different syllables, shuffled; none is another one backwards, which a task would give away."""
    spelt = {a + b for a in syllables for b in syllables if a != b}
    words = sorted(word for word in spelt if word[::-1] not in spelt and word not in AVOID)
    _random(config, "words").shuffle(words)
    return words


def _names(config: WorldConfig, kind: str, count: int) -> tuple[str, ...]:
    """Distinct capitalised names whose shape tells what they name: Karis (first), Tolvu (last), Palmar (place)."""
    rng = _random(config, kind)

    def open_syllable() -> str:
        return rng.choice(ONSETS) + rng.choice(VOWELS)

    names: dict[str, None] = {}
    while len(names) < count:
        if kind == "first":
            name = open_syllable() + open_syllable() + rng.choice(CODAS)
        elif kind == "last":
            name = open_syllable() + rng.choice(CODAS) + open_syllable()
        else:
            name = open_syllable() + rng.choice("lnr") + rng.choice(PLACE_ENDINGS)
        names[name.capitalize()] = None
    return tuple(names)


def _divide(things: Sequence[Any], config: WorldConfig) -> dict[str, tuple[Any, ...]]:
    """Train, dev and eval shares of something already shuffled. Words are cheap: four fifths are for training."""
    dev = round(len(things) * config.dev_share / 2)
    train = round(len(things) * 0.8)
    return {
        "train": tuple(things[:train]),
        "dev": tuple(things[train : train + dev]),
        "eval": tuple(things[train + dev :]),
    }


def _people(config: WorldConfig, places: Sequence[str], years: Sequence[int]) -> Iterator[Person]:
    first, last = _names(config, "first", config.first_names), _names(config, "last", config.last_names)
    rng = _random(config, "people")
    names = _pairs(first, last, rng)
    for group, count in (("known", config.known), ("unknown", config.unknown), ("library", config.library)):
        train, dev = round(count * config.train_share), round(count * config.dev_share)
        for index, name in enumerate(islice(names, count)):
            yield Person(
                name=name,
                group=group,
                part="train" if index < train else "dev" if index < train + dev else "eval",
                place=rng.choice(places),
                year=rng.choice(years),
                job=rng.choice(list(JOBS)),
            )


def _pairs(first: Sequence[str], last: Sequence[str], rng: Random) -> Iterator[str]:
    """Pairs, each once, in which all names come equally often: both are dealt from decks that hold each name once."""

    def dealt(names: Sequence[str]) -> Iterator[str]:
        while True:
            yield from rng.sample(names, len(names))

    taken = set()
    for pair in zip(dealt(first), dealt(last)):
        if pair not in taken:
            taken.add(pair)
            yield " ".join(pair)


# Language and statement form of a person's articles, in turn: English twice, in other words each time.
EDITIONS = (("en", 0), ("de", 0), ("fr", 0), ("es", 0), ("en", 1))


def documents(world: World) -> list[Document]:
    """The pretraining text: `articles` short articles about each known person, in the `EDITIONS` in turn.

    An article is the three facts, each time in another order: a fact that always follows another one is learnt as a
    part of it, and cannot be told alone (Allen-Zhu and Li 2023, "Physics of Language Models", 3.1). Each sentence
    stands on its own, with the full name.
    """
    rng = Random(f"world/{world.seed}/documents")
    articles = []
    for number, person in enumerate(world.of("known")):
        for edition in range(world.articles):
            language, form = EDITIONS[edition % len(EDITIONS)]
            relations = rng.sample(RELATIONS, k=len(RELATIONS))
            text = " ".join(person.statement(relation, language, form) for relation in relations)
            name = f"world/{number:05d}/{edition}-{language}"
            articles.append(Document(id=name, text=text + "\n", source="world", url="", lang=language, split="train"))
    rng.shuffle(articles)
    return articles


def library(world: World) -> list[str]:
    """What the search tool can find: an English article about each person of the library."""
    return [article(person) for person in world.of("library")]


def article(person: Person) -> str:
    """The three facts in English."""
    return " ".join(person.statement(relation, "en") for relation in RELATIONS)


@stage("documents")
def build_world(config: WorldConfig, *, out: Path) -> dict[str, Any]:
    """Draw the world: `documents.parquet`, its articles, and `world.json`, all of it, for `load_world`."""
    world = make_world(config)
    articles = documents(world)
    write_documents(out / "documents.parquet", articles)
    text = json.dumps(configuration.to_json(world), ensure_ascii=False, indent=0)
    write_atomic(out / "world.json", text)
    return {
        "documents": len(articles),
        "bytes": sum(len(article.text.encode()) for article in articles),
        "people": {group: len(world.of(group)) for group in ("known", "unknown", "library")},
        "facts": len(world.of("known")) * len(RELATIONS),
        "words": sum(map(len, world.words.values())),
        "functions": sum(map(len, world.functions.values())),
    }


def load_world(artifact: Artifact) -> World:
    """The world that `build_world` wrote. Raises `ArtifactError` if the artifact holds none."""
    data = json.loads(artifact.file("world.json").read_text())
    return World(
        seed=data["seed"],
        articles=data["articles"],
        people=tuple(Person(**person) for person in data["people"]),
        places=tuple(data["places"]),
        years=tuple(data["years"]),
        syllables=tuple(data["syllables"]),
        words={part: tuple(words) for part, words in data["words"].items()},
        functions={part: tuple(names) for part, names in data["functions"].items()},
    )
