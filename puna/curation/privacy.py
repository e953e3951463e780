"""Personal data: found by pattern, believed by checksum or context, replaced by a placeholder that names its kind.

    <EMAIL>        addresses; example.com and its like, and git@host, are nobody's
    <IP_ADDRESS>   public IPv4 and IPv6; private, loopback and documentation ranges stay
    <PHONE>        international numbers with +, North American ones with separators
    <CREDIT_CARD>  13 to 19 digits of an issuer's range with a valid Luhn checksum
    <IBAN>         a country's length and the mod-97 checksum

Text is full of what only looks alike: version numbers (1.2.3.4), section numbers, matrix products and decorators (a@b.T),
hashes, constants. A dotted quad of small numbers is an address only where the words before it speak of one; in code, a card
or a phone number must be written with separators, and an e-mail address must end in a common top-level domain.
Names of people are not found: that needs a model.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

KINDS = ("email", "ip_address", "phone", "credit_card", "iban")

_EMAIL = re.compile(
    r"(?<![\w.%+/@-])[A-Za-z0-9][\w.%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,4}[A-Za-z]{2,18}(?![\w@(\[=-])"
)
_NOBODY = re.compile(
    r"(?:^git@|@(?:.*\.)?(?:example\.(?:com|org|net|edu)|localhost|invalid|test|example)$|@(?:.*\.)?(?:foo|bar)\.com$)",
    re.I,
)
_CODE_DOMAINS = frozenset(
    [
        "com",
        "org",
        "net",
        "edu",
        "gov",
        "mil",
        "int",
        "info",
        "biz",
        "io",
        "dev",
        "app",
        "ai",
        "me",
        "co",
        "uk",
        "de",
        "fr",
        "es",
        "it",
        "nl",
        "be",
        "ch",
        "at",
        "se",
        "no",
        "fi",
        "dk",
        "pl",
        "cz",
        "ru",
        "ua",
        "jp",
        "cn",
        "kr",
        "in",
        "br",
        "mx",
        "ar",
        "ca",
        "au",
        "nz",
        "za",
        "il",
        "gr",
        "pt",
        "hu",
        "ro",
        "tr",
        "ie",
        "eu",
        "us",
        "tw",
        "hk",
        "sg",
    ]
)
_IPV4 = re.compile(r"(?<![\w.+-])(?:\d{1,3}\.){3}\d{1,3}(?![\w+-]|\.\w)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}(?![\w:])")
_SPEAKS_OF_ADDRESSES = re.compile(r"\b(?:ip|ips|ipv4|address|addr|host|server|ping|dns|client|peer|from)\b|://", re.I)
_SPEAKS_OF_VERSIONS = re.compile(r"(?:version|release|\bv|[=<>~!]=|\boid|section|chapter|§)\W*$", re.I)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4})(?![\w-]|\.\d)"
)
_CARD = re.compile(
    r"(?<![\w.+/=-])(?:\d{4}[ -]?){2}\d{4}[ -]?\d{1,7}(?![\w-]|\.\d)|(?<![\w.+/=-])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?![\w-]|\.\d)"
)
_ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[47]|6011|65")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_IBAN_LENGTHS = {
    "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20, "ES": 24, "FI": 18, "FR": 27,
    "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27, "LI": 21, "LT": 20, "LU": 20, "LV": 21,
    "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "TR": 26, "AE": 23,
}  # fmt: skip


def redact(text: str, *, code: bool = False) -> tuple[str, dict[str, int]]:
    """`text` with personal data replaced, and how often each kind was found. `code` asks for more evidence."""
    found: Counter[str] = Counter()

    def replaced(kind: str, believed: Callable[[str, str], bool]) -> Callable[[re.Match], str]:
        def one(match: re.Match) -> str:
            before = match.string[max(match.start() - 40, 0) : match.start()]
            if not believed(match.group(), before):
                return match.group()
            found[kind] += 1
            return f"<{kind.upper()}>"

        return one

    if "@" in text:
        text = _EMAIL.sub(replaced("email", lambda m, _: _is_email(m, code)), text)
    text = _IBAN.sub(replaced("iban", lambda m, _: is_iban(m)), text)
    text = _CARD.sub(replaced("credit_card", lambda m, _: is_card(m) and _written_apart(m, code)), text)
    text = _IPV4.sub(replaced("ip_address", _is_public), text)
    if text.count(":") > 3:
        text = _IPV6.sub(replaced("ip_address", lambda m, _: _is_public(m, "address ")), text)
    text = _PHONE.sub(replaced("phone", lambda m, _: _is_phone(m) and _written_apart(m, code)), text)
    return text, dict(found)


def luhn(digits: str) -> bool:
    """The checksum of card numbers: every second digit from the right doubled, digits summed, divisible by ten."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if position % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(text: str) -> bool:
    """Whether a run of digits is a possible card number: issuer, length, checksum."""
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and bool(_ISSUER.match(digits)) and luhn(digits)


def is_iban(text: str) -> bool:
    """Whether a string is an IBAN: the country's length, and the number it spells is 1 modulo 97."""
    text = text.replace(" ", "")
    if len(text) != _IBAN_LENGTHS.get(text[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def _is_email(match: str, code: bool) -> bool:
    return not _NOBODY.search(match) and (not code or match.rsplit(".", 1)[1] in _CODE_DOMAINS)


def _is_public(match: str, before: str) -> bool:
    try:
        address = ipaddress.ip_address(match)
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or _SPEAKS_OF_VERSIONS.search(before):
        return False
    small = address.version == 4 and max(address.packed) < 32
    return not small or bool(_SPEAKS_OF_ADDRESSES.search(before))


def _is_phone(match: str) -> bool:
    digits = re.sub(r"\D", "", match)
    return 9 <= len(digits) <= 15 and len(set(digits)) > 2


def _written_apart(match: str, code: bool) -> bool:
    return not code or bool(re.search(r"\d[ .()-]+\d", match))
