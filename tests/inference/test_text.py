from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.inference.text import TextStream


def run(chunks, stops):
    stream = TextStream(stops)
    shown = [stream.push(chunk) for chunk in chunks]
    shown.append(stream.finish())
    return stream, shown


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(a % (len(data) + 1) for a in at)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.text(max_size=40), st.lists(st.integers(0, 200)))
def test_any_cut_of_the_bytes_shows_the_same_text_and_never_half_a_character(text, at):
    stream, shown = run(cut(text.encode(), at), ())
    assert "".join(shown) == text == stream.text
    assert not stream.stopped
    assert "�" not in text.replace("�", "") and all("�" not in s or "�" in text for s in shown)


@given(st.binary(max_size=30), st.lists(st.integers(0, 200)))
def test_bytes_that_are_no_utf8_decode_as_they_would_in_one_go(data, at):
    assert run(cut(data, at), ())[0].text == data.decode("utf-8", errors="replace")


@given(
    st.text(alphabet="abé", max_size=24),
    st.lists(st.integers(0, 200)),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=3),
)
def test_the_stop_string_that_is_complete_first_ends_the_text_wherever_tokens_are_cut(text, at, stops):
    expected, stopped = text, False
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            expected, stopped = text[: min(starts)], True
            break
    stream, shown = run(cut(text.encode(), at), stops)
    assert (stream.text, stream.stopped) == (expected, stopped)
    assert "".join(shown) == expected


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot():
    stream = TextStream(("</end>",))
    assert stream.push(b"one <") == "one "
    assert stream.push(b"/en") == ""
    assert stream.push(b"!") == "</en!"
    assert stream.push(b" two </end> three") == " two "
    assert stream.stopped
    assert stream.push(b"four") == "" and stream.finish() == ""
    assert stream.text == "one </en! two "


@pytest.mark.parametrize("stops", [(), ("",)])
def test_without_a_stop_string_everything_is_shown_at_once(stops):
    assert TextStream(stops).push(b"abc") == "abc"


def test_an_unfinished_character_at_the_end_becomes_a_replacement():
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "�"
