import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.artifacts import hash_file
from puna.curation.curate import CurationConfig, curate, curate_with, kinship
from puna.curation.documents import read_documents
from puna.curation.duplicates import jaccard
from puna.curation.filters import FilterConfig
from puna.curation.quality import HeuristicJudge, QualityConfig
from puna.curation.words import shingles, words_of
from puna.errors import ConfigError, DataError

from .conftest import prose, write_jsonl

CONFIG = CurationConfig(quality=QualityConfig(min_grades=20, good_score=2))


class ByLetter(HeuristicJudge):
    """Grades documents by their first letter: nothing to do with quality, but both grades occur."""

    def generate(self, requests):
        extracts = [request.dialog[-1].content.split("<extract>\n")[1] for request in requests]
        return [replace(c, text=f"Score: {5 if e < 'S' else 0}") for c, e in zip(super().generate(requests), extracts)]


def ledger(artifact):
    return pq.read_table(artifact.file("ledger.parquet")).to_pylist()


def mixed_texts():
    """Good documents, and one at least for most reasons to drop or change one."""
    texts = [prose(seed, 60) for seed in range(120)]
    texts += texts[:5] + [f"{t} And one word more." for t in texts[5:10]]
    texts += ["short", "", prose(500, 3) * 8, f"{prose(501)} Lorem ipsum dolor."]
    texts += [f"{prose(seed, 30)}\nThis footer is on every page of the site." for seed in range(600, 610)]
    texts += [f"{prose(700, 30)}\nWrite to jane.doe@mail.uni-hamburg.de or call +49 40 42838 1234."]
    return texts + [f"{prose(seed)}\n{'12 34 56 78 ' * 4}" for seed in range(800, 810)]


@pytest.fixture
def pages(tmp_path):
    write_jsonl(tmp_path / "pages.jsonl", mixed_texts())
    with (tmp_path / "pages.jsonl").open("a") as file:
        file.write("not json\n")
    return tmp_path / "pages.jsonl"


def test_curation_keeps_the_good_and_says_why_the_rest_went(pages, tmp_path):
    artifact = curate_with(ByLetter())(replace(CONFIG, judge="by letter"), pages, out=tmp_path / "out")
    documents, rows, metrics = list(read_documents(artifact)), ledger(artifact), artifact.metrics
    reasons = Counter(row["reason"] for row in rows if row["decision"] == "dropped")
    expected = {"exact duplicate": 5, "near-duplicate": 5, "too few words": 1, "empty text": 1, "broken JSON": 1}
    assert expected.items() <= reasons.items() and {"C4: lorem ipsum", "Gopher: repetition"} <= reasons.keys()
    assert metrics["read"]["documents"] == len(rows) == len(mixed_texts()) + 1
    assert metrics["kept"]["documents"] == len(documents)
    assert metrics["kept"]["bytes"] == sum(len(d.text.encode()) for d in documents)
    assert {r: v["documents"] for r, v in metrics["dropped"].items()} == reasons
    assert metrics["pii"] == {"email": 1, "phone": 1}
    assert not any("This footer is on every page" in d.text or "jane.doe" in d.text for d in documents)
    assert metrics["quality"]["classifier"]["heldout_grades"] > 0 and artifact.file("quality.safetensors")
    assert all(row["score"] is not None for row in rows if row["decision"] != "dropped")
    assert json.loads(json.dumps(metrics)) == metrics and "seconds" not in metrics


def test_near_duplicates_name_the_document_that_stays_and_the_similarity(pages, tmp_path):
    artifact = curate(replace(CONFIG, quality=QualityConfig(keep_share=1.0)), pages, out=tmp_path / "out")
    kept = {d.id for d in read_documents(artifact)}
    for row in ledger(artifact):
        if row["reason"] == "near-duplicate":
            name, _, similarity = row["evidence"].partition(" (Jaccard ")
            assert name in kept and float(similarity.rstrip(")")) >= 0.8


