import dataclasses
import random

from puna.evaluation import compression
from puna.evaluation.baselines import BaselineConfig, measure_baselines
from puna.evaluation.heldout import HeldoutConfig

CONFIG = BaselineConfig(heldout=HeldoutConfig(max_bytes=6000, excerpt_bytes=600), token_orders=(3, 5), byte_orders=(5,))


def sentences(count: int, seed: int) -> str:
    draw = random.Random(seed)
    words = [
        "herd",
        "grass",
        "hill",
        "rain",
        "llama",
        "alpaca",
        "dry",
        "wet",
        "high",
        "low",
        "runs",
        "eats",
        "and",
        "the",
    ]
    return "\n".join(" ".join(draw.choices(words, k=9)) + "." for _ in range(count))


def world(make_documents, name="documents"):
    train = [(f"t{i}", sentences(60, i), "books", "train") for i in range(20)]
    heldout = [(f"h{i}", sentences(12, 1000 + i), "books", "heldout") for i in range(10)]
    return make_documents([*train, *heldout], name)


def test_every_baseline_is_charged_for_the_same_bytes(make_documents, tokenizer_artifact, tmp_path):
    result = measure_baselines(CONFIG, world(make_documents), tokenizer_artifact, out=tmp_path / "out")
    baselines = result.metrics["baselines"]
    assert set(baselines) == {
        "gzip_each", "gzip_all", "xz_each", "xz_all", "xz_primed", "bytes_5gram", "tokens_3gram", "tokens_5gram",
    }  # fmt: skip
    assert len({(b["bits_per_byte"]["bytes"], b["bits_per_byte"]["documents"]) for b in baselines.values()}) == 1
    value = {name: b["bits_per_byte"]["overall"]["value"] for name, b in baselines.items()}
    assert value["xz_primed"] < value["xz_all"] < value["xz_each"]
    assert value["tokens_5gram"] < value["gzip_each"] < 8
    assert baselines["xz_primed"]["prior"] == "training text"


def test_measured_twice_it_is_the_same(make_documents, tokenizer_artifact, tmp_path):
    documents = world(make_documents)
    first, second = (measure_baselines(CONFIG, documents, tokenizer_artifact, out=tmp_path / n) for n in "ab")
    assert first.metrics == second.metrics and first.digest == second.digest


def test_less_training_text_makes_a_worse_baseline(make_documents, tokenizer_artifact, tmp_path):
    documents = world(make_documents)
    less = dataclasses.replace(CONFIG, max_train_bytes=8000)
    cost = [
        measure_baselines(c, documents, tokenizer_artifact, out=tmp_path / n).metrics["baselines"]["tokens_5gram"]
        for c, n in ((CONFIG, "all"), (less, "less"))
    ]
    assert cost[0]["bits_per_byte"]["overall"]["value"] < cost[1]["bits_per_byte"]["overall"]["value"]


def test_text_that_was_in_the_training_text_costs_xz_next_to_nothing():
    noise = random.Random(0).randbytes(200_000)
    assert compression.xz_primed_bytes(noise, noise[50_000:60_000], preset=6) < 500
    assert compression.xz_primed_bytes(noise, random.Random(1).randbytes(10_000), preset=6) > 9_900
