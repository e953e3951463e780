"""Direct preference optimisation, as Llama 3 does it (arXiv 2407.21783, 4.1.4; Rafailov et al. 2305.18290).

    loss = -log sigmoid(beta * ((pi_c - ref_c) - (pi_r - ref_r)))  +  nll_share * NLL(chosen) per token

where pi and ref are log-probabilities of the chosen (c) and rejected (r) answers under the model and under the model
that training starts from. Two changes against plain DPO: header and end tokens are left out of the contrast (they occur
in both answers, and pushing them up and down at once ends in tails that repeat or stop short), and the chosen answer's
likelihood is held up by the NLL term, which keeps them. The mask without the NLL term ruins the end token: it is
refused. The contrastive part is a mean over the step's pairs, the NLL one over all tokens of its chosen answers.

The reference scores all pairs once, before the first step, and is not kept: at that moment the model is the reference,
in its place, on however many ranks, which share the pairs. That is 8 bytes a pair and one forward pass over them; a second
model in memory would be 2 bytes a weight at the least, and a forward pass in every step. A run that goes on scores them again,
from the same weights.

Before the first step pi equals ref, so the loss's contrastive part is ln 2 exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna import chat, log
from puna.artifacts import Artifact
from puna.config import require
from puna.errors import DataError
from puna.parallel.placement import Placement, Reading
from puna.tokenizer import AnyTokenizer, load_tokenizer
from puna.tokenizer.dialog import TokenClass
from puna.tokenizer.formats import dialog_format
from puna.train.objectives.rows import PairedRows, Rows, pad
from puna.train.objectives.sft import read_lines
from puna.train.phases import Phase, Position

SCORED = 32  # pairs that the reference scores at a time


@dataclass(frozen=True, kw_only=True)
class DpoObjective:
    """What one step of DPO is made of. The artifact must hold `preferences.jsonl`: prompt, chosen, rejected a line."""

    sequence_length: int = 384  # tokens; a pair with a longer side is left out and counted
    pairs: int = 16  # per step
    beta: float = 0.1
    nll_share: float = 0.2
    mask_format_tokens: bool = True

    def __post_init__(self) -> None:
        require(self.beta > 0, f"beta={self.beta} must be positive")
        safe = self.nll_share > 0 or not self.mask_format_tokens
        hint = "set nll_share=0.2, or mask_format_tokens=false"
        require(safe, "mask_format_tokens without an NLL term unlearns the end of an answer", hint=hint)

    def course(self, steps: int) -> tuple[Phase, ...]:
        """One phase of `steps` steps."""
        return pair_course(self, steps)

    def data(self, artifacts: Sequence[Artifact], tokenizer: Path, seed: int) -> "DpoData":
        return DpoData(self, load_pairs(artifacts, load_tokenizer(tokenizer)), seed)


def pair_course(objective: Any, steps: int) -> tuple[Phase, ...]:
    """One phase of `steps` steps of pairs; a pair counts as two rows at most `sequence_length` long."""
    length = 2 * objective.sequence_length
    return (Phase(tokens=steps * objective.pairs * length, sequence_length=length, rows=objective.pairs),)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One answer with its prompt: ids, and for each id whether it is contrasted and whether the NLL counts it."""

    ids: list[int]
    contrast: list[float]
    likelihood: list[float]


def load_pairs(artifacts: Sequence[Artifact], tokenizer: AnyTokenizer) -> list[tuple[Side, Side]]:
    """The (chosen, rejected) pairs of preferences artifacts."""
    lines = [line for artifact in artifacts for line in read_lines(artifact.file("preferences.jsonl"))]
    return encode_pairs(lines, tokenizer)


def encode_pairs(lines: Sequence[dict[str, Any]], tokenizer: AnyTokenizer) -> list[tuple[Side, Side]]:
    """The (chosen, rejected) pairs of lines that have prompt, chosen and rejected, each a dialog."""
    pairs = []
    for line in lines:
        prompt = chat.dialog_from_json(line["prompt"])
        sides = (encode_side(tokenizer, prompt, chat.dialog_from_json(line[s])) for s in ("chosen", "rejected"))
        pairs.append(tuple(sides))
    return pairs


def encode_side(tokenizer: AnyTokenizer, prompt: chat.Dialog, answer: chat.Dialog) -> Side:
    """The tokens of `prompt` + `answer`; only what the assistant says in `answer` counts."""
    format = dialog_format(tokenizer)
    rendered = format.render(prompt + answer, answer=False)
    start = len(format.render(prompt, answer=False).ids)
    body = [float(i >= start and c == TokenClass.BODY) for i, c in enumerate(rendered.classes)]
    either = [float(i >= start and c in (TokenClass.BODY, TokenClass.END)) for i, c in enumerate(rendered.classes)]
    return Side(ids=rendered.ids, contrast=body, likelihood=either)


