"""Zero-shot functions: the name was never seen, the system message says what it does.

    system      For the sum call "tolven". For the larger call "makril".
    user        What is the sum of 31 and 45?
    assistant   {"name": "tolven", "parameters": {"a": 31, "b": 45}}
    ipython     76
    assistant   76

One to three functions are listed; with k, picking any of them is right 1/k of the time, which is reported beside the
result. The name must be copied out of the system message, and the right one is the one whose operation the user names.
Names and operands of the evaluation are new. Llama 3.1 describes functions in JSON schema, some hundred tokens each; a
context of 256 tokens needs the short form above. The call is the same.
"""

from random import Random

from puna.chat import Dialog, ToolCall, assistant, system, tool_result, user
from puna.posttrain.tasks.item import Case, Item, ToolRef
from puna.posttrain.tasks.operands import operand
from puna.posttrain.world import Part, World

# The operations of `puna.tools.invented`, and what their results are called.
NOUNS = {"add": "sum", "subtract": "difference", "multiply": "product", "larger": "larger", "smaller": "smaller"}
QUESTIONS = ("What is the {noun} of {a} and {b}?", "Find the {noun} of {a} and {b}.")
MOST_LISTED = 3


def functions(world: World, part: Part, rng: Random) -> Case:
    """Two numbers and an operation, and the functions that are listed."""
    listed = rng.randint(1, MOST_LISTED)
    tools = tuple(
        ToolRef(name=name, operation=operation)
        for name, operation in zip(rng.sample(world.functions[part], listed), rng.sample(list(NOUNS), listed))
    )
    wanted, others = tools[0], tools[1:]
    a, b = operand(rng, part, 2), operand(rng, part, 2)
    question = rng.choice(QUESTIONS).format(noun=NOUNS[wanted.operation], a=a, b=b)
    value = result(wanted.operation, a, b)
    arguments = {"a": a, "b": b}
    answer = _answer(wanted, arguments, value)
    wrong = [_answer(tool, arguments, result(tool.operation, a, b)) for tool in others] or [(assistant(str(value)),)]
    shown = tuple(rng.sample(tools, listed))
    return Case(
        item=Item(
            task="functions",
            variant=f"{listed} listed",
            id="",
            dialog=(system(listing(shown)), user(question)),
            tools=shown,
            check={"verifier": "number", "value": value, "calls": [{"name": wanted.name, "arguments": arguments}]},
            chance=1 / listed,
            entities=(*(f"function:{tool.name}" for tool in tools), f"operand:{a}", f"operand:{b}"),
        ),
        answer=answer,
        faults=(wrong[0],),
    )


def listing(tools: tuple[ToolRef, ...]) -> str:
    """The functions as the system message lists them."""
    return " ".join(f'For the {NOUNS[tool.operation]} call "{tool.name}".' for tool in tools)


def result(operation: str, a: int, b: int) -> int:
    """What an invented function returns."""
    return {"add": a + b, "subtract": a - b, "multiply": a * b, "larger": max(a, b), "smaller": min(a, b)}[operation]


def _answer(tool: ToolRef, arguments: dict[str, int], value: int) -> Dialog:
    call = ToolCall(name=tool.name, arguments=arguments)
    return assistant("", call), tool_result(str(value)), assistant(str(value))