def test_held_out_documents_are_some_and_unlike_all_others(pages, tmp_path):
    artifact = curate(replace(CONFIG, heldout_share=0.1), pages, out=tmp_path / "out")
    grams = {d.id: shingles(words_of(d.text).hashes, 5) for d in read_documents(artifact)}
    heldout = [d.id for d in read_documents(artifact, "heldout")]
    train = [d.id for d in read_documents(artifact, "train")]
    assert 1 <= len(heldout) < len(train) and len(heldout) + len(train) == len(grams)
    assert all(jaccard(grams[h], grams[t]) < 0.8 for h in heldout for t in train)


GARBAGE = st.sampled_from(
    ["", "x", "{", "\ud800", "\0", prose(1), prose(2), prose(3) + " more", "1 2 3 " * 50, "def f(): pass\n" * 9]
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(GARBAGE, st.text(max_size=60)), max_size=12), st.binary(max_size=60))
def test_every_document_that_is_read_is_in_the_ledger_exactly_once(tmp_path_factory, texts, junk):
    folder = tmp_path_factory.mktemp("in")
    write_jsonl(folder / "a.jsonl", [prose(8), prose(9), *texts])
    (folder / "junk.txt").write_bytes(junk)
    artifact = curate(CONFIG, folder, out=folder.with_name(f"{folder.name}-out"))
    rows = ledger(artifact)
    lines = 2 + len(texts)
    names = [row["id"] for row in rows]
    assert len(set(names)) == len(names)
    assert {f"a.jsonl:{n}" for n in range(lines)} <= set(names) <= {f"a.jsonl:{n}" for n in range(lines)} | {"junk.txt"}
    kept = [row["id"] for row in rows if row["decision"] != "dropped"]
    assert kept == [d.id for d in read_documents(artifact)]
    assert all(row["reason"] and row["step"] for row in rows if row["decision"] == "dropped")


def test_what_stays_does_not_depend_on_the_order_of_reading(tmp_path):
    texts = [prose(seed, 60) for seed in range(30)]
    texts += [f"{text} And {n} more words." for n, text in enumerate(texts[:10])]
    kept = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", order)
        artifact = curate(replace(CONFIG, quality=QualityConfig(keep_share=1.0)), path, out=tmp_path / name)
        kept.append(sorted((d.text, d.split) for d in read_documents(artifact)))
    assert kept[0] == kept[1]


def test_what_belongs_together_is_held_out_together(tmp_path):
    folder = tmp_path / "in"
    for place in range(60):
        (folder / f"place{place}").mkdir(parents=True)
        for page in range(2):
            (folder / f"place{place}" / f"{page}.txt").write_text(prose(100 * place + page, 60))
    artifact = curate(replace(CONFIG, heldout_share=0.2), folder, out=tmp_path / "out")
    splits = {}
    for document in read_documents(artifact):
        splits.setdefault(document.id.split("/")[-2], set()).add(document.split)
    assert {len(found) for found in splits.values()} == {1}
    assert 4 <= sum(found == {"heldout"} for found in splits.values()) <= 25


@pytest.mark.parametrize(
    ("id", "url", "expected"),
    [
        ("python-stdlib/stdlib/asyncio/base.py", "", ("stdlib/asyncio", "python-stdlib/stdlib/asyncio/base.py")),
        ("python-docstrings/packages/x/y.py.rst:3", "", ("packages/x", "python-docstrings/packages/x/y.py.rst")),
        ("crawl.warc.gz:17", "https://example.org/a/b?c", ("example.org", "crawl.warc.gz")),
        ("tales.jsonl:4", "", ("tales.jsonl", "tales.jsonl")),
    ],
)
def test_a_document_belongs_to_its_host_or_folder_and_its_file(id, url, expected):
    assert kinship(id, url) == expected


