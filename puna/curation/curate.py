"""The line of curation: pages in, documents out, one ledger row for each document that was read.

    read -> exact duplicates -> block list -> language -> rules -> near-duplicates -> repeated lines -> word outliers
         -> personal data -> quality -> held-out split -> documents.parquet, ledger.parquet, quality.safetensors

Cheap steps come first. What survives the rules waits in `work/texts.bin`, so memory holds a few hundred bytes for each
document, not its text. The work is single-threaded and quick (a few MB a second): killed, it starts again from the raw
pages and comes out the same, byte for byte.

Held-out documents are chosen after deduplication, so none is a near-duplicate of a training document, and by families: the
files of a folder, or the pages of a host, share habits, names and whole passages, and a measurement on some of them after
training on the others would measure memory. The hash of a family's name decides for all of it. A family with more than
`LARGEST_FAMILY` of the documents would be too much of the held-out text, so it is taken apart: a folder into its files, a
file into its documents. With fewer than two documents there is nothing to hold out, and curation stops.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from puna import artifacts, log
from puna.artifacts import Artifact
from puna.chat import Generator
from puna.config import require
from puna.curation import duplicates, ledger
from puna.curation.classifier import Classifier
from puna.curation.documents import FILE, Document, Split, write_documents
from puna.curation.duplicates import DuplicateConfig, ShingleStore, text_hash
from puna.curation.embedded import MAX_BYTES, read_embedded
from puna.curation.filters import Broken, FilterConfig, blocked, check_code, check_prose, without_policy_lines
from puna.curation.languages import UNKNOWN, identify, programming_language
from puna.curation.ledger import Entry, Ledger
from puna.curation.lines import LineCounts
from puna.curation.outliers import WordDistributions
from puna.curation.privacy import redact
from puna.curation.quality import MODEL_FILE, HeuristicJudge, Judge, QualityConfig, auc
from puna.curation.readers import Fault, Item, ReaderConfig, read
from puna.curation.words import Words, words_of
from puna.errors import DataError

HASHES = 1 << 128
LARGEST_FAMILY = 0.02  # of the documents


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """All of curation's settings."""

    reader: ReaderConfig = field(default_factory=ReaderConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    embedded_bytes: int = MAX_BYTES  # of the embedded corpus, where no pages are given
    languages: tuple[str, ...] = ()  # natural languages to keep, as ISO 639 codes; all, if empty
    min_language_probability: float = 0.0  # below it a text counts as of no language, `und`
    max_word_outlier: float = 8.0  # robust deviations of the word distribution; 0 leaves the step out
    redact: bool = True  # replace personal data
    heldout_share: float = 0.02  # of the kept documents
    judge: str = "heuristic"  # who grades quality: part of the identity of the result

    def __post_init__(self) -> None:
        require(0 < self.heldout_share < 1, f"heldout_share={self.heldout_share} must be between 0 and 1")
        require(self.embedded_bytes > 0, f"embedded_bytes={self.embedded_bytes} must be positive")
        share = 0 <= self.min_language_probability <= 1
        require(share, f"min_language_probability={self.min_language_probability} must be between 0 and 1")


def kinship(id: str, url: str) -> tuple[str, str]:
    """What a document belongs to, the wider first: host or folder, and file.

    The first part of a name is its source, which does not count: a module's documentation belongs to the module.
    """
    file = id.rpartition(":")[0] or id
    folder = file.rpartition("/")[0]
    host = urlsplit(url).netloc if url else ""
    return host or folder.partition("/")[2] or folder or file, file


@dataclass(slots=True)
class Survivor:
    """What is remembered of a document that passed the rules; its text waits in the `Waiting` file."""

    entry: int  # position in the ledger
    hash: int
    lang: str
    code: bool


class Waiting:
    """Texts in a file, one after another, replaced by writing them again at its end."""

    def __init__(self, path: Path):
        self.file = path.open("wb+")
        self.places: list[tuple[int, int]] = []
        self.end = 0

    def append(self, text: str) -> None:
        self.places.append((0, 0))
        self[len(self.places) - 1] = text

    def __setitem__(self, index: int, text: str) -> None:
        data = text.encode()
        self.file.seek(self.end)
        self.file.write(data)
        self.places[index] = (self.end, len(data))
        self.end += len(data)

    def __getitem__(self, index: int) -> str:
        start, length = self.places[index]
        self.file.seek(start)
        return self.file.read(length).decode()

    def size(self, index: int) -> int:
        """Bytes of a text."""
        return self.places[index][1]


def curate_with(judge: Generator) -> Callable[..., Artifact]:
    """The stage `curate` with another judge of quality; say its name in `CurationConfig.judge`."""

    @artifacts.stage("documents")
    def curate(config: CurationConfig, pages: Path | None, *, out: Path) -> dict[str, Any]:
        return Curation(config, out, judge).run(pages)

    return curate


def curate(config: CurationConfig, pages: Path | None, *, out: Path | str) -> Artifact:
    """Curate `pages` (a file or a folder; None: the embedded corpus) into an artifact of kind `documents` at `out`.

    Raises `DataError` where nothing can be read or fewer than two documents are left, `ConfigError` for a judge's name
    that is not the built-in one's.
    """
    hint = "use curate_with(generator) for another judge"
    require(config.judge == "heuristic", f"judge={config.judge!r} is not built in", hint=hint)
    return curate_with(HeuristicJudge())(config, pages, out=out)


class Curation:
    """One run: the ledger, the documents still in it, and a method for each step."""

    def __init__(self, config: CurationConfig, out: Path, judge: Generator):
        self.config, self.out, self.judge = config, out, Judge(judge)
        self.work = out / artifacts.WORK
        self.work.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger()
        self.survivors: list[Survivor] = []
        self.alive: list[int] = []  # positions in `survivors` of the documents that are still in
        self.texts = Waiting(self.work / "texts.bin")
        self.shingles = ShingleStore(self.work / "shingles.bin", config.duplicates)
        self.pii: Counter[str] = Counter()
        self.unread: dict[str, int] = {}  # damaged file -> bytes of it that could not be read

    def run(self, pages: Path | None) -> dict[str, Any]:
        items = (
            read_embedded(self.config.reader, max_bytes=self.config.embedded_bytes)
            if pages is None
            else read(pages, self.config.reader)
        )
        exact = self._read(items)
        self._enough(pages)
        near = self._near_duplicates()
        self._repeated_lines()
        self._word_outliers()
        if self.config.redact:
            self._personal_data()
        quality = self._quality()
        self._enough(pages)
        splits = self._splits()
        write_documents(self.out / FILE, self._documents(splits))
        self.ledger.write(self.out / ledger.FILE)
        return self._metrics(splits, {"exact": exact, **near}, quality)

    # -- the steps ---------------------------------------------------------------------------------------------------

    def _read(self, items: Iterator[Item]) -> int:
        """Everything that one document decides by itself. Returns the number of exact duplicates."""
        first: dict[int, str] = {}
        exact = 0
        for item in items:
            if isinstance(item, Fault):
                index = self.ledger.open(Entry(item.id, item.source, item.url, item.bytes))
                self.ledger.drop(index, "read", item.reason, item.evidence, item.evidence)
                if item.unread:
                    self.unread[item.id] = item.unread
                continue
            index = self.ledger.open(Entry(item.id, item.source, item.url, len(item.text.encode())))
            digest = text_hash(item.text)
            if digest in first:
                exact += 1
                self.ledger.drop(index, "exact duplicates", "exact duplicate", first[digest], item.text)
                continue
            first[digest] = item.id
            self._rules(index, item, digest)
        return exact

    def _rules(self, index: int, document: Document, digest: int) -> None:
        config, text = self.config, document.text
        code = programming_language(document.id, document.url, text)
        lang, probability = (code, 1.0) if code else identify(text)
        if probability < config.min_language_probability:
            lang = UNKNOWN
        self.ledger.entries[index].lang = lang
        web = document.url.startswith(("http://", "https://"))
        if web and not code:
            text = without_policy_lines(text)
        words = words_of(text)
        if broken := self._broken_rule(document.url, text, words, lang, code=bool(code), web=web):
            self.ledger.drop(index, "rules", broken.reason, broken.evidence, document.text)
            return
        self.survivors.append(Survivor(index, digest, lang, bool(code)))
        self.alive.append(len(self.survivors) - 1)
        self.texts.append(text)
        self.shingles.append(words)

    def _broken_rule(self, url: str, text: str, words: Words, lang: str, *, code: bool, web: bool) -> Broken | None:
        filters = self.config.filters
        if broken := blocked(url, filters):
            return broken
        if not code and self.config.languages and lang not in self.config.languages:
            return Broken("language is not wanted", lang)
        return check_code(text, words, filters) if code else check_prose(text, words, lang, filters, web=web)

    def _near_duplicates(self) -> dict[str, Any]:
        def rank(position: int) -> tuple[int, int]:
            return -self.texts.size(position), self.survivors[position].hash

        languages = [survivor.lang for survivor in self.survivors]
        found, counts = duplicates.near_duplicates(self.shingles, sorted(self.alive, key=rank), groups=languages)
        pairs = []
        for duplicate in sorted(found, key=lambda d: d.index):
            kept = self.ledger.entries[self.survivors[duplicate.kept].entry].id
            evidence = f"{kept} (Jaccard {duplicate.jaccard:.3f})"
            self._drop(duplicate.index, "near-duplicates", "near-duplicate", evidence)
            if len(pairs) < ledger.EXAMPLES:
                name = self.ledger.entries[self.survivors[duplicate.index].entry].id
                pairs.append({"dropped": name, "kept": kept, "jaccard": duplicate.jaccard})
        self._bury(d.index for d in found)
        return {"near": len(found), **counts, "pairs": pairs}

    def _repeated_lines(self) -> None:
        counts, gone = LineCounts(), []
        for position in self.alive:
            survivor = self.survivors[position]
            counts.add(position, self.texts[position], survivor.lang, code=survivor.code)
        for position in self.alive:
            survivor, text = self.survivors[position], self.texts[position]
            shorter, removed = counts.without_frequent(position, text, survivor.lang, code=survivor.code)
            if not removed:
                continue
            filters = self.config.filters
            least = filters.min_code_words if survivor.code else filters.min_words
            if len(words_of(shorter)) < least:
                self._drop(position, "repeated lines", "little left without repeated lines", f"{removed} lines")
                gone.append(position)
                continue
            self.texts[position] = shorter
            evidence = f"{removed} lines"
            self.ledger.change(survivor.entry, ledger.TRIMMED, "repeated lines", "repeated lines", evidence, text)
        self._bury(gone)

    def _word_outliers(self) -> None:
        if not self.config.max_word_outlier:
            return
        distributions = WordDistributions()
        for position in self.alive:
            distributions.add(words_of(self.texts[position]), self.survivors[position].lang)
        for position in self.alive:
            distributions.measure(position, words_of(self.texts[position]), self.survivors[position].lang)
        outliers = distributions.outliers(self.config.max_word_outlier)
        for position, deviations in outliers.items():
            self._drop(position, "word outliers", "words like no other document's", f"{deviations:.1f} deviations")
        self._bury(outliers)

    def _personal_data(self) -> None:
        for position in self.alive:
            survivor, text = self.survivors[position], self.texts[position]
            redacted, kinds = redact(text, code=survivor.code)
            if kinds:
                self.texts[position] = redacted
                self.pii.update(kinds)
                evidence = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
                self.ledger.change(
                    survivor.entry, ledger.REDACTED, "personal data", "personal data", evidence, redacted
                )

    def _quality(self) -> dict[str, Any]:
        config = self.config.quality
        sample = sorted(self.alive, key=lambda position: self.survivors[position].hash)[: config.graded_documents]
        extracts = [self.texts[position][: config.extract_characters] for position in sample]
        graded = [(e, g) for e, g in zip(extracts, self.judge.grade(extracts)) if g is not None]
        report: dict[str, Any] = {
            "judge": self.config.judge,
            "asked": len(sample),
            "graded": len(graded),
            "grades": dict(sorted(Counter(str(g) for _, g in graded).items())),
        }
        heldout = graded[: int(len(graded) * config.heldout_share)]
        trained = graded[len(heldout) :]
        both = all(len({g >= config.good_score for _, g in part}) == 2 for part in (heldout, trained))
        if len(graded) < config.min_grades or not both:
            log.warn(f"quality: {len(graded)} grades are too few or all alike: no classifier, nothing dropped by it")
            return {**report, "classifier": None}
        good = [g >= config.good_score for _, g in trained]
        classifier = Classifier.train([e for e, _ in trained], good, epochs=config.epochs, seed=config.seed)
        with artifacts.replacing(self.out / MODEL_FILE) as temporary:
            classifier.save(temporary)
        area, low, high = auc([classifier.score(e) for e, _ in heldout], [g >= config.good_score for _, g in heldout])
        report["classifier"] = {
            "auc": round(area, 4),
            "interval": [round(low, 4), round(high, 4)],
            "heldout_grades": len(heldout),
        }
        return {**report, "thresholds": self._keep_best(classifier)}

    def _keep_best(self, classifier: Classifier) -> dict[str, float]:
        """Score all, and drop the lowest of code and of prose."""
        scores: dict[bool, list[tuple[float, int]]] = defaultdict(list)
        for position in self.alive:
            score = round(classifier.score(self.texts[position][: self.config.quality.extract_characters]), 4)
            self.ledger.entries[self.survivors[position].entry].score = score
            scores[self.survivors[position].code].append((score, position))
        thresholds, gone = {}, []
        for code, scored in sorted(scores.items()):
            values = sorted(score for score, _ in scored)
            threshold = values[int(len(values) * (1 - self.config.quality.keep_share))]
            thresholds["code" if code else "prose"] = threshold
            for score, position in scored:
                if score < threshold:
                    self._drop(position, "quality", "low quality score", f"{score:.4f} < {threshold:.4f}")
                    gone.append(position)
        self._bury(gone)
        return thresholds

    def _splits(self) -> dict[int, Split]:
        """`heldout` for the families whose hash is low: about the share asked for, at least one document, never all."""
        limit = int(self.config.heldout_share * HASHES)
        heldout = {position for position, family in self._families().items() if family < limit}
        ordered = sorted(self.alive, key=lambda position: self.survivors[position].hash)
        heldout = heldout - {ordered[-1]} if len(heldout) == len(ordered) else heldout or {ordered[0]}
        return {position: "heldout" if position in heldout else "train" for position in self.alive}

    def _families(self) -> dict[int, int]:
        """The hash of each document's family: its host or folder where that is not too large, else its file, else itself."""
        entries = {position: self.ledger.entries[self.survivors[position].entry] for position in self.alive}
        names = {position: kinship(entry.id, entry.url) for position, entry in entries.items()}
        found = {position: self.survivors[position].hash for position in names}
        for level in (1, 0):
            sizes = Counter(name[level] for name in names.values())
            for position, name in names.items():
                if 1 < sizes[name[level]] <= LARGEST_FAMILY * len(self.alive):
                    found[position] = text_hash(name[level])
        return found

    # -- what is left ------------------------------------------------------------------------------------------------

    def _drop(self, position: int, step: str, reason: str, evidence: str) -> None:
        self.ledger.drop(self.survivors[position].entry, step, reason, evidence, self.texts[position])

    def _bury(self, positions) -> None:
        gone = set(positions)
        self.alive = [position for position in self.alive if position not in gone]

    def _enough(self, pages: Path | None) -> None:
        """`DataError` unless two documents are left: one to train on, one to hold out."""
        if len(self.alive) >= 2:
            return
        where = "the embedded corpus" if pages is None else str(pages)
        reasons = [f"{r['documents']} x {name}" for name, r in list(self.ledger.dropped().items())[:4]]
        raise DataError(
            f"{where}: {len(self.ledger.entries)} documents read, {len(self.alive)} kept; two are needed (one to hold out)"
            + (f"; dropped: {', '.join(reasons)}" if reasons else ""),
            hint="give more text (plain text files over 100 KB are cut into several documents), or loosen the rules in "
            "curation.filters",
        )

    def _documents(self, splits: dict[int, Split]) -> Iterator[Document]:
        for position in self.alive:
            entry = self.ledger.entries[self.survivors[position].entry]
            entry.split = splits[position]
            yield Document(entry.id, self.texts[position], entry.source, entry.url, entry.lang, entry.split)

    def _metrics(self, splits: dict[int, Split], repeats: dict[str, Any], quality: dict[str, Any]) -> dict[str, Any]:
        sources: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in self.ledger.entries:
            sources[entry.source].update(read_documents=1, read_bytes=entry.bytes, kept_documents=0, kept_bytes=0)
        for position in self.alive:
            entry = self.ledger.entries[self.survivors[position].entry]
            sources[entry.source].update(kept_documents=1, kept_bytes=self.texts.size(position))
        languages = Counter(self.survivors[position].lang for position in self.alive)
        decisions = Counter(entry.decision for entry in self.ledger.entries)
        total = sum(sources.values(), Counter())
        return {
            "read": {"documents": len(self.ledger.entries), "bytes": total["read_bytes"]},
            "unread_bytes": self.unread,
            "kept": {"documents": len(self.alive), "bytes": total["kept_bytes"]},
            "heldout": {"documents": sum(split == "heldout" for split in splits.values())},
            "decisions": dict(sorted(decisions.items())),
            "sources": {name: dict(sources[name]) for name in sorted(sources)},
            "dropped": self.ledger.dropped(),
            "languages": dict(sorted(languages.items(), key=lambda item: (-item[1], item[0]))),
            "quality": quality,
            "pii": dict(sorted(self.pii.items())),
            "duplicates": repeats,
            "examples": dict(sorted(self.ledger.examples.items())),
        }
