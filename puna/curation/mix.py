"""The mix: how much of each source is trained on.

`weights` give shares of the budget to sources by name or pattern (`{"python-*": 0.6, "world": 0.2, "*": 0.2}`). A source
belongs to the name that is exactly its own, else to the longest pattern that matches it; what matches none is left out,
and counted. Weights are relative: they need not sum to one.

A group gives at most `max_epochs` times its bytes. What it cannot fill is shared out among the others by their weights, so
the budget is filled whenever there is text enough. Inside a group, documents are taken in the order of a hash of their
name; when all were taken the round begins again (the copies are named `id#2`, …). The result is shuffled by hash.

Held-out documents of all weighted sources pass through whole, once. Curation made sure that no training document of the
same artifact is near them; a training document of *another* artifact that is, is left out here.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash

from puna import artifacts, log
from puna.artifacts import Artifact
from puna.config import require
from puna.curation.documents import FILE, Document, read_documents, write_documents
from puna.curation.duplicates import DuplicateConfig, ShingleStore, jaccard, signatures
from puna.curation.words import words_of
from puna.errors import ConfigError, DataError

REST = "*"


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Shares, budget and repeats."""

    weights: dict[str, float] = field(default_factory=lambda: {REST: 1.0})  # source name or pattern -> relative share
    max_bytes: int | None = None  # of training text; None: as much as the weights allow without repeating anything
    max_epochs: float = 4.0  # how often a source's text may be seen
    seed: int = 1

    def __post_init__(self) -> None:
        require(bool(self.weights), "weights is empty", hint='{"*": 1.0} takes every source')
        for name, weight in self.weights.items():
            valid = math.isfinite(weight) and weight >= 0
            require(valid, f"weights.{name}={weight} must be a number and not negative")
        require(sum(self.weights.values()) > 0, "all weights are zero")
        require(self.max_bytes is None or self.max_bytes > 0, f"max_bytes={self.max_bytes} must be positive")
        require(self.max_epochs > 0, f"max_epochs={self.max_epochs} must be positive")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A training document without its text."""

    artifact: int
    row: int
    id: str
    bytes: int
    order: int


@artifacts.stage("documents")
def mix(config: MixConfig, documents: list[Artifact], *, out: Path) -> dict[str, Any]:
    """Mix `documents` artifacts into one, training documents shuffled, held-out ones after them.

    Raises `ConfigError` for a weight that matches no source, `DataError` if nothing is left to train on.
    """
    (out / artifacts.WORK).mkdir(exist_ok=True)
    spilled = _near_foreign_heldout(documents, out / artifacts.WORK)
    groups, heldout_of, sources = _survey(config, documents, spilled)
    targets = _targets(config, {name: sum(c.bytes for c in group) for name, group in groups.items()})
    chosen = [copy for name in sorted(groups) for copy in _take(groups[name], targets[name], config.seed)]
    if not chosen:
        raise DataError("nothing to train on", hint="give positive weights to sources that have training documents")
    chosen.sort(key=lambda copy: _hash(config.seed, f"place of {copy[0].artifact}/{copy[0].id}#{copy[1]}"))
    write_documents(out / FILE, _written(documents, chosen, heldout_of))
    return _metrics(config, groups, chosen, heldout_of, sources, len(spilled))


def belongs_to(source: str, weights: dict[str, float]) -> str | None:
    """The key of `weights` that decides about a source; None if no pattern matches."""
    if source in weights:
        return source
    matching = [pattern for pattern in weights if fnmatchcase(source, pattern)]
    return max(matching, key=lambda pattern: (len(pattern), pattern), default=None)


def _hash(seed: int, text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed=seed)


def _survey(config: MixConfig, documents: list[Artifact], spilled: set[tuple[int, int]]):
    """Training candidates by weight, rows of held-out documents, and bytes by source; no text is kept."""
    groups: dict[str, list[Candidate]] = {name: [] for name, weight in config.weights.items() if weight > 0}
    heldout: set[tuple[int, int]] = set()
    sources: dict[str, dict[str, Any]] = defaultdict(lambda: {"bytes": 0, "weight": None})
    for number, artifact in enumerate(documents):
        for row, document in enumerate(read_documents(artifact)):
            size, name = len(document.text.encode()), belongs_to(document.source, config.weights)
            sources[document.source]["bytes"] += size
            sources[document.source]["weight"] = name
            if name not in groups or (number, row) in spilled:
                continue
            if document.split == "heldout":
                heldout.add((number, row))
            else:
                order = _hash(config.seed, f"order of {number}/{document.id}")
                groups[name].append(Candidate(number, row, document.id, size, order))
    used = {belonging["weight"] for belonging in sources.values()}
    for name in config.weights:
        if name not in used and name != REST:
            known = ", ".join(sorted(sources)) or "none"
            raise ConfigError(f"weights.{name}: no source matches {name!r}", hint=f"the sources are: {known}")
    left_out = sorted(s for s, belonging in sources.items() if belonging["weight"] is None)
    if left_out:
        log.warn(f'no weight matches {", ".join(left_out)}: left out of the mix (add "*" to take the rest)')
    return groups, heldout, dict(sources)


def _targets(config: MixConfig, available: dict[str, int]) -> dict[str, int]:
    """Bytes for each group: the budget by weight, with what a group cannot give shared out among the others."""
    weights = {name: config.weights[name] for name in available if available[name] > 0}
    if config.max_bytes is None:
        budget = min((available[n] * sum(weights.values()) / w for n, w in weights.items()), default=0.0)
        return {
            name: round(budget * weights.get(name, 0) / sum(weights.values())) if weights else 0 for name in available
        }
    targets = dict.fromkeys(available, 0)
    left, open_names = float(config.max_bytes), sorted(weights)
    while open_names:
        total = sum(weights[n] for n in open_names)
        full = [n for n in open_names if left * weights[n] / total >= available[n] * config.max_epochs]
        for name in full:
            targets[name] = int(available[name] * config.max_epochs)
        if not full:
            targets |= {n: int(left * weights[n] / total) for n in open_names}
            break
        left -= sum(targets[n] for n in full)
        open_names = [n for n in open_names if n not in full]
    return targets


def _take(group: list[Candidate], target: int, seed: int) -> Iterator[tuple[Candidate, int]]:
    """Documents with their epoch, round after round, until `target` bytes are reached (the last may cross it by half)."""
    ordered = sorted(group, key=lambda c: (c.order, c.artifact, c.row))
    taken, epoch = 0, 1
    while taken < target:
        before = taken
        for candidate in ordered:
            if taken + candidate.bytes / 2 > target:
                continue
            taken += candidate.bytes
            yield candidate, epoch
        if taken == before:
            return
        epoch += 1


def _written(
    documents: list[Artifact], chosen: list[tuple[Candidate, int]], heldout: set[tuple[int, int]]
) -> Iterator[Document]:
    wanted = {(c.artifact, c.row) for c, _ in chosen} | heldout
    texts = {
        (number, row): document
        for number, artifact in enumerate(documents)
        for row, document in enumerate(read_documents(artifact))
        if (number, row) in wanted
    }
    for candidate, epoch in chosen:
        document = texts[candidate.artifact, candidate.row]
        yield document if epoch == 1 else replace(document, id=f"{document.id}#{epoch}")
    for key in sorted(heldout):
        yield texts[key]


def _near_foreign_heldout(documents: list[Artifact], work: Path) -> set[tuple[int, int]]:
    """Training documents that nearly repeat a held-out document of another artifact, as (artifact, row)."""
    if len(documents) < 2:
        return set()
    config = DuplicateConfig()
    store, keys, splits = ShingleStore(work / "shingles.bin", config), [], []
    for number, artifact in enumerate(documents):
        for row, document in enumerate(read_documents(artifact)):
            store.append(words_of(document.text))
            keys.append((number, row))
            splits.append(document.split)
    bands = signatures(store).reshape(len(store), config.bands, config.rows)
    buckets = defaultdict(list)
    for index in range(len(store)):
        if splits[index] == "heldout":
            for band in range(config.bands):
                buckets[band, bands[index, band].tobytes()].append(index)
    found = set()
    for index, split in enumerate(splits):
        if split == "train":
            near = {n for band in range(config.bands) for n in buckets.get((band, bands[index, band].tobytes()), ())}
            foreign = sorted(n for n in near if keys[n][0] != keys[index][0])
            if any(jaccard(store[index], store[n]) >= config.min_jaccard for n in foreign):
                found.add(keys[index])
    return found


def _metrics(config: MixConfig, groups, chosen, heldout, sources, spilled: int) -> dict[str, Any]:
    size = dict.fromkeys(groups, 0)
    epochs = dict.fromkeys(groups, 0)
    group_of = {(c.artifact, c.row): name for name, group in groups.items() for c in group}
    for candidate, epoch in chosen:
        name = group_of[candidate.artifact, candidate.row]
        size[name] += candidate.bytes
        epochs[name] = max(epochs[name], epoch)
    total, weight = sum(size.values()), sum(config.weights.values())
    return {
        "train": {"documents": len(chosen), "bytes": total},
        "heldout": {"documents": len(heldout)},
        "groups": {
            name: {
                "asked_share": round(config.weights[name] / weight, 4),
                "share": round(size[name] / max(total, 1), 4),
                "bytes": size[name],
                "available_bytes": sum(c.bytes for c in groups[name]),
                "epochs": round(size[name] / max(sum(c.bytes for c in groups[name]), 1), 3),
            }
            for name in sorted(groups)
        },
        "sources": {name: sources[name] for name in sorted(sources)},
        "near_heldout_of_another": spilled,
    }
