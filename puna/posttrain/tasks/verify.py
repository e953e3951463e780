"""Is an answer right? Pure functions of an item and the finished dialogue.

`verify` gives the verdict; `finished`, `calls_of` and `refused` say how far an answer got. Nothing here asks a model or
runs a tool; whether a tool accepted a call is known when it runs (`runner.py`).

What is judged is the last assistant message, if it calls nothing. Checks, by the name under `verifier`:

    exact       the text, to the letter (outer white space aside)
    number      `value` is the only number in the text
    text        the text is `value`, with or without quotation marks and a full stop
    fact        the text contains `value` as a whole word, in at most twelve words, and refuses nothing
    refusal     the text is the refusal of that language
    ending      exactly `words` words, the last of which is `last`
    statement   the text is that language's sentence about `name` and the relation, whatever value it gives

Two keys go with any of them: `calls`, a list of `{"name", "arguments"}` that must be exactly the calls made, and
`no_calls`, true where none may be made.
"""

import re
from collections.abc import Callable
from typing import Any

from puna.chat import Dialog, ToolCall
from puna.posttrain.languages import REFUSALS, STATEMENTS
from puna.posttrain.tasks.item import Item

MOST_WORDS_OF_A_FACT = 12
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")


def verify(item: Item, dialog: Dialog) -> bool:
    """Whether the dialogue (the item's prompt and what followed) answers the item rightly."""
    check = item.check
    if not finished(dialog):
        return False
    calls = calls_of(item, dialog)
    if check.get("no_calls") and calls:
        return False
    if "calls" in check and [{"name": c.name, "arguments": c.arguments} for c in calls] != check["calls"]:
        return False
    return VERIFIERS[check["verifier"]](final_text(dialog), check)


def final_text(dialog: Dialog) -> str:
    """The answer: the text of the last message, if it is the assistant's and calls no tool; else nothing."""
    last = dialog[-1]
    return last.content.strip() if last.role == "assistant" and not last.tool_calls else ""


def finished(dialog: Dialog) -> bool:
    """Whether the dialogue ends with an answer, rather than with a call or its result."""
    return bool(final_text(dialog))


def calls_of(item: Item, dialog: Dialog) -> list[ToolCall]:
    """The tool calls that were made after the item's prompt."""
    return [call for message in dialog[len(item.dialog) :] for call in message.tool_calls]


def refused(dialog: Dialog) -> bool:
    """Whether the answer is, or contains, a refusal in any language."""
    return _refuses(final_text(dialog))


def _refuses(text: str) -> bool:
    return any(refusal.rstrip(".").casefold() in text.casefold() for refusal in REFUSALS.values())


def _exact(text: str, check: dict[str, Any]) -> bool:
    return text == check["text"]


def _number(text: str, check: dict[str, Any]) -> bool:
    numbers = NUMBER.findall(text)
    return len(numbers) == 1 and float(numbers[0]) == check["value"]


def _text(text: str, check: dict[str, Any]) -> bool:
    return text.removesuffix(".").strip("\"'") == check["value"]


def _fact(text: str, check: dict[str, Any]) -> bool:
    words = re.findall(r"\w+", text.casefold())
    return check["value"].casefold() in words and len(words) <= MOST_WORDS_OF_A_FACT and not _refuses(text)


def _refusal(text: str, check: dict[str, Any]) -> bool:
    return text.casefold().rstrip(".") == REFUSALS[check["language"]].casefold().rstrip(".")


def _ending(text: str, check: dict[str, Any]) -> bool:
    words = text.removesuffix(".").split()
    return len(words) == check["words"] and words[-1] == check["last"]


def _statement(text: str, check: dict[str, Any]) -> bool:
    form = STATEMENTS[check["language"]][check["relation"]][0].format(name=check["name"], value="\0")
    before, after = map(re.escape, form.split("\0"))
    return re.fullmatch(rf"{before}\w+{after}", text) is not None


VERIFIERS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "exact": _exact,
    "number": _number,
    "text": _text,
    "fact": _fact,
    "refusal": _refusal,
    "ending": _ending,
    "statement": _statement,
}
