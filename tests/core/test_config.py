"""Configuration: what is written reads back equal, and what is wrong is said with the next step."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from puna import config
from puna.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)
    weights: dict[str, float] = field(default_factory=lambda: {"x": 1.0})


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int = 10
    quick: bool = False
    place: Path | None = None
    label: str = ""
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None

    def __post_init__(self):
        config.require(self.steps > 0, f"steps={self.steps} must be positive")


def test_a_configuration_survives_json():
    value = Outer(steps=3, place=Path("/x"), inner=Inner(names=("p", "q")), maybe=Inner(rate=1.0))
    assert config.from_json(Outer, config.to_json(value)) == value


@pytest.mark.parametrize(
    "assignment, read, expected",
    [
        ("steps=7", lambda c: c.steps, 7),
        ("quick=true", lambda c: c.quick, True),
        ("quick=False", lambda c: c.quick, False),
        ("place=/tmp/x", lambda c: c.place, Path("/tmp/x")),
        ("place=none", lambda c: c.place, None),
        ("label=12", lambda c: c.label, "12"),
        ("inner.rate=2", lambda c: c.inner.rate, 2.0),
        ("inner.names=b,c", lambda c: c.inner.names, ("b", "c")),
        ("inner.weights.x=0.25", lambda c: c.inner.weights, {"x": 0.25}),
        ("inner.weights.new=3", lambda c: c.inner.weights, {"x": 1.0, "new": 3}),
    ],
)
def test_an_override_is_typed(assignment, read, expected):
    assert read(config.override(Outer(), [assignment])) == expected


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("stpes=7", "did you mean 'steps'?"),
        ("inner.rat=1", "did you mean 'rate'?"),
        ("steps=many", "expected a value of type int"),
        ("steps=1.5", "expected a value of type int"),
        ("quick=3", "expected a value of type bool"),
        ("steps", "name=value"),
        ("steps.x=1", "single value"),
        ("inner=3", "group of settings"),
        ("steps=0", "must be positive"),
    ],
)
def test_a_wrong_override_is_refused_with_a_hint(assignment, said):
    with pytest.raises(ConfigError) as error:
        config.override(Outer(), [assignment])
    assert said in str(error.value)


def test_unknown_fields_in_json_are_refused():
    with pytest.raises(ConfigError, match="unknown setting"):
        config.from_json(Outer, {"steps": 1, "stops": 2})


def test_differences_name_each_changed_field():
    lines = config.differences(Outer(), Outer(steps=11, inner=Inner(rate=0.25)))
    assert lines == ["inner.rate: 0.5 -> 0.25", "steps: 10 -> 11"]


def test_digests_tell_values_apart():
    assert config.digest(Outer()) == config.digest(Outer()) != config.digest(Outer(steps=11))
