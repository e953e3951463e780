"""One-liners for the code interpreter, on words and numbers that training did not contain.

    Reverse the word "tolven".       print("tolven"[::-1])        nevlot
    Count the letters of "tolven".   print(len("tolven"))         6
    Put "tolven" in upper case.      print("tolven".upper())      TOLVEN
    Add 31, 45 and 73.               print(sum([31, 45, 73]))     149

Spelling a word backwards is nearly impossible for a model that sees a word as two or three tokens, and one short call
in Python; the answer then is the output, copied. Words stand in quotation marks, in the question as in the code: to a
byte-level vocabulary a word after a space is other tokens than the same word after a quotation mark.
"""

from random import Random

from puna.chat import Dialog, ToolCall, assistant, system, tool_result, user
from puna.posttrain.tasks.item import Case, Item, with_filler
from puna.posttrain.tasks.operands import operand
from puna.posttrain.tasks.toolbox import INTERPRETER, builtin_sets, builtin_system
from puna.posttrain.world import Part, World


def interpreter(world: World, part: Part, rng: Random) -> Case:
    """One of the four one-liners."""
    kind = rng.choice(("reverse", "letters", "upper", "sum"))
    if kind == "sum":
        numbers = [operand(rng, part, 2) for _ in range(3)]
        question = "Add {}, {} and {}.".format(*numbers)
        code, output = f"print(sum({numbers}))", str(sum(numbers))
        wrong, entities = str(sum(numbers[:2])), tuple(f"operand:{number}" for number in numbers)
    else:
        # A word or two, so that the number of letters is not always the same.
        words = rng.sample(world.words[part], rng.randint(1, 2) if kind == "letters" else 1)
        word = "".join(words)
        question, code, output = {
            "reverse": (f'Reverse the word "{word}".', f'print("{word}"[::-1])', word[::-1]),
            "letters": (f'Count the letters of "{word}".', f'print(len("{word}"))', str(len(word))),
            "upper": (f'Put "{word}" in upper case.', f'print("{word}".upper())', word.upper()),
        }[kind]
        wrong, entities = word, tuple(f"word:{word}" for word in words)
    tools = rng.choice(builtin_sets(INTERPRETER))
    call = ToolCall(name=INTERPRETER, arguments={"code": code}, dialect="python")
    answer: Dialog = (assistant("", call), tool_result(output), assistant(output))
    return Case(
        item=Item(
            task="interpreter",
            variant=kind,
            id="",
            dialog=(system(builtin_system(tools)), user(question)),
            tools=tools,
            check={"verifier": "text", "value": output},
            entities=entities,
        ),
        answer=answer,
        faults=(with_filler(answer, rng), (assistant(wrong),)),
    )
