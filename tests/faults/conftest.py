import pytest
from faults_world import started


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A run without faults: its last weights are what every other run must end with."""
    out = tmp_path_factory.mktemp("undisturbed")
    status, _ = started(out).finish()
    assert status == 0
    return out