def test_the_same_pages_give_the_same_bytes(pages, tmp_path):
    runs = [curate(CONFIG, pages, out=tmp_path / name) for name in ("a", "b")]
    assert runs[0].manifest["files"] == runs[1].manifest["files"] and runs[0].metrics == runs[1].metrics


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from curation.test_curate import CONFIG
from puna.curation.curate import curate
curate(CONFIG, Path(sys.argv[1]), out=Path(sys.argv[2]))
"""


def test_killed_at_any_moment_and_run_again_the_result_is_the_same(tmp_path):
    pages = write_jsonl(tmp_path / "pages.jsonl", [t for _ in range(3) for t in mixed_texts()])
    whole = curate(CONFIG, pages, out=tmp_path / "whole")
    tests = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", RUN, str(pages), str(tmp_path / "killed"), tests]
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=os.path.dirname(tests))
        while process.poll() is None and not (tmp_path / "killed" / "work").is_dir():
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = curate(CONFIG, pages, out=tmp_path / "killed")
    assert again.manifest["files"] == whole.manifest["files"]
    assert not (tmp_path / "killed" / "work").exists()


def test_too_little_to_train_and_hold_out_is_a_clear_error(tmp_path):
    write_jsonl(tmp_path / "one.jsonl", [prose(1)])
    write_jsonl(tmp_path / "bad.jsonl", ["short", "too short", ""])
    write_jsonl(tmp_path / "none.jsonl", [])
    for name in ("one", "bad", "none"):
        with pytest.raises(DataError, match="two are needed") as error:
            curate(CONFIG, tmp_path / f"{name}.jsonl", out=tmp_path / name)
        assert error.value.hint and not (tmp_path / name / "manifest.json").exists()
    assert (
        len(
            list(
                read_documents(
                    curate(CONFIG, write_jsonl(tmp_path / "two.jsonl", [prose(1), prose(2)]), out=tmp_path / "two")
                )
            )
        )
        == 2
    )


def test_one_long_text_file_is_corpus_enough(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(prose(seed, 90) for seed in range(40)))
    artifact = curate(CONFIG, tmp_path / "book.txt", out=tmp_path / "out")
    assert artifact.metrics["kept"]["documents"] >= 2 and artifact.metrics["heldout"]["documents"] >= 1


def test_only_wanted_languages_and_domains_stay(tmp_path):
    german = " ".join(
        f"Der Fluss Nummer {n} fließt durch das Dorf, in dem die Handwerker {n * n} wohnen." for n in range(12)
    )
    write_jsonl(tmp_path / "a.jsonl", [prose(1), prose(2), german])
    write_jsonl(tmp_path / "b.jsonl", [prose(3)], url="https://www.bad.org/page")
    config = replace(CONFIG, languages=("en",), filters=FilterConfig(blocked_domains=("bad.org",)))
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "in" / f"{name}.jsonl")
    artifact = curate(config, tmp_path / "in", out=tmp_path / "out")
    reasons = {row["id"]: row["reason"] for row in ledger(artifact)}
    assert reasons["a.jsonl:2"] == "language is not wanted" and reasons["b.jsonl:0"] == "URL on the block list"


def test_another_judge_is_used_and_named(pages, tmp_path):
    class Strict(HeuristicJudge):
        def generate(self, requests):
            return [replace(c, text="Score: 0") for c in super().generate(requests)]

    artifact = curate_with(Strict())(replace(CONFIG, judge="strict"), pages, out=tmp_path / "out")
    assert artifact.config["judge"] == "strict" and artifact.metrics["quality"]["grades"].keys() == {"0"}
    assert artifact.metrics["quality"]["classifier"] is None
    with pytest.raises(ConfigError, match="strict"):
        curate(replace(CONFIG, judge="strict"), pages, out=tmp_path / "other")


def test_the_embedded_corpus_names_its_sources_and_leaves_puna_out(tmp_path):
    config = CurationConfig(embedded_bytes=1_500_000)
    artifact = curate(config, None, out=tmp_path / "out")
    sources = artifact.metrics["sources"]
    assert {"documentation", "python-docstrings", "python-packages", "python-stdlib", "python-tests"} == set(sources)
    assert sum(s["read_bytes"] for s in sources.values()) < 3 * config.embedded_bytes
    assert not any("/puna" in row["id"] for row in ledger(artifact))
    assert artifact.metrics["quality"]["classifier"]["auc"] > 0.5
    again = curate(config, None, out=tmp_path / "again")
    assert hash_file(artifact.file("documents.parquet")) == hash_file(again.file("documents.parquet"))
