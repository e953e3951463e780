"""When not to call: a model that has learnt to use tools must also leave them alone.

unneeded   tools are listed, and the question needs none: Write "tolven" on 3 lines.
disabled   the system message says that there are no tools, and the question would need one: a person of the
           library, whom nothing but the index knows. The answer is "I don't know."
"""

from dataclasses import replace
from random import Random

from puna.chat import Dialog, assistant, system, user
from puna.posttrain.languages import QUESTIONS, REFUSALS, RELATIONS, STATEMENTS
from puna.posttrain.tasks.constraints import repeat
from puna.posttrain.tasks.item import Case, Item
from puna.posttrain.tasks.toolbox import CALCULATOR, INTERPRETER, NO_TOOLS, SEARCH, builtin_sets, builtin_system
from puna.posttrain.world import Part, World


def negatives(world: World, part: Part, rng: Random) -> Case:
    """A question that must be answered without a call."""
    return rng.choice((_unneeded, _disabled))(world, part, rng)


def _unneeded(world: World, part: Part, rng: Random) -> Case:
    case = repeat(world, part, rng)
    tools = rng.choice(builtin_sets(rng.choice((CALCULATOR, SEARCH, INTERPRETER))))
    dialog = (system(builtin_system(tools)), *case.item.dialog)
    check = {**case.item.check, "no_calls": True}
    item = replace(case.item, task="negatives", variant="unneeded", dialog=dialog, tools=tools, check=check)
    return replace(case, item=item)


def _disabled(world: World, part: Part, rng: Random) -> Case:
    person, relation = rng.choice(world.of("library", part)), rng.choice(RELATIONS)
    question = rng.choice(QUESTIONS["en"][relation]).format(name=person.name)
    answer: Dialog = (assistant(REFUSALS["en"]),)
    invented = STATEMENTS["en"][relation][0].format(name=person.name, value=rng.choice(world.values(relation, "en")))
    return Case(
        item=Item(
            task="negatives",
            variant="disabled",
            id="",
            dialog=(system(NO_TOOLS), user(question)),
            check={"verifier": "refusal", "language": "en", "no_calls": True},
            entities=(f"person:{person.name}",),
        ),
        answer=answer,
        faults=((assistant(invented),),),
    )
