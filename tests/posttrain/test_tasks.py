"""Tasks: what they call right passes, what they call faulty does not, and the tools really return what is written."""

from itertools import pairwise
from random import Random

import pytest

from puna.posttrain.tasks.arithmetic import arithmetic, arithmetic_without_tool
from puna.posttrain.tasks.build import TASKS, cases
from puna.posttrain.tasks.facts import choices
from puna.posttrain.tasks.operands import MODULUS, RESIDUES, operand, part_of
from puna.posttrain.tasks.toolbox import Toolbox
from puna.posttrain.tasks.verify import calls_of, verify
from puna.posttrain.world import PARTS, WorldConfig, make_world
from puna.tools.agent import execute

WORLD = make_world(WorldConfig(seed=1))


def drawn(task, part="train", count=60):
    return cases(WORLD, part, task, count, "test", set())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("task", TASKS)
def test_the_faultless_answer_passes_and_every_fault_fails(task, part):
    for case in drawn(task, part):
        assert verify(case.item, case.dialog), case
        for fault in case.faults:
            assert not verify(case.item, case.item.dialog + fault), fault


@pytest.mark.parametrize("task", TASKS)
def test_tools_return_what_the_demonstrations_say(task):
    with Toolbox(WORLD) as toolbox:
        for case in drawn(task, count=25):
            for answer in (case.answer, *case.faults):
                for message, result in pairwise(answer):
                    for call in message.tool_calls:
                        execution = execute(call, toolbox(case.item))
                        assert execution.accepted
                        assert execution.result == result.content


@pytest.mark.parametrize("task", TASKS)
def test_a_case_is_a_function_of_its_generator(task):
    first, second = (TASKS[task](WORLD, "eval", Random("seed")) for _ in range(2))
    assert first == second


def test_arithmetic_asks_the_same_questions_with_and_without_the_tool():
    with_tool, without = drawn("arithmetic", "eval"), drawn("arithmetic_without_tool", "eval")
    assert [c.item.dialog[-1] for c in with_tool] == [c.item.dialog[-1] for c in without]
    assert all(c.item.tools for c in with_tool)
    assert not any(c.item.tools for c in without)
    rng = Random(5)
    assert calls_of(arithmetic(WORLD, "train", rng).item, arithmetic(WORLD, "train", rng).dialog)
    assert not calls_of(arithmetic_without_tool(WORLD, "train", rng).item, arithmetic(WORLD, "train", rng).item.dialog)


def test_every_number_belongs_to_one_part_and_operands_to_theirs():
    assert sorted(r for residues in RESIDUES.values() for r in residues) == list(range(MODULUS))
    rng = Random(0)
    for part in PARTS:
        for digits in (2, 3):
            numbers = [operand(rng, part, digits) for _ in range(200)]
            assert {part_of(number) for number in numbers} == {part}
            assert {len(str(number)) for number in numbers} == {digits}


def test_functions_are_listed_one_to_three_at_a_time_with_their_chance():
    variants = {case.item.variant: case.item for case in drawn("functions", count=60)}
    assert sorted(variants) == ["1 listed", "2 listed", "3 listed"]
    for name, item in variants.items():
        listed = int(name[0])
        assert item.chance == 1 / listed
        assert len(item.tools) == listed
        assert all(f'"{tool.name}"' in item.dialog[0].content for tool in item.tools)
        assert len({tool.operation for tool in item.tools}) == listed


def test_choices_hold_the_true_value_once_among_four_different_ones():
    found = choices(WORLD, "eval", Random(0), 50)
    assert [c["group"] for c in found] == ["known"] * 50 + ["unknown"] * 50
    people = {person.name: person for person in WORLD.people}
    for choice in found:
        assert len(set(choice["options"])) == 4
        person = next(p for name, p in people.items() if name in choice["context"])
        sentence = choice["context"] + choice["options"][choice["answer"]]
        truths = [person.statement(r, l) for r in ("place", "year", "job") for l in ("en", "de", "fr", "es")]
        assert sentence in truths


def test_a_task_without_new_questions_gives_fewer_cases():
    small = make_world(WorldConfig(known=10, unknown=10, library=10, first_names=10, last_names=10))
    taken: set[str] = set()
    found = cases(small, "dev", "lookup", 1000, "test", taken)
    assert len(found) == 6  # one person, three relations, two questions
    assert cases(small, "dev", "lookup", 1000, "test", taken) == []
