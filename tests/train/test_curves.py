"""TensorBoard's files of events: a run that went back is one curve all the same."""

import json
import struct

import pytest

from puna.train.resilience.curves import Curves, _checksum


def lines(*steps: int, **values) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 2, **values}) + "\n" for step in steps)


def records(folder):
    """The contents of all records of all files, in the order of their names; every checksum must be right."""
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = content[12 : 12 + length]
            assert content[8:12] == _checksum(content[:8])
            assert content[12 + length : 16 + length] == _checksum(event)
            yield event
            content = content[16 + length :]


def steps(folder) -> list[tuple[str, int]]:
    """(what, step) of each record: the session's start, or values."""
    found = []
    for event in records(folder):
        assert event[0] == 0x09
        if event[9] == 0x10:
            found.append(({0x3A: "start", 0x2A: "values"}[event[11]], event[10]))
    return found


def test_the_checksum_is_the_published_one():
    """RFC 3720, B.4: CRC-32C of 32 zeros is 0x8a9136aa; masked by TFRecord's rule."""
    (masked,) = struct.unpack("<I", _checksum(bytes(32)))
    turned = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (turned << 15 | turned >> 17) & 0xFFFFFFFF == 0x8A9136AA


def test_steps_that_are_made_again_take_the_place_of_the_old_ones(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(lines(1, 2, 3) + '{"step": 4, "lo')
    curves = Curves(tmp_path)
    curves.follow()
    curves.follow()
    assert steps(tmp_path) == [("start", 1), ("values", 1), ("values", 2), ("values", 3)]
    log.write_text(lines(1, 2) + lines(3, again=1) + lines(4))  # the run went back to step 2
    curves.follow()
    assert steps(tmp_path)[4:] == [("start", 1), *(("values", step) for step in (1, 2, 3, 4))]
    log.write_text(lines(1, 2) + lines(3, again=1) + lines(4, 5))
    curves.follow()
    assert steps(tmp_path)[9:] == [("values", 5)]


def test_tensorboard_reads_one_curve_through_a_restart_of_run_and_watcher(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = tmp_path / "metrics.jsonl"
    log.write_text(lines(1, 2, 3, 200, phase="main", lr=0.5))
    Curves(tmp_path).follow()
    log.write_text(lines(1, 2) + lines(3, 4, 5, lr=0.25))
    Curves(tmp_path).follow()
    found = reading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["loss", "lr"]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(s, s / 2) for s in (1, 2, 3, 4, 5)]
