"""Documents as shards on disk, and samples by number."""

import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puna import artifacts
from puna.artifacts import Artifact
from puna.errors import DataError
from puna.tokenizer.bpe import MODEL_FILE, Tokenizer, write_ranks
from puna.tokenizer.shards import TokeniseConfig, TokenShards, permuted, tokenise


@artifacts.stage("documents")
def written_documents(config, *, out):
    columns = {name: [row[name] for row in config["rows"]] for name in ("id", "text", "source", "url", "lang", "split")}
    pq.write_table(pa.table(columns), out / "documents.parquet", row_group_size=config["group"])


def documents_at(out, texts, group=4, heldout_every=5) -> Artifact:
    rows = [
        {
            "id": f"d{i}",
            "text": text,
            "source": f"source{i % 3}",
            "url": "",
            "lang": "en",
            "split": "heldout" if heldout_every and i % heldout_every == 0 else "train",
        }
        for i, text in enumerate(texts)
    ]
    return written_documents({"rows": rows, "group": group}, out=out)


@pytest.fixture
def texts(sentences) -> list[str]:
    return [sentence * (1 + i % 3) for i, sentence in enumerate(sentences * 3)] + [""]


@pytest.fixture
def tokenizer_artifact(tokenizer, tmp_path) -> Artifact:
    @artifacts.stage("tokenizer")
    def given_tokenizer(config, *, out):
        write_ranks(out / MODEL_FILE, tokenizer.ranks)

    return given_tokenizer({}, out=tmp_path / "tokenizer")


@pytest.fixture
def world(texts, tokenizer_artifact, tmp_path):
    documents = documents_at(tmp_path / "documents", texts)
    return documents, tokenizer_artifact


def files(artifact: Artifact) -> dict[str, str]:
    return {name: record["hash"] for name, record in artifact.manifest["files"].items()}


@pytest.mark.parametrize("shard_bytes", [1, 2500, 10**9])
def test_the_stream_is_the_documents_in_order(world, tokenizer, texts, tmp_path, shard_bytes):
    artifact = tokenise(TokeniseConfig(shard_bytes=shard_bytes), *world, out=tmp_path / "tokens")
    for split, wanted in (("train", lambda i: i % 5), ("heldout", lambda i: i % 5 == 0)):
        shards = TokenShards.load(artifact, split)
        expected = [t for i, t in enumerate(texts) if wanted(i)]
        kinds = [f"source{i % 3}" for i in range(len(texts)) if wanted(i)]
        assert shards.documents == len(expected)
        assert shards.bytes == sum(len(t.encode()) for t in expected)
        for i, (text, source) in enumerate(zip(expected, kinds)):
            document = shards.document(i)
            assert document.tokens.tolist() == [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
            assert (document.bytes, document.source) == (len(text.encode()), source)
        assert shards.tokens == sum(len(tokenizer.encode(t)) + 2 for t in expected)


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_a_sample_is_its_positions_of_the_stream(world, tmp_path, shard_bytes):
    shards = TokenShards.load(tokenise(TokeniseConfig(shard_bytes=shard_bytes), *world, out=tmp_path / "tokens"))
    stream = np.concatenate([shards.document(i).tokens for i in range(shards.documents)])
    owner = np.concatenate([np.full(len(shards.document(i).tokens), i) for i in range(shards.documents)])
    for length in (1, 7, 64, len(stream) - 1):
        assert shards.samples(length) == (len(stream) - 1) // length
        for index in range(shards.samples(length)):
            here = slice(index * length, (index + 1) * length + 1)
            ids, documents = shards.sample(index, length)
            assert ids.dtype == np.int64 and ids.tolist() == stream[here].tolist()
            assert documents.tolist() == (owner[here] - owner[here][0]).tolist()
        with pytest.raises(IndexError):
            shards.sample(shards.samples(length), length)


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order(world, tmp_path):
    shards = TokenShards.load(tokenise(TokeniseConfig(), *world, out=tmp_path / "tokens"))
    total = shards.samples(16)

    def epoch(number, seed):
        return [shards.shuffled(number * total + i, 16, seed)[0].tobytes() for i in range(total)]

    in_order = [shards.sample(i, 16)[0].tobytes() for i in range(total)]
    assert sorted(epoch(0, 1)) == sorted(epoch(1, 1)) == sorted(epoch(0, 2)) == sorted(in_order)
    assert len({tuple(o) for o in (in_order, epoch(0, 1), epoch(1, 1), epoch(0, 2))}) == 4
    assert epoch(3, 1) == epoch(3, 1)


@pytest.mark.parametrize("total", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_the_permutation_is_one(total):
    assert sorted(permuted(i, total, "a") for i in range(total)) == list(range(total))


def test_the_permutation_mixes():
    places = np.array([permuted(i, 10_000, "a") for i in range(10_000)])
    assert abs(np.corrcoef(places, np.arange(10_000))[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(places)) < 100) < 0.05


def test_the_permutation_of_a_huge_range_stays_inside():
    assert all(0 <= permuted(i, 10**12 + 39, "a") < 10**12 + 39 for i in range(1000))


def test_interrupted_anywhere_the_same_files_come_out(world, tmp_path, monkeypatch):
    config = TokeniseConfig(shard_bytes=1)
    undisturbed = files(tokenise(config, *world, out=tmp_path / "a"))
    real, left = artifacts.os.replace, 0

    def failing(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(source, target)

    for after in range(1, 12, 3):
        monkeypatch.setattr(artifacts.os, "replace", failing)
        left = after
        with pytest.raises(KeyboardInterrupt):
            tokenise(config, *world, out=tmp_path / "b")
        monkeypatch.setattr(artifacts.os, "replace", real)
    assert files(tokenise(config, *world, out=tmp_path / "b")) == undisturbed


def test_the_number_of_processors_changes_nothing(world, tmp_path, monkeypatch):
    one = tokenise(TokeniseConfig(), *world, out=tmp_path / "a")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert files(tokenise(TokeniseConfig(), *world, out=tmp_path / "b")) == files(one)


def test_a_large_vocabulary_takes_four_bytes(world, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", 70_000)
    artifact = tokenise(TokeniseConfig(), *world, out=tmp_path / "tokens")
    assert np.load(artifact.file("train-00000.tokens.npy")).dtype == np.uint32


def test_no_training_text_is_a_clear_error(tokenizer_artifact, tmp_path):
    documents = documents_at(tmp_path / "documents", ["a", "b"], heldout_every=1)
    with pytest.raises(DataError, match=r"no document in the split 'train'(.|\n)*hint"):
        tokenise(TokeniseConfig(), documents, tokenizer_artifact, out=tmp_path / "tokens")


def test_a_stream_shorter_than_a_sample_is_a_clear_error(world, tmp_path):
    shards = TokenShards.load(tokenise(TokeniseConfig(), *world, out=tmp_path / "tokens"))
    with pytest.raises(DataError, match="do not make one sample"):
        shards.shuffled(0, 10**6, 0)


def test_a_flipped_bit_is_found(world, tmp_path):
    artifact = tokenise(TokeniseConfig(), *world, out=tmp_path / "tokens")
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    path = copy / "train-00000.tokens.npy"
    data = bytearray(path.read_bytes())
    data[random.Random(1).randrange(200, len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(artifacts.ArtifactError, match="is damaged"):
        TokenShards.load(artifacts.load(copy))
