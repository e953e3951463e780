"""Supervised fine-tuning: learn what the assistant says in a dialog, and nothing else (arXiv 2407.21783, 4.1.3).

The loss falls on the bodies and end tokens of assistant messages, tool calls among them; never on what users, the
system or tools say, nor on headers, which the program writes. Dialogs are packed several to a row, and do not see each
other. A dialog that does not fit into a row is left out and counted, never cut.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from puna import chat, log
from puna.artifacts import Artifact
from puna.errors import DataError
from puna.tokenizer import AnyTokenizer, load_tokenizer
from puna.tokenizer.dialog import TokenClass
from puna.tokenizer.formats import dialog_format
from puna.train.objectives.rows import NextTokens, Rows
from puna.train.phases import Phase, Position

LEARNT = (TokenClass.BODY, TokenClass.END)


@dataclass(frozen=True, kw_only=True)
class SftObjective:
    """What one step of fine-tuning is made of. The artifact must hold `sft.jsonl`: a line per dialog."""

    sequence_length: int = 384  # tokens
    rows: int = 8  # packed rows per step

    def course(self, steps: int) -> tuple[Phase, ...]:
        """One phase of `steps` steps."""
        tokens = steps * self.rows * self.sequence_length
        return (Phase(tokens=tokens, sequence_length=self.sequence_length, rows=self.rows),)

    def data(self, artifacts: Sequence[Artifact], tokenizer: Path, seed: int) -> "SftData":
        lines = (line for artifact in artifacts for line in read_lines(artifact.file("sft.jsonl")))
        dialogs = [chat.dialog_from_json(line["dialog"]) for line in lines]
        return SftData(self, encode_dialogs(load_tokenizer(tokenizer), dialogs), seed)


Encoded = tuple[list[int], list[float]]  # token ids; the weight of predicting each


def encode_dialogs(tokenizer: AnyTokenizer, dialogs: Sequence[chat.Dialog]) -> list[Encoded]:
    """Each dialog's tokens and loss weights. Raises `DataError` for a dialog in which nothing would be learnt."""
    encoded, format = [], dialog_format(tokenizer)
    for number, dialog in enumerate(dialogs):
        rendered = format.render(dialog, answer=False)
        weights = [float(c in LEARNT) for c in rendered.classes]
        if not any(weights):
            hint = "every dialog needs an assistant message"
            raise DataError(f"dialog {number} has nothing to learn: {dialog[-1]}", hint=hint)
        encoded.append((rendered.ids, weights))
    return encoded


class SftData(NextTokens):
    """Rows packed anew, in another order, for each epoch; a row is a function of its number and the seed."""

    def __init__(self, config: SftObjective, encoded: list[Encoded], seed: int):
        self.config, self.seed = config, seed
        width = config.sequence_length + 1
        self.encoded = [e for e in encoded if len(e[0]) <= width]
        too_long = len(encoded) - len(self.encoded)
        if too_long:
            log.warn(f"{too_long} of {len(encoded)} dialogs are longer than {width} tokens and are left out")
        if not self.encoded:
            raise DataError(f"no dialog fits into {width} tokens", hint="raise sequence_length")
        self.notes = {"dialogs": len(self.encoded), "dialogs_too_long": too_long}
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._firsts = [0]  # number of rows before each epoch

    def batch(self, numbers: Sequence[int], at: Position | None = None) -> Rows:
        return self._rows([self._packed(number) for number in numbers])

    def validation(self, at: Position) -> list[Rows]:
        return []

    def cursors(self, at: Position) -> dict[str, list[int]]:
        return {}

    def _packed(self, index: int) -> list[int]:
        """The dialogs in row `index`, counted over all epochs."""
        epoch = 0
        while True:
            if epoch + 1 == len(self._firsts):
                self._firsts.append(self._firsts[-1] + len(self._pack(epoch)))
            if index < self._firsts[epoch + 1]:
                return self._pack(epoch)[index - self._firsts[epoch]]
            epoch += 1

    def _pack(self, epoch: int) -> list[list[int]]:
        """First fit in a shuffled order: rows of dialogs that fill `sequence_length + 1` tokens at most."""
        if self._epoch[0] == epoch:
            return self._epoch[1]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.encoded))
        rows: list[list[int]] = []
        space: list[int] = []
        open_from = 0  # rows before this one are full for practical purposes
        for dialog in order.tolist():
            length = len(self.encoded[dialog][0])
            row = next((r for r in range(open_from, len(rows)) if space[r] >= length), None)
            if row is None:
                rows.append([])
                space.append(self.config.sequence_length + 1)
                row = len(rows) - 1
                open_from = max(open_from, len(rows) - 16)
            rows[row].append(dialog)
            space[row] -= length
        self._epoch = epoch, rows
        return rows

    def _rows(self, packed: list[list[int]]) -> Rows:
        B, width = len(packed), self.config.sequence_length + 1
        tokens = torch.zeros(B, width, dtype=torch.int64)
        weights = torch.zeros(B, width)
        documents = torch.full((B, width), -1)
        for b, dialogs in enumerate(packed):
            at = 0
            for number, dialog in enumerate(dialogs):
                ids, weight = self.encoded[dialog]
                tokens[b, at : at + len(ids)] = torch.tensor(ids)
                weights[b, at : at + len(ids)] = torch.tensor(weight)
                documents[b, at : at + len(ids)] = number
                at += len(ids)
        return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=weights[:, 1:])


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a `.jsonl` file. Raises `DataError` with the line's number where one is broken."""
    values = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from None
    return values
