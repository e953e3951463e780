import pytest

from puna.errors import ConfigError
from puna.planner.calibrate import measure, save
from puna.planner.hardware import device, devices


@pytest.mark.parametrize("name", ["mine.toml", "mine.json"])
def test_this_machine_is_measured_into_a_file_that_plans_take(tmp_path, name):
    path = tmp_path / name
    save({"other": {"like": "A100"}}, path)
    save(measure(seconds=0.05), path)
    found = device("here", path)
    assert found.matmul["fp32"] > 1e8 and found.read > 1e7
    assert "measured" in found.sources["matmul"]
    assert "other" in devices(path)  # what was there stays


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither JSON nor TOML"):
        save({}, tmp_path / "mine.yaml")
