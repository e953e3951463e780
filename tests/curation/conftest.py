"""A small world of documents: sentences made from a seed, so that tests know what is a repeat of what."""

import json
import os
import random
from pathlib import Path

import pytest

WORDS = [
    "river",
    "stone",
    "lantern",
    "orchard",
    "winter",
    "market",
    "signal",
    "harbour",
    "copper",
    "meadow",
    "engine",
    "letter",
    "canvas",
    "thunder",
    "garden",
    "bridge",
    "silver",
    "window",
    "forest",
    "painter",
    "captain",
    "village",
    "machine",
    "library",
    "mountain",
    "teacher",
    "island",
    "doctor",
    "theatre",
    "railway",
]
VERBS = [
    "carries",
    "follows",
    "reminds",
    "answers",
    "shelters",
    "repairs",
    "measures",
    "crosses",
    "remembers",
    "gathers",
    "paints",
    "explains",
]


def sentence(rng: random.Random) -> str:
    a, b, c, d = rng.choices(WORDS, k=4)
    number = rng.randrange(10**6)
    return f"The {a} of the {b} {rng.choice(VERBS)} a {c} that we have with the {d} of house {number}."


def prose(seed: int, sentences: int = 12) -> str:
    """English prose that passes the rules and resembles no other seed's."""
    rng = random.Random(seed)
    return "\n".join(" ".join(sentence(rng) for _ in range(3)) for _ in range(sentences // 3))


def write_jsonl(path: Path, texts: list[str], **fields: str) -> Path:
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return path


@pytest.fixture
def shared() -> Path:
    """The folder of real text, where there is one."""
    path = Path(os.environ.get("PUNA_SHARED", Path(__file__).parents[3] / "shared"))
    if not (path / "data").is_dir():
        pytest.skip("no shared data: set PUNA_SHARED to a folder with data/corpus and data/warc")
    return path
