"""The verbs of the command line on checkpoints that are broken, and on disks that are full: one message, nothing half done."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken import BROKEN, CONFIG, sound

from puna.cli import main
from puna.model.checkpoint import save_model
from puna.model.llama import Llama
from puna.model.opening import load_checkpoint
from puna.model.verify import VerifyConfig, compare

ROOT = Path(__file__).parents[2]
TARGETS = {"huggingface": "made", "meta": "made", "gguf": "made.gguf"}
# Those whose harm takes long to make, or memory, are left to test_checkpoint_hostile.
CASES = [name for name in BROKEN if "million" not in name and "MB" not in name and "empty lines" not in name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return sound(tmp_path_factory.mktemp("whole") / "checkpoint")


@pytest.mark.parametrize("name", CASES)
def test_every_verb_says_what_is_wrong_in_two_lines(tmp_path, capsys, whole, name):
    case, path = BROKEN[name], Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    case.harm(path)
    verbs = [["convert", path, tmp_path / out, "--to", to] for to, out in TARGETS.items()]
    if not case.tokenizer:
        verbs += [["inspect", path], ["inspect", path, "--json"], ["verify", path, whole], ["verify", whole, path]]
    before = sorted(tmp_path.iterdir())
    for verb in verbs:
        code = main([str(word) for word in verb])
        told = capsys.readouterr()
        assert code in (1, 2, 3, 4, 5, 6) and told.out == ""
        assert re.fullmatch(r"error: [^\n]+\nhint: [^\n]+\n", told.err), told.err
        assert str(path) in told.err
    assert sorted(tmp_path.iterdir()) == before


def puna(*words: object, before: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own, after the statements `before`."""
    program = f"import sys; from puna.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, *map(os.fspath, words)], capture_output=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("to", TARGETS)
def test_a_conversion_that_cannot_write_leaves_nothing_and_works_afterwards(tmp_path, capsys, to):
    path, out = sound(tmp_path / "checkpoint"), tmp_path / TARGETS[to]
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, free[1]))  # in bytes; the weights have 123,000
    try:
        code = main(["convert", str(path), str(out), "--to", to])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert code == 6 and re.fullmatch(r"error: [^\n]+\nhint: [^\n]+\n", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert main(["convert", str(path), str(out), "--to", to]) == 0
    assert torch.equal(load_checkpoint(out).norm.weight, load_checkpoint(path).norm.weight)


KILL_AT_RENAME = """
import os, pathlib
pathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("to", ["huggingface", "gguf"])
def test_a_conversion_that_is_killed_leaves_no_result_and_works_afterwards(tmp_path, to):
    path, out = sound(tmp_path / "checkpoint"), tmp_path / TARGETS[to]
    assert puna("convert", path, out, "--to", to, before=KILL_AT_RENAME).returncode == -9
    assert not out.exists() and len(list(tmp_path.iterdir())) == 2  # with what was written so far, under a hidden name
    assert main(["convert", str(path), str(out), "--to", to]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", out.name]
    assert compare(load_checkpoint(out), load_checkpoint(path), VerifyConfig()).same


def test_a_name_that_is_no_text_is_printed_and_an_endless_one_refused(tmp_path, capsys):
    path = sound(tmp_path / "checkpoint")
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.move(path, strange)
    done = puna("inspect", strange)
    assert done.returncode == 0 and b"a Llama of a size of its own" in done.stdout, done.stderr
    for verb in (["inspect", "a" * 5000], ["convert", str(strange), str(tmp_path / ("a" * 5000)), "--to", "gguf"]):
        assert main(verb) in (3, 6)
        assert re.fullmatch(r"error: [^\n]+\nhint: [^\n]+\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "record", ['{"model": "../../elsewhere"}', '{"model": "/etc"}', '{"model": 5}', "{}", "[", "5"]
)
def test_a_runs_record_that_leads_elsewhere_is_refused(tmp_path, capsys, record):
    (tmp_path / "run.json").write_text(record)
    assert main(["inspect", str(tmp_path)]) == 3
    assert "does not name the run's model" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", ["5", "[]", '{"kind": "checkpoint"}', "[" * 100_000, "\x00",
    '{"kind":"checkpoint","stage":"s","config":{},"digest":"d","files":[]}',
    '{"kind":"checkpoint","stage":"s","config":{},"digest":"d","files":{"config.json":5}}',
    '{"kind":"checkpoint","stage":"s","config":{},"digest":"d","files":{"config.json":{"size":"1","hash":2}}}',
])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(tmp_path, capsys, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    assert main(["inspect", str(tmp_path)]) == 3
    assert "manifest.json cannot be read" in capsys.readouterr().err


def test_what_is_not_a_number_is_not_the_same(tmp_path, capsys):
    model = Llama(CONFIG).init_weights(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model(model, None, tmp_path / name)
        with torch.no_grad():
            model.layers[1].feed_forward.w2.weight[0, 0] = float("nan")
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "the first difference above 0.001 is at layer 2" in capsys.readouterr().out


def test_a_model_for_which_there_is_no_memory_is_a_message(tmp_path, capsys, monkeypatch):
    path = sound(tmp_path / "checkpoint")

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:123] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Llama, "to_empty", no_memory)
    assert main(["verify", str(path), str(path)]) == 1
    assert "there is no memory for a model of" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "streamed"), "--to", "meta"]) == 0  # never has the model whole

    def no_pages(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("puna.model.folder._PIECE_BYTES", 64)  # a row at a time
    monkeypatch.setattr("mmap.mmap", no_pages)
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "meta"]) == 1
    assert "there is no memory for a tensor of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
