"""Heuristic filters: rules with published thresholds, each drop with the rule that it broke.

    Gopher    Rae et al. 2021, table A1: size, word length, symbols, bullets, ellipses, letters, stop words, repetition
    C4        Raffel et al. 2020, 2.2: placeholder text, curly brackets, policy lines, dirty words
    FineWeb   Penedo et al. 2024, 3.6: lines that end in punctuation, short lines, characters in duplicated lines
    code      after BigCode's StarCoder data (Li et al. 2023): line lengths, letters and digits, generated files, tables

Which rules meet a document depends on what it is. Rules made for prose would drop nearly all code, and rules made for
web pages (short lines are menus there) drop verse, dialogue and manuals: C4's and FineWeb's line rules are for pages.
English alone has a stop-word rule here, and word lengths are only judged in scripts that put spaces between words.

`DIRTY` is a short list of our own, of words that hardly occur outside pornography: it counts, it does not forbid. It is no
replacement for a hazard classifier. Whole sites are refused by `blocked_domains`, which starts empty: Puna ships no list.
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

from puna.config import require
from puna.curation.languages import UNSPACED
from puna.curation.repetition import duplicate_coverage, duplicate_shares, excess
from puna.curation.words import Words, hash_words


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The thresholds that people change; the others are where they are used, with their source."""

    min_words: int = 50
    max_words: int = 100_000
    min_code_words: int = 20
    max_symbols_per_word: float = 0.1  # of # and …
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2
    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    max_duplicated_characters: float = 0.1
    max_code_line: int = 1000  # characters
    max_code_mean_line: float = 100.0  # characters
    min_code_alphanumeric: float = 0.25
    max_code_numbers: float = 0.5  # of the words
    max_code_duplicate: float = 0.6  # of the words' bytes, in 10-grams that occurred before
    max_dirty_words: int = 3
    max_dirty_share: float = 0.005  # of the words
    blocked_domains: tuple[str, ...] = ()  # example.com also blocks www.example.com

    def __post_init__(self) -> None:
        require(0 < self.min_words <= self.max_words, f"min_words={self.min_words} must be in 1..max_words")
        for name in ("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words", "max_short_lines"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} is a share: between 0 and 1")


@dataclass(frozen=True, slots=True)
class Broken:
    """The rule that a document breaks, and the value that breaks it."""

    reason: str
    evidence: str = ""


STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
ENDS = tuple(".!?\"'”’。！？」』؟۔।॥…։።:;")
DIRTY = [
    "porn",
    "porno",
    "pornographic",
    "pornstar",
    "pornhub",
    "xvideos",
    "xhamster",
    "hentai",
    "milf",
    "blowjob",
    "blowjobs",
    "handjob",
    "cumshot",
    "cumshots",
    "creampie",
    "gangbang",
    "bukkake",
    "deepthroat",
    "rimjob",
    "camgirl",
    "camgirls",
    "fleshlight",
    "upskirt",
    "shemale",
    "threesome",
]
GENERATED = re.compile(
    r"auto-?\s?generated|automatically (?:generated|created)|do not (?:edit|modify)|machine generated"
    r"|(?:^\W*|\b(?:code|file|module|was|is|codec[^\n]{0,60}) )generated (?:by|from)\b|this file was created by",
    re.IGNORECASE | re.MULTILINE,
)
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_STOP, _DIRTY = hash_words(STOP_WORDS), hash_words(DIRTY)
_NUMBER = re.compile(rb"[\s,({\[:=][-+]?(?:0x[0-9a-fA-F]+|\d[\d_.]*(?:e[-+]?\d+)?)[jLlUuf]?(?=[\s,)}\]:;])")


def blocked(url: str, config: FilterConfig) -> Broken | None:
    """Whether the URL's host, or a parent domain of it, is on the block list."""
    try:
        host = (urlsplit(url).hostname or "") if config.blocked_domains else ""
    except ValueError:
        host = ""
    for domain in config.blocked_domains:
        if host == domain or host.endswith(f".{domain}"):
            return Broken("URL on the block list", host)
    return None


def without_policy_lines(text: str) -> str:
    """C4's line rule for web pages: lines about JavaScript being off, cookies and terms are taken out."""
    kept = [line for line in text.split("\n") if not _is_policy(line.lower())]
    return "\n".join(kept)


def _is_policy(line: str) -> bool:
    return len(line) < 300 and (any(p in line for p in POLICY) or ("javascript" in line and "enable" in line))


def check_prose(text: str, words: Words, lang: str, config: FilterConfig, *, web: bool) -> Broken | None:
    """The first rule for prose that a document breaks; `web` adds the rules that were made for web pages."""
    return (
        _size(words, config.min_words, config.max_words)
        or _gopher_quality(text, words, lang, config)
        or _dirty(words, config)
        or _c4_page(text, web)
        or _gopher_repetition(text, words, lang)
        or (_fineweb(text, config) if web else None)
    )


