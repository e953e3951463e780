"""Multiple choice in the loop: is the right option the least surprising one, per byte? On whatever placement trains.

The items are lines of JSON as `puna.evaluation.choice` reads them. It measures a finished checkpoint through the engine;
this measures weights in training, a row for each option, and needs nothing but the placement's mean loss.
"""

from pathlib import Path

import torch

from puna.evaluation.choice import Item, read_choices
from puna.parallel.placement import Objective, Placement
from puna.tokenizer import AnyTokenizer, load_tokenizer
from puna.train.objectives.rows import Rows

_MULTIPLE = 16  # rows are filled up to one


class Choices:
    """Items, encoded."""

    def __init__(self, path: Path, tokenizer: Path, most_tokens: int):
        encoder = load_tokenizer(tokenizer)
        items = [item for group in read_choices(path).values() for item in group]
        self.items = [
            (item, [_row(encoder, item.context, option, most_tokens) for option in item.options]) for item in items
        ]

    def score(self, placement: Placement, data: Objective) -> float:
        """The share of items whose right option has the least surprise per byte; a tie is wrong."""
        return sum(self._right(item, rows, placement, data) for item, rows in self.items) / len(self.items)

    @staticmethod
    def _right(item: Item, rows: list[Rows], placement: Placement, data: Objective) -> bool:
        nats = [placement.validate(data, [row]) * row.weight for row in rows]
        per_byte = [n / len(option.encode()) for n, option in zip(nats, item.options, strict=True)]
        least = min(per_byte)
        return per_byte.count(least) == 1 and per_byte[item.answer] == least


def _row(tokenizer: AnyTokenizer, context: str, option: str, most: int) -> Rows:
    """A row in which the tokens of `option` count. What is too long loses its beginning."""
    before = [tokenizer.bos, *tokenizer.encode(context)]
    ids = (before + tokenizer.encode(option))[-(most + 1) :]
    learnt = len(ids) - len(before) if len(ids) > len(before) else len(ids) - 1
    filling = -(len(ids) - 1) % _MULTIPLE
    tokens = torch.tensor([ids + [tokenizer.eos] * filling])
    weights = torch.tensor([[0.0] * (len(ids) - learnt) + [1.0] * learnt + [0.0] * filling])
    documents = torch.tensor([[0] * len(ids) + [1] * filling])
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=weights[:, 1:])
