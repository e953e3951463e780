"""A small world of documents: sentences of invented words made from a seed, so that tests know what is a repeat of what."""

import json
import os
import random
from pathlib import Path

import pytest

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
FRAMES = [
    "The {} of {} lies near {}, and {} is older.",
    "When {} came to {}, nobody spoke of {} or {}.",
    "She saw that {} have {} with {}; it was {}.",
    "{} and {} may be {}, but to {} they are one.",
    "In spite of {}, {} sold the {} that {} made.",
    "Who remembers {}? Only {}, and {} with {}.",
    "After {} years {} left {} to find {}.",
    "It is said of {} that {} cannot {} before {}.",
]


def name(rng: random.Random) -> str:
    """A word that no other document is likely to have."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))


def sentence(rng: random.Random) -> str:
    return rng.choice(FRAMES).format(*(name(rng) for _ in range(4)))


def prose(seed: int, sentences: int = 12) -> str:
    """Prose that passes the rules and resembles no other seed's."""
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