def check_code(text: str, words: Words, config: FilterConfig) -> Broken | None:
    """The first rule for source code that a document breaks."""
    if broken := _size(words, config.min_code_words, config.max_words):
        return broken
    rows = text.split("\n")
    longest = max(map(len, rows))
    if longest > config.max_code_line:
        return Broken("code: very long line", f"{longest} characters")
    mean = len(text) / len(rows)
    if mean > config.max_code_mean_line:
        return Broken("code: long lines on average", f"{mean:.0f} characters")
    if match := GENERATED.search("\n".join(rows[:8])):
        return Broken("code: generated file", match.group())
    data = text.encode()
    alphanumeric = int(words.lengths.sum()) / max(len(data), 1)
    if alphanumeric < config.min_code_alphanumeric:
        return Broken("code: few letters and digits", f"{alphanumeric:.2f}")
    numbers = len(_NUMBER.findall(data)) / len(words)
    if numbers > config.max_code_numbers:
        return Broken("code: table of numbers", f"{numbers:.2f} of the words")
    repeated = duplicate_coverage(words, 10) / int(words.lengths.sum())
    if repeated > config.max_code_duplicate:
        return Broken("code: repeats itself", f"{repeated:.2f} in duplicate 10-grams")
    return _dirty(words, config)


def _size(words: Words, least: int, most: int) -> Broken | None:
    if len(words) < least:
        return Broken("too few words", f"{len(words)} < {least}")
    return Broken("too many words", f"{len(words)} > {most}") if len(words) > most else None


def _gopher_quality(text: str, words: Words, lang: str, config: FilterConfig) -> Broken | None:
    tokens, lettered, characters = words.tokens()
    mean = characters / tokens
    least, most = (3, 10) if lang == "en" else (2, 14)  # agglutinating languages have long words
    if lang not in UNSPACED and not least <= mean <= most:
        return Broken("Gopher: mean word length", f"{mean:.1f} not in {least}..{most}")
    symbols = (text.count("#") + text.count("...") + text.count("…")) / tokens
    if symbols > config.max_symbols_per_word:
        return Broken("Gopher: symbols per word", f"{symbols:.2f}")
    lines = [line for line in (line.strip() for line in text.split("\n")) if line]
    bullets = sum(line.startswith(("•", "‣", "- ", "* ", "◦", "▪")) for line in lines) / len(lines)
    if bullets > config.max_bullet_lines:
        return Broken("Gopher: bullet lines", f"{bullets:.2f}")
    ellipses = sum(line.endswith(("...", "…")) for line in lines) / len(lines)
    if ellipses > config.max_ellipsis_lines:
        return Broken("Gopher: lines end in an ellipsis", f"{ellipses:.2f}")
    if lettered / tokens < config.min_alphabetic_words:
        return Broken("Gopher: words without letters", f"{1 - lettered / tokens:.2f}")
    if lang == "en" and config.min_stop_words:
        found = int(np.count_nonzero(words.count(_STOP)))
        if found < config.min_stop_words:
            return Broken("Gopher: stop words", f"{found} of {len(STOP_WORDS)}")
    return None


def _gopher_repetition(text: str, words: Words, lang: str) -> Broken | None:
    broken = excess(text, words, stretch=3 if lang in UNSPACED else 1)
    return Broken("Gopher: repetition", broken) if broken else None


def _c4_page(text: str, web: bool) -> Broken | None:
    if "lorem ipsum" in text.lower():
        return Broken("C4: lorem ipsum")
    if web and "{" in text:
        return Broken("C4: curly bracket")
    return None


def _dirty(words: Words, config: FilterConfig) -> Broken | None:
    found = int(words.count(_DIRTY).sum())
    if found > config.max_dirty_words and found > config.max_dirty_share * len(words):
        return Broken("dirty words", f"{found} of {len(words)}")
    return None


def _fineweb(text: str, config: FilterConfig) -> Broken | None:
    lines = [line for line in (line.strip() for line in text.split("\n")) if line]
    punctuated = sum(line.endswith(ENDS) for line in lines) / len(lines)
    if punctuated < config.min_punctuated_lines:
        return Broken("FineWeb: lines end without punctuation", f"{punctuated:.2f} < {config.min_punctuated_lines}")
    short = sum(len(line) < 30 for line in lines) / len(lines)
    if short > config.max_short_lines:
        return Broken("FineWeb: short lines", f"{short:.2f} > {config.max_short_lines}")
    _, duplicated = duplicate_shares(lines)
    if duplicated > config.max_duplicated_characters:
        return Broken("FineWeb: duplicated lines", f"{duplicated:.2f} of the characters")
    return None
