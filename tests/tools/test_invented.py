"""Invented functions compute what they say, under names that are on one side only."""

import pytest

from puna.errors import ConfigError
from puna.tools.invented import OPERATIONS, invented_function, invented_names, is_held_out


@pytest.mark.parametrize(
    ("operation", "arguments", "result"),
    [
        ("add", {"a": 17, "b": 25}, "42"),
        ("subtract", {"a": 17, "b": 25}, "-8"),
        ("multiply", {"a": -3, "b": 25}, "-75"),
        ("larger", {"a": 9, "b": 10}, "10"),
        ("smaller", {"a": 9, "b": 10}, "9"),
        ("join", {"s": "pu", "t": "na"}, "puna"),
        ("reverse", {"s": "llama"}, "amall"),
        ("length", {"s": "llama"}, "5"),
    ],
)
def test_the_operation_is_computed(operation, arguments, result):
    assert invented_function("tolvi", operation).call(arguments) == result


def test_every_operation_is_tested():
    rows = next(mark for mark in test_the_operation_is_computed.pytestmark).args[1]
    assert {row[0] for row in rows} == set(OPERATIONS)


def test_wrong_arguments_are_errors():
    tool = invented_function("tolvi", "subtract")
    assert tool.call({"a": 1}) == "error: argument 'b' is missing"
    assert tool.call({"a": "1", "b": 2}).startswith("error: argument 'a' must be an integer")


def test_an_unknown_operation_is_refused():
    with pytest.raises(ConfigError, match="divide"):
        invented_function("tolvi", "divide")


def test_no_name_is_both_trained_on_and_held_out():
    train = {name for seed in range(3) for name in invented_names(seed, 500, split="train")}
    held_out = {name for seed in range(3) for name in invented_names(seed, 200, split="heldout")}
    assert train.isdisjoint(held_out)
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))


def test_names_repeat_with_the_seed_and_are_different():
    names = invented_names(7, 300, split="train")
    assert names == invented_names(7, 300, split="train")
    assert len(set(names)) == 300
    assert names != invented_names(8, 300, split="train")
    assert all(name.isascii() and name.isalpha() and name.islower() for name in names)
