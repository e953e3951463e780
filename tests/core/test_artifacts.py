"""Stages and their outputs: complete or not there, never done twice, never silently different, never silently damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from puna import artifacts
from puna.errors import ArtifactError, ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Config:
    text: str = "hello"


calls = []


@artifacts.stage("documents")
def shout(config, source, *, out):
    calls.append(out)
    (out / artifacts.WORK).mkdir(exist_ok=True)
    (out / artifacts.WORK / "scratch").write_text("x")
    (out / "text").write_text(config.text.upper())
    return {"length": len(config.text)}


@artifacts.stage("report")
def tell(config, texts, *, out):
    (out / "told").write_text(" ".join(t.file("text").read_text() for t in texts))
    return {}


def test_a_complete_stage_is_not_run_again(tmp_path):
    calls.clear()
    first = shout(Config(), None, out=tmp_path / "a")
    again = shout(Config(), None, out=tmp_path / "a")
    assert len(calls) == 1 and first.digest == again.digest and first.metrics == {"length": 5}
    assert not (tmp_path / "a" / artifacts.WORK).exists()


def test_what_somebody_watched_of_a_run_is_no_content(tmp_path):
    calm = shout(Config(), None, out=tmp_path / "calm")
    for folder in ("tensorboard", "faults"):
        (tmp_path / "watched" / folder).mkdir(parents=True)
    for name in ("watch.html", "tensorboard/events", "faults/plan.json", "ledger.jsonl"):
        (tmp_path / "watched" / name).write_text("before")
    watched = shout(Config(), None, out=tmp_path / "watched")
    assert watched.digest == calm.digest and list(watched.manifest["files"]) == ["text"]


def test_another_configuration_under_the_same_name_stops_and_shows_the_fields(tmp_path):
    shout(Config(), None, out=tmp_path / "a")
    with pytest.raises(ArtifactError) as error:
        shout(Config(text="bye"), None, out=tmp_path / "a")
    assert "config.text: 'hello' -> 'bye'" in str(error.value)


def test_another_input_under_the_same_name_stops(tmp_path):
    a, b = (shout(Config(text=t), None, out=tmp_path / t) for t in ("a", "b"))
    tell(Config(), [a], out=tmp_path / "told")
    with pytest.raises(ArtifactError, match="inputs"):
        tell(Config(), [b], out=tmp_path / "told")


def test_changed_raw_data_stops(tmp_path):
    raw = tmp_path / "raw.txt"
    raw.write_text("one")
    shout(Config(), raw, out=tmp_path / "a")
    raw.write_text("other")
    with pytest.raises(ArtifactError, match="inputs"):
        shout(Config(), raw, out=tmp_path / "a")


def test_missing_raw_data_is_said(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        shout(Config(), tmp_path / "nowhere", out=tmp_path / "a")


def test_an_interrupted_stage_is_no_artifact_and_runs_again(tmp_path):
    @artifacts.stage("documents")
    def fail(config, *, out):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(Config(), out=tmp_path / "a")
    with pytest.raises(ArtifactError, match="run the same command again"):
        artifacts.load(tmp_path / "a")


@pytest.mark.parametrize("there", [False, True])
def test_a_stage_that_refuses_its_settings_leaves_nothing_and_others_may_be_tried(tmp_path, there):
    @artifacts.stage("documents")
    def picky(config, *, out):
        (out / "half").write_text("x")
        if config.text == "kept":
            (out / artifacts.WORK).mkdir()
            (out / artifacts.WORK / "hours").write_text("x")
        if config.text != "good":
            raise ConfigError("no")
        (out / "half").unlink()
        return {}

    out = tmp_path / "a"
    if there:
        out.mkdir()
    with pytest.raises(ConfigError):
        picky(Config(text="bad"), out=out)
    assert list(tmp_path.iterdir()) == ([out] if there else []) and not list(out.glob("*"))
    picky(Config(text="good"), out=out)
    with pytest.raises(ConfigError):
        picky(Config(text="kept"), out=tmp_path / "b")
    assert (tmp_path / "b" / artifacts.WORK / "hours").is_file()


@pytest.mark.parametrize("place", [0, 2, -1])
def test_a_flipped_bit_is_found_before_the_file_is_read(tmp_path, place):
    made = shout(Config(), None, out=tmp_path / "a")
    path = tmp_path / "a" / "text"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))
    with pytest.raises(ArtifactError, match="damaged"):
        made.file("text")


def test_a_cut_file_a_missing_file_and_an_unknown_file_are_told_apart(tmp_path):
    made = shout(Config(), None, out=tmp_path / "a")
    with pytest.raises(ArtifactError, match="has no file 'txet'"):
        made.file("txet")
    (tmp_path / "a" / "text").write_text("HE")
    with pytest.raises(ArtifactError, match="has 2 bytes"):
        made.file("text")
    (tmp_path / "a" / "text").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        made.file("text")


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"kind": "report"}', "\xff"])
def test_a_broken_manifest_is_said(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifacts.load(tmp_path)


def test_the_wrong_kind_is_refused(tmp_path):
    shout(Config(), None, out=tmp_path / "a")
    with pytest.raises(ArtifactError, match="of kind 'documents'"):
        artifacts.load(tmp_path / "a", "checkpoint")


def test_lineage_leads_back_to_raw_data_and_survives_a_move(tmp_path):
    raw = tmp_path / "raw.txt"
    raw.write_text("one")
    a = shout(Config(), raw, out=tmp_path / "run" / "a")
    tell(Config(), [a], out=tmp_path / "run" / "b")
    (tmp_path / "run").rename(tmp_path / "moved")
    told = artifacts.load(tmp_path / "moved" / "b")
    found = [(role, parent.stage if parent else path) for _, role, path, parent in artifacts.ancestry(told)]
    assert found == [("texts", "shout"), ("source", str(raw))]


def test_identity_does_not_depend_on_time_place_or_measured_speed(tmp_path):
    @artifacts.stage("documents")
    def timed(config, *, out):
        (out / "metrics.jsonl").write_text(json.dumps({"seconds": time.perf_counter()}))
        return {"now": time.time()}

    assert timed(Config(), out=tmp_path / "a").digest == timed(Config(), out=tmp_path / "b").digest


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    artifacts.write_atomic(path, "old")
    with pytest.raises(RuntimeError), artifacts.replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_killed_while_writing_the_next_run_completes(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(os.getcwd())!r})
from dataclasses import dataclass
from pathlib import Path
from puna import artifacts
@dataclass(frozen=True, kw_only=True)
class C: n: int = 1
@artifacts.stage("documents")
def slow(config, *, out):
    (out / "part").write_text("x")
    print("in", flush=True)
    if len(sys.argv) > 1: time.sleep(60)
    (out / "whole").write_text("y")
    return {{}}
print(slow(C(), out=Path({str(tmp_path / "a")!r})).digest)
"""
    process = subprocess.Popen([sys.executable, "-c", script, "wait"], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert artifacts.load(tmp_path / "a").digest == done.stdout.split()[-1]
