"""Answers under an exact constraint: what preference training has to improve, and can be checked to the letter.

    repeat     Write "tolven" on 3 lines.                    tolven / tolven / tolven
    list       Join "tolven" "makril" "domkas" with commas.  tolven,makril,domkas
    capitals   Say "tolven" in capitals.                     TOLVEN
    ending     Write 3 lines and end with "tolven".          any two words, then tolven, a line each
    language   Answer in German: Where does X come from?     a German sentence about X's home, right or wrong

Words stand after quotation marks, commas and line ends, never after a space: a space before a word makes other tokens of it
in a byte-level vocabulary, and a model that has met few words would have to learn how each of its parts is respelt.

The first four are about invented words that belong to a part; `language` is about known people, and checks only in
which language and form the answer is, since whether it is right is what the task `facts` measures.
"""

from random import Random

from puna.chat import Dialog, assistant, user
from puna.posttrain.languages import LANGUAGE_NAMES, LANGUAGES, QUESTIONS, RELATIONS
from puna.posttrain.tasks.item import Case, Item, with_filler
from puna.posttrain.world import Part, World

KINDS = ("repeat", "repeat", "list", "capitals", "ending", "language")  # repeat is asked twice as often


def constraints(world: World, part: Part, rng: Random) -> Case:
    """One constraint of a drawn kind."""
    kind = rng.choice(KINDS)
    if kind == "language":
        return _language(world, part, rng)
    return {"repeat": repeat, "list": _list, "capitals": _capitals, "ending": _ending}[kind](world, part, rng)


def _case(kind: str, question: str, answer: str, wrong: list[str], check: dict, words: list[str], rng: Random) -> Case:
    """The case, with faults in the shares of the trials: as many polite fillers as wrong answers."""
    right: Dialog = (assistant(answer),)
    return Case(
        item=Item(
            task="constraints",
            variant=kind,
            id="",
            dialog=(user(question),),
            check=check,
            entities=tuple(f"word:{word}" for word in words),
        ),
        answer=right,
        faults=(*(with_filler(right, rng) for _ in wrong), *((assistant(text),) for text in wrong)),
    )


def repeat(world: World, part: Part, rng: Random) -> Case:
    """A word, to be written a number of times."""
    word, times = rng.choice(world.words[part]), rng.randint(2, 5)
    question = rng.choice(('Write "{word}" on {times} lines.', 'Say "{word}" on {times} lines.')).format(
        word=word, times=times
    )
    answer = "\n".join([word] * times)
    off_by_one = "\n".join([word] * (times + rng.choice((-1, 1))))
    return _case("repeat", question, answer, [off_by_one], {"verifier": "exact", "text": answer}, [word], rng)


def _list(world: World, part: Part, rng: Random) -> Case:
    words = rng.sample(world.words[part], rng.randint(2, 3))
    question = "Join {} with commas.".format(" ".join(f'"{word}"' for word in words))
    answer = ",".join(words)
    return _case("list", question, answer, ["\n".join(words)], {"verifier": "exact", "text": answer}, words, rng)


def _capitals(world: World, part: Part, rng: Random) -> Case:
    word = rng.choice(world.words[part])
    wrong = rng.choice((word, word.capitalize()))
    check = {"verifier": "exact", "text": word.upper()}
    return _case("capitals", f'Say "{word}" in capitals.', word.upper(), [wrong], check, [word], rng)


def _ending(world: World, part: Part, rng: Random) -> Case:
    count, last = rng.randint(2, 3), rng.choice(world.words[part])
    others = rng.sample([w for w in world.words["train"] if w != last], count - 1)
    answer, wrong = "\n".join([*others, last]), "\n".join([last, *others])
    check = {"verifier": "ending", "words": count, "last": last}
    return _case("ending", f'Write {count} lines and end with "{last}".', answer, [wrong], check, [last], rng)


def _language(world: World, part: Part, rng: Random) -> Case:
    person, relation = rng.choice(world.of("known", part)), rng.choice(RELATIONS)
    asked, wanted = rng.sample(LANGUAGES, 2)
    question = QUESTIONS[asked][relation][0].format(name=person.name)
    right: Dialog = (assistant(person.statement(relation, wanted)),)
    wrong: Dialog = (assistant(person.statement(relation, asked)),)
    return Case(
        item=Item(
            task="constraints",
            variant="language",
            id="",
            dialog=(user(f"Answer in {LANGUAGE_NAMES[wanted]}: {question}"),),
            check={"verifier": "statement", "language": wanted, "relation": relation, "name": person.name},
            entities=(f"known:{person.name}",),
        ),
        answer=right,
        faults=(with_filler(right, rng), wrong),
    )
