"""Practice texts: everything in their second half was said in the first, and nothing of the evaluation is in them."""

import re

from puna.posttrain.practice import FORMS, PracticeConfig, practice
from puna.posttrain.tasks.operands import part_of
from puna.posttrain.world import WorldConfig, make_world

CONFIG = PracticeConfig(documents=400)
WORLD = make_world(WorldConfig())
TEXTS = [document.text for document in practice(WORLD, CONFIG)]


def test_practice_is_a_function_of_the_seed():
    assert [document.text for document in practice(make_world(WorldConfig()), CONFIG)] == TEXTS
    assert [document.text for document in practice(make_world(WorldConfig(seed=1)), CONFIG)] != TEXTS


def test_no_held_out_word_number_or_person_is_practised():
    words = {word.casefold() for text in TEXTS for word in re.findall(r"\w+", text)}
    assert not words & WORLD.held_out
    numbers = [int(word) for text in TEXTS for word in re.findall(r"\b\d{2,3}\b", text)]
    assert {part_of(number) for number in numbers} == {"train"}
    assert not [person.name for person in WORLD.people if any(person.name in text for text in TEXTS)]


def test_every_form_occurs_and_ends_with_what_was_said_before():
    ends = {"; ": 0, " | ": 0, "? ": 0}
    for text in TEXTS:
        for line in text.splitlines():
            for mark in ends:
                if mark in line:
                    before, after = line.split(mark)
                    assert set(re.findall(r"\w+", after)) - {"and"} <= set(re.findall(r"\w+", before))
                    ends[mark] += 1
    assert all(ends.values())
    assert len(FORMS) == 6
