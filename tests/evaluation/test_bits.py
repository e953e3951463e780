import pytest

from puna.errors import DataError
from puna.evaluation.bits import bits_report
from puna.evaluation.heldout import HeldoutConfig, sample_excerpts

SMALL = HeldoutConfig(max_bytes=4000, excerpt_bytes=500)


def rows(count: int, source: str = "books", split: str = "heldout", size: int = 300):
    return [
        (f"{source}-{i}", f"{source} {i}: " + "the herd and the grass\n" * (size // 23), source, split)
        for i in range(count)
    ]


def test_a_model_that_knows_nothing_costs_eight_bits_a_byte(make_documents, uniform):
    documents = make_documents([*rows(8), *rows(4, "code"), *rows(9, split="train")])
    report = bits_report(uniform(), documents, SMALL)
    for estimate in (report["overall"], *report["by_source"].values()):
        assert estimate["value"] == pytest.approx(8) and estimate["low"] == pytest.approx(8)
    assert set(report["by_source"]) == {"books", "code"}
    assert (
        report["bytes"] == sum(report["per_document"]["bytes"]) == sum(s["bytes"] for s in report["by_source"].values())
    )


def test_training_documents_are_never_scored(make_documents, uniform):
    generator = uniform()
    bits_report(generator, make_documents([*rows(5), *rows(50, "secret", "train")]), SMALL)
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


def test_one_model_measured_on_one_sample_can_be_paired_with_another(make_documents, uniform):
    documents = make_documents(rows(6))
    known = frozenset(e.text for e in sample_excerpts(documents, SMALL)[:2])
    plain, knowing = (bits_report(g, documents, SMALL) for g in (uniform(), uniform(known)))
    assert plain["per_document"]["bytes"] == knowing["per_document"]["bytes"]
    assert knowing["per_document"]["bits"][:3] == [0.0, 0.0, plain["per_document"]["bits"][2]]
    assert knowing["overall"]["low"] < knowing["overall"]["value"] < knowing["overall"]["high"]