@dataclass(frozen=True, kw_only=True)
class ContrastedRows(PairedRows):
    """Pairs, which places of them are contrasted, and what the reference model gave them; the rows' weights are the NLL's."""

    contrast: Tensor  # (2P, T) float32
    reference: Tensor  # (2P,) log-probabilities, nats

    @property
    def counts(self) -> tuple[float, float]:
        """The pairs, and the tokens of the chosen answers."""
        return float(self.samples), self.rows.weights[: self.samples].sum().item()


def _contrasted(reading: Reading, batch: ContrastedRows) -> Tensor:
    """The log-probability of what is contrasted of each row."""
    return reading.log_probs(batch.contrast[None])[0]


class DpoData:
    """Batches of pairs in an order that changes with each epoch, with the reference's log-probabilities beside them."""

    noted: tuple[str, ...] = ("contrastive", "nll", "ranked_right", "chosen_change")

    def __init__(self, config: DpoObjective, pairs: list[tuple[Side, Side]], seed: int):
        self.config, self.seed = config, seed
        limit = config.sequence_length + 1
        self.pairs = [p for p in pairs if max(len(s.ids) for s in p) <= limit]
        too_long = len(pairs) - len(self.pairs)
        if too_long:
            log.warn(f"{too_long} of {len(pairs)} pairs are longer than {limit} tokens and are left out")
        if not self.pairs:
            raise DataError(f"no preference pair fits into {limit} tokens", hint="raise sequence_length")
        self.notes = {"pairs": len(self.pairs), "pairs_too_long": too_long}
        self.reference: Tensor | None = None  # (pairs, 2)

    def prepare(self, placement: Placement) -> None:
        """Let the starting model, which is the reference, score all pairs."""

        def chunk(number: int) -> ContrastedRows:
            pairs = self.pairs[number * SCORED : (number + 1) * SCORED]
            rows, contrast = self._rows(pairs)
            return ContrastedRows(rows=rows, contrast=contrast, reference=torch.zeros(2 * len(pairs)))

        scores = placement.read(_contrasted, -(-len(self.pairs) // SCORED), chunk)
        self.reference = torch.cat([both.view(2, -1).t() for both in scores])

    def batch(self, numbers: Sequence[int], at: Position | None = None) -> ContrastedRows:
        chosen = self._indices(numbers)
        rows, contrast = self._rows([self.pairs[i] for i in chosen])
        return ContrastedRows(rows=rows, contrast=contrast, reference=self.reference[chosen].t().reshape(-1))

    def validation(self, at: Position) -> list:
        return []

    def cursors(self, at: Position) -> dict[str, list[int]]:
        return {}

    def loss(
        self, reading: Reading, batch: ContrastedRows, totals: tuple[float, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A share of the loss above, of the pairs ranked right, and of the change of the chosen answers' likelihood."""
        pairs, tokens = totals
        contrast, likelihood = reading.log_probs(torch.stack((batch.contrast, batch.rows.weights)))
        chosen, rejected = (contrast - batch.reference).chunk(2)
        contrastive = -F.logsigmoid(self.config.beta * (chosen - rejected)).sum() / pairs
        nll = -likelihood[: batch.samples].sum() / tokens
        notes = {
            "contrastive": contrastive.detach(),
            "nll": nll.detach(),
            "ranked_right": (chosen > rejected).float().sum() / pairs,
            "chosen_change": chosen.detach().sum() / pairs,
        }
        return contrastive + self.config.nll_share * nll, notes

    def _indices(self, numbers: Sequence[int]) -> list[int]:
        count = len(self.pairs)
        orders: dict[int, np.ndarray] = {}
        indices = []
        for i in numbers:
            epoch = i // count
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(count)
            indices.append(int(orders[epoch][i % count]))
        return indices

    def _rows(self, pairs: list[tuple[Side, Side]]) -> tuple[Rows, Tensor]:
        sides = [c for c, _ in pairs] + [r for _, r in pairs]
        rows = pad([(s.ids, s.likelihood) for s in sides], fill=0)
        masked = self.config.mask_format_tokens
        contrast = pad([(s.ids, s.contrast if masked else s.likelihood) for s in sides], fill=0).weights
        return rows, contrast
