import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import DataError
from puna.evaluation.bits import bits_report
from puna.evaluation.heldout import HeldoutConfig, pieces, sample_excerpts

SMALL = HeldoutConfig(max_bytes=4000, excerpt_bytes=500, window_tokens=64)


def rows(count: int, source: str = "books", split: str = "heldout", size: int = 300):
    return [
        (f"{source}-{i}", f"{source} {i}: " + "the herd and the grass\n" * (size // 23), source, split)
        for i in range(count)
    ]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=400), st.integers(64, 160))
def test_pieces_tile_the_text_and_fit_the_window(tokenizer, text, window):
    cut = pieces(text, tokenizer, window)
    assert "".join(p.text for p in cut) == text
    so_far = ""
    for piece in cut:
        assert piece.text and so_far.endswith(piece.context)
        assert 1 + len(tokenizer.encode(piece.context)) + len(tokenizer.encode(piece.text)) <= window
        so_far += piece.text


def test_pieces_of_a_text_that_fits_are_the_text(tokenizer):
    (piece,) = pieces("the herd", tokenizer, 64)
    assert (piece.text, piece.context) == ("the herd", "")


def test_pieces_of_long_runs_without_spaces_and_of_four_byte_characters(tokenizer):
    for text in ("x" * 1000, "\U0001f999" * 200, "é" * 333):
        assert "".join(p.text for p in pieces(text, tokenizer, 64)) == text


def test_a_model_that_knows_nothing_costs_eight_bits_a_byte(tokenizer, make_documents, uniform):
    documents = make_documents([*rows(8), *rows(4, "code"), *rows(9, split="train")])
    report = bits_report(uniform(), documents, tokenizer, SMALL)
    for estimate in (report["overall"], *report["by_source"].values()):
        assert estimate["value"] == pytest.approx(8) and estimate["low"] == pytest.approx(8)
    assert set(report["by_source"]) == {"books", "code"}
    assert (
        report["bytes"] == sum(report["per_document"]["bytes"]) == sum(s["bytes"] for s in report["by_source"].values())
    )


def test_training_documents_are_never_scored(tokenizer, make_documents, uniform):
    generator = uniform()
    bits_report(generator, make_documents([*rows(5), *rows(50, "secret", "train")]), tokenizer, SMALL)
    assert generator.asked and not any("secret" in c.text for c in generator.asked)


def test_the_sample_does_not_depend_on_the_order_of_documents_and_keeps_to_its_cap(make_documents):
    some = rows(40)
    first, second = (
        sample_excerpts(make_documents(r, name), SMALL) for r, name in ((some, "a"), (list(reversed(some)), "b"))
    )
    assert first == second
    assert 3000 < sum(e.bytes for e in first) <= SMALL.max_bytes
    other = sample_excerpts(make_documents(some, "c"), HeldoutConfig(**{**vars(SMALL), "seed": 1}))
    assert [e.id for e in other] != [e.id for e in first]


def test_a_long_document_is_represented_by_a_stretch_of_it_that_starts_a_line(make_documents):
    text = "\n".join(f"line {i} of a very long äöü document" for i in range(5000))
    (excerpt,) = sample_excerpts(make_documents([("a", text, "books", "heldout")]), SMALL)
    assert excerpt.text in text and text[text.index(excerpt.text) - 1] == "\n"
    assert SMALL.excerpt_bytes - 4 < excerpt.bytes <= SMALL.excerpt_bytes


def test_no_held_out_text_is_said_so(make_documents):
    with pytest.raises(DataError, match="holds out no document"):
        sample_excerpts(make_documents(rows(3, split="train")), SMALL)
