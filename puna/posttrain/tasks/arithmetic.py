"""Sums and products: with the calculator, and the very same questions without.

    "What is 348 + 127?"   with the calculator   wolfram_alpha.call(query="348 + 127")  ->  475  ->  "475"
                           without               "475"

Both are trained. A model of this size can copy a question into a call, and cannot add; the difference between the two
is what the tool is worth. Operands have two or three digits, the same number in both; a product's have two.
"""

from random import Random

from puna.chat import Dialog, ToolCall, assistant, system, tool_result, user
from puna.posttrain.tasks.item import Case, Item, ToolRef
from puna.posttrain.tasks.operands import operand
from puna.posttrain.tasks.toolbox import CALCULATOR, NO_TOOLS, builtin_sets, builtin_system
from puna.posttrain.world import Part, World

KINDS = {"+": "sum", "-": "difference", "*": "product"}
QUESTIONS = ("What is {sum}?", "Calculate {sum}.")


def arithmetic(world: World, part: Part, rng: Random) -> Case:
    """A sum, difference or product, to be worked out with the calculator."""
    sum_, value, operands, question = _question(part, rng)
    tools = rng.choice(builtin_sets(CALCULATOR))
    call = ToolCall(name=CALCULATOR, arguments={"query": sum_}, dialect="builtin")
    answer: Dialog = (assistant("", call), tool_result(str(value)), assistant(str(value)))
    return Case(
        item=_item("arithmetic", (system(builtin_system(tools)), user(question)), value, operands, tools),
        answer=answer,
        faults=((assistant(str(_near(value, rng))),),),
    )


def arithmetic_without_tool(world: World, part: Part, rng: Random) -> Case:
    """The same questions, where the system message says that there are no tools."""
    _, value, operands, question = _question(part, rng)
    answer: Dialog = (assistant(str(value)),)
    return Case(
        item=_item("arithmetic_without_tool", (system(NO_TOOLS), user(question)), value, operands, ()),
        answer=answer,
        faults=((assistant(str(_near(value, rng))),),),
    )


def _question(part: Part, rng: Random) -> tuple[str, int, list[int], str]:
    sign = rng.choice("+-*")
    digits = 2 if sign == "*" else rng.choice((2, 3))
    a, b = operand(rng, part, digits), operand(rng, part, digits)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    sum_ = f"{a} {sign} {b}"
    return sum_, value, [a, b], rng.choice(QUESTIONS).format(sum=sum_)


def _item(task: str, dialog: Dialog, value: int, operands: list[int], tools: tuple[ToolRef, ...]) -> Item:
    kind = next(name for sign, name in KINDS.items() if sign in dialog[-1].content)
    return Item(
        task=task,
        variant=kind,
        id="",
        dialog=dialog,
        tools=tools,
        check={"verifier": "number", "value": value, **({} if tools else {"no_calls": True})},
        entities=tuple(f"operand:{number}" for number in operands),
    )


def _near(value: int, rng: Random) -> int:
    """What somebody who did not use the calculator may write."""
    return value + rng.choice([error for error in (-100, -10, -1, 1, 10, 100) if value + error >= 0])
