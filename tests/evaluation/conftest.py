"""A small world: a byte tokenizer with a few merges, documents of two sources, and a generator that counts bytes."""

import math
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from puna import artifacts
from puna.chat import Completion, Continuation, Message, Request
from puna.tokenizer import Tokenizer

MERGES = [b"he", b"in", b"th", b"the", b" the", b"er", b"an", b"and"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer({**{bytes([i]): i for i in range(256)}, **{m: 256 + i for i, m in enumerate(MERGES)}})


@pytest.fixture
def tokenizer_artifact(tmp_path, tokenizer) -> artifacts.Artifact:
    import base64

    @artifacts.stage("tokenizer")
    def train_tokenizer(config, *, out):
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokenizer.ranks.items())
        artifacts.write_atomic(out / "tokenizer.model", "".join(lines))

    return train_tokenizer({}, out=tmp_path / "tokenizer")


@pytest.fixture
def make_documents(tmp_path):
    """Documents from rows `(id, text, source, split)`."""

    def make(rows: Sequence[tuple[str, str, str, str]], name: str = "documents") -> artifacts.Artifact:
        @artifacts.stage("documents")
        def curate(config, *, out):
            columns = dict(zip(("id", "text", "source", "split"), map(list, zip(*rows)))) if rows else {}
            schema = pa.schema([(c, pa.string()) for c in ("id", "text", "source", "split")])
            parquet.write_table(pa.table(columns or {c: [] for c in schema.names}, schema), out / "documents.parquet")

        return curate({}, out=tmp_path / name)

    return make


class UniformBytes:
    """A model for which every byte costs exactly 8 bits, except that it knows some texts by heart."""

    def __init__(self, certain: frozenset[str] = frozenset()):
        self.certain, self.asked = certain, []

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        self.asked += continuations
        return [0.0 if c.text in self.certain else -len(c.text.encode()) * math.log(256) for c in continuations]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [Completion(message=Message(role="assistant"), text="", finish_reason="stop") for _ in requests]


@pytest.fixture
def uniform() -> type[UniformBytes]:
    return UniformBytes
