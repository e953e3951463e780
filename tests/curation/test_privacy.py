import inspect
import json
import socket
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.curation.privacy import is_card, is_iban, luhn, redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe@mail.uni-hamburg.de today.", "Write to <EMAIL> today."),
        ("<bob+list@company.co.uk>,", "<<EMAIL>>,"),
        ("The server at 93.184.215.14 answered.", "The server at <IP_ADDRESS> answered."),
        ("ping 8.8.8.8 works", "ping <IP_ADDRESS> works"),
        ("address 2a00:1450:4001:81b::200e is up", "address <IP_ADDRESS> is up"),
        ("Call +49 40 42838 1234 now", "Call <PHONE> now"),
        ("Call (212) 555-0187 or 212-555-0123.", "Call <PHONE> or <PHONE>."),
        ("Card 4111 1111 1111 1111 expires", "Card <CREDIT_CARD> expires"),
        ("Card 378282246310005.", "Card <CREDIT_CARD>."),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN <IBAN>."),
        ("to GB29NWBK60161331926819", "to <IBAN>"),
    ],
)
def test_personal_data_is_replaced_by_its_kind(text, expected):
    redacted, found = redact(text)
    assert redacted == expected and sum(found.values()) == expected.count("<IP") + sum(
        expected.count(f"<{kind}>") for kind in ("EMAIL", "PHONE", "CREDIT_CARD", "IBAN")
    )


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4 and v10.0.19041.1 and ==3.11.0.20",
        "see section 3.1.4.2 of the manual",
        "10.0.0.1, 192.168.1.77, 127.0.0.1, 172.16.3.4 and 203.0.113.9 are private",
        "git clone git@github.com:torvalds/linux.git and user@example.com",
        "sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709 and 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12",
        "pi is 3.14159265358979323846264338327950288",
        "on 2024-07-23 at 12:34:56, 1999-12-31 to 2000-01-01, pages 100-200",
        "4111 1111 1111 1112 fails the checksum; 1234567890123456 is nobody's",
        "DE89 3704 0044 0532 0130 01 fails modulo 97",
        "std::vector::iterator and a::b::c and ::1 and fe80::1",
        "@property and @app.route('/x') and f@g.T",
        "discord.com/channels/4111111111111111/12",
        "ISBN 978-3-16-148410-0, 1,000,000,000 people, 0x7fffffffffffffff",
    ],
)
def test_what_only_looks_alike_is_not_touched(text):
    assert redact(text) == (text, {})


@pytest.mark.parametrize("text", ["y = a@b.shape", "z = w@x.to(device)", "n = 4111111111111111", "k = 14155552671 + 1"])
def test_code_asks_for_more_evidence(text):
    assert redact(text, code=True) == (text, {})


@pytest.mark.parametrize("module", [inspect, json, socket, ssl])
def test_modules_of_the_library_hold_no_cards_accounts_or_phones(module):
    found = redact(inspect.getsource(module), code=True)[1]
    assert not found.keys() & {"credit_card", "iban", "phone"}


@given(st.text(st.sampled_from("0123456789"), min_size=12, max_size=18))
def test_exactly_one_last_digit_satisfies_luhn(digits):
    assert sum(luhn(digits + last) for last in "0123456789") == 1


def test_checksums_and_lengths_decide():
    assert is_card("5500-0000-0000-0004") and not is_card("5500-0000-0000-0005") and not is_card("0000000000000000")
    assert is_iban("FR14 2004 1010 0505 0001 3M02 606") and not is_iban("FR14 2004 1010 0505 0001 3M02 60")


@given(st.text(max_size=200))
def test_redaction_is_done_after_one_pass(text):
    once, _ = redact(text)
    assert redact(once) == (once, {})
