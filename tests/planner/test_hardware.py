import dataclasses
import json

import pytest

from puna.errors import ConfigError
from puna.planner.hardware import Device, built_in, cluster, device, devices

NUMBERS = [f.name for f in dataclasses.fields(Device) if f.name not in ("name", "sources")]


@pytest.mark.parametrize("name", built_in())
def test_every_number_of_the_table_has_its_source(name):
    assert not [number for number in NUMBERS if not device(name).sources.get(number, "").strip()]


def test_the_machines_that_were_asked_for_are_there():
    assert {"H100", "H200", "A100", "B200", "CPU"} <= set(built_in())


def test_what_is_measured_is_below_the_data_sheet():
    for found in built_in().values():
        for precision, speed in found.matmul.items():
            assert speed <= found.peak[precision]


def test_a_count_and_a_name_in_any_case():
    assert cluster("16,384xh100")[0] == 16_384
    assert cluster("8 x A100")[1] is device("A100")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("laptop", "1xCPU"),
        ("0xH100", "1 to"),
        ("8xH10", "did you mean H100"),
        ("8xQ", "known"),
        ("8xV100", "known: H100"),
    ],
)
def test_what_is_no_machine_is_answered_with_what_is(text, hint):
    with pytest.raises(ConfigError) as error:
        cluster(text)
    assert hint in str(error.value)


def test_a_file_of_the_user_adds_a_machine_like_another(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[H900]\nlike = "H100"\nmemory_bytes = 1e12\n[H900.sources]\nmemory_bytes = "a dream"\n')
    found = device("h900", path)
    assert found.memory_bytes == 1e12
    assert found.matmul == device("H100").matmul
    assert found.sources["memory_bytes"] == "a dream" and found.sources["matmul"] == device("H100").sources["matmul"]


def test_the_same_in_json(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"H900": {"like": "A100", "node": 16}}))
    assert devices(path)["H900"].node == 16


@pytest.mark.parametrize(
    "text",
    ["not toml", "a = 1", '[X]\nlike = "nothing"', "[X]\nnode = 8", '[X]\nlike = "H100"\nspeed = 3', '[X]\nlike = "H100"\nread = -1'],
)  # fmt: skip
def test_a_wrong_file_is_a_message(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        devices(path)


def test_the_slowest_of_many_is_slower():
    found = device("H100")
    assert found.slowest(1) == 1.0
    assert 1.0 < found.slowest(8) < found.slowest(1024) < found.slowest(16_384) < 1.08


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": {"flash2": [1e12]}},
        {"attention": {"flash2": "fast"}},
        {"attention": 3},
        {"attention": {}},
        {"spread": "x"},
        {"spread": -50},
        {"comm_share": 99},
        {"link_latency_s": -1},
        {"matmul": {"bf16": "fast"}},
        {"matmul": [1]},
        {"peak": {"bf16": None}},
        {"sources": 3},
        {"sources": {"read": 4}},
        {"like": ["H100"]},
        {"node": 1.5},
        {"read": float("nan")},
    ],
    ids=str,
)
def test_a_hostile_file_is_told_what_is_wrong(tmp_path, fields):
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps({"X": {"like": "H100", **fields}}))
    with pytest.raises(ConfigError, match="hardware"):
        device("X", path)


@pytest.mark.parametrize("name", ["", "my box"])
def test_a_name_that_could_not_be_asked_for_is_refused(tmp_path, name):
    (tmp_path / "mine.json").write_text(json.dumps({name: {"like": "H100"}}))
    with pytest.raises(ConfigError, match="is no name"):
        devices(tmp_path / "mine.json")


def test_a_file_nested_too_deep_is_a_message(tmp_path):
    (tmp_path / "mine.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        devices(tmp_path / "mine.json")
