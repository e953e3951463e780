"""What the model has read, and what it has not.

    facts      a question about a known person, in one of four languages; the answer is the sentence that it has read
    unknown    the same questions about people who are in no text; the answer is "I don't know.", in that language
    choices    facts as multiple choice by likelihood: four ends of a sentence, one of them true

The known people of the evaluation part were read about and never asked about; the unknown people of the train part are
named in training dialogues, which refuse, and those of the evaluation part nowhere. Multiple choice is asked about both
groups: on unknown people nothing but chance is possible, so anything else there is a flaw of the measurement.
"""

from random import Random
from typing import Any

from puna.chat import Dialog, assistant, user
from puna.posttrain.languages import LANGUAGES, QUESTIONS, REFUSALS, RELATIONS, STATEMENTS
from puna.posttrain.tasks.item import Case, Item
from puna.posttrain.world import Part, Person, World

OPTIONS = 4


def facts(world: World, part: Part, rng: Random) -> Case:
    """A question about a known person."""
    person, relation, language, question = _question(world, "known", part, rng)
    answer: Dialog = (assistant(person.statement(relation, language)),)
    values = world.values(relation, language)
    other = rng.choice([value for value in values if value != person.value(relation, language)])
    wrong = STATEMENTS[language][relation][0].format(name=person.name, value=other)
    return Case(
        item=Item(
            task="facts",
            variant=language,
            id="",
            dialog=(user(question),),
            check=fact_check(person, relation, language),
            chance=1 / len(values),
            entities=(f"known:{person.name}",),
        ),
        answer=answer,
        faults=((assistant(wrong),),),
    )


def unknown(world: World, part: Part, rng: Random) -> Case:
    """A question about a person who is in no text."""
    person, relation, language, question = _question(world, "unknown", part, rng)
    answer: Dialog = (assistant(REFUSALS[language]),)
    invented = STATEMENTS[language][relation][0].format(
        name=person.name, value=rng.choice(world.values(relation, language))
    )
    return Case(
        item=Item(
            task="unknown",
            variant=language,
            id="",
            dialog=(user(question),),
            check={"verifier": "refusal", "language": language},
            entities=(f"person:{person.name}",),
        ),
        answer=answer,
        faults=((assistant(invented),),),
    )


def fact_check(person: Person, relation: str, language: str) -> dict[str, Any]:
    """The check that an answer states one fact."""
    return {"verifier": "fact", "value": person.value(relation, language), "language": language}


def choices(world: World, part: Part, rng: Random, count: int) -> list[dict[str, Any]]:
    """`count` facts each of known and of unknown people as multiple choice.

    Each is `{"id", "group", "context", "options", "answer"}`: which of the options is the likeliest continuation of
    the context; `answer` is the index of the true one.
    """
    found = []
    for group in ("known", "unknown"):
        facts_of_group = [(p, r, l) for p in world.of(group, part) for r in RELATIONS for l in LANGUAGES]
        for person, relation, language in rng.sample(facts_of_group, min(count, len(facts_of_group))):
            right = person.value(relation, language)
            wrong = [value for value in world.values(relation, language) if value != right]
            options = [right, *rng.sample(wrong, OPTIONS - 1)]
            rng.shuffle(options)
            before, after = STATEMENTS[language][relation][0].format(name=person.name, value="\0").split(" \0")
            found.append(
                {
                    "id": f"choice/{part}/{len(found):04d}",
                    "group": group,
                    "context": before,
                    "options": [f" {option}{after}" for option in options],
                    "answer": options.index(right),
                }
            )
    return found


def _question(world: World, group: str, part: Part, rng: Random) -> tuple[Person, str, str, str]:
    person, relation, language = rng.choice(world.of(group, part)), rng.choice(RELATIONS), rng.choice(LANGUAGES)
    question = rng.choice(QUESTIONS[language][relation]).format(name=person.name)
    return person, relation, language, question
