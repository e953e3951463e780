"""Questions that can only be answered by looking: the person is in the search index and in no text.

    "What is the job of Karis Tolvu?"
    brave_search.call(query="Karis Tolvu")  ->  an article with three facts  ->  "Karis Tolvu works as a baker."

The model must copy a name that it has never met into the query, and pick the fact that was asked for out of the
result. Train and evaluation people are different, and in one index.
"""

from random import Random

from puna.chat import Dialog, ToolCall, assistant, system, tool_result, user
from puna.posttrain.languages import QUESTIONS, REFUSALS, RELATIONS
from puna.posttrain.tasks.facts import fact_check
from puna.posttrain.tasks.item import Case, Item
from puna.posttrain.tasks.toolbox import SEARCH, builtin_sets, builtin_system
from puna.posttrain.world import Part, World, article


def lookup(world: World, part: Part, rng: Random) -> Case:
    """A question in English about a person of the library, with the search tool at hand."""
    person, relation = rng.choice(world.of("library", part)), rng.choice(RELATIONS)
    question = rng.choice(QUESTIONS["en"][relation]).format(name=person.name)
    tools = rng.choice(builtin_sets(SEARCH))
    call = ToolCall(name=SEARCH, arguments={"query": person.name}, dialect="builtin")
    answer: Dialog = (
        assistant("", call),
        tool_result(article(person)),
        assistant(person.statement(relation, "en")),
    )
    return Case(
        item=Item(
            task="lookup",
            variant=relation,
            id="",
            dialog=(system(builtin_system(tools)), user(question)),
            tools=tools,
            check=fact_check(person, relation, "en"),
            chance=1 / len(world.values(relation, "en")),
            entities=(f"person:{person.name}",),
        ),
        answer=answer,
        faults=((assistant(REFUSALS["en"]),),),
    )
