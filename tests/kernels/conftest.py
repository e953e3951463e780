import pytest

from puna.kernels import native


@pytest.fixture(params=native.instructions() if native.available() else ["none"])
def instructions(request):
    """Every instruction set that this processor has, one after the other."""
    if not native.available():
        pytest.skip(f"no C++ kernels here: {native.why_not()}")
    before = native.chosen()
    native.choose(request.param)
    yield request.param
    native.choose(before)


@pytest.fixture
def team(instructions):
    return native.Team(2)
