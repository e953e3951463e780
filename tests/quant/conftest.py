import pytest
from small_checkpoint import make_checkpoint
from structured import write_all

from puna.artifacts import Artifact


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory) -> Artifact:
    return make_checkpoint({"tied": request.param, "seed": 0}, out=tmp_path_factory.mktemp("made") / "checkpoint")


@pytest.fixture(scope="session")
def structured(tmp_path_factory):
    """The folder of `structured.write_all`."""
    return write_all(tmp_path_factory.mktemp("structured"))


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def either(request, structured, tmp_path_factory):
    """Likewise, and one whose output is the embedding."""
    return write_all(tmp_path_factory.mktemp("tied"), tied=True) if request.param else structured
