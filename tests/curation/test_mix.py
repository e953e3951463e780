from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna import artifacts
from puna.curation.documents import FILE, Document, read_documents, write_documents
from puna.curation.mix import MixConfig, _targets, belongs_to, mix
from puna.errors import ConfigError, DataError

from .conftest import prose


def artifact(path, documents):
    @artifacts.stage("documents")
    def made(config, *, out):
        write_documents(out / FILE, documents)
        return {}

    return made({}, out=path)


def corpus(path, sources, seed=0):
    """`sources`: name -> number of training documents; every source has one held-out document too."""
    documents = []
    for offset, (source, count) in enumerate(sources.items()):
        first = seed + 1000 * offset
        documents += [Document(f"{source}/{n}", prose(first + n), source) for n in range(count)]
        documents.append(Document(f"{source}/held", prose(first + 999), source, split="heldout"))
    return artifact(path, documents)


def size(documents, source=None):
    return sum(len(d.text.encode()) for d in documents if source in (None, d.source))


def test_shares_follow_the_weights_under_the_budget(tmp_path):
    given_ = corpus(tmp_path / "in", {"python-a": 60, "python-b": 60, "documentation": 60})
    config = MixConfig(weights={"python-*": 3.0, "documentation": 1.0}, max_bytes=60_000)
    mixed = mix(config, [given_], out=tmp_path / "out")
    train = list(read_documents(mixed, "train"))
    assert abs(size(train) - 60_000) < 3_000
    assert abs(size(train, "documentation") / size(train) - 0.25) < 0.05
    assert {"python-a", "python-b"} < {d.source for d in train}


def test_a_small_source_repeats_up_to_its_epochs_and_others_fill_the_rest(tmp_path):
    given_ = corpus(tmp_path / "in", {"small": 3, "large": 100})
    config = MixConfig(weights={"small": 1.0, "large": 1.0}, max_bytes=50_000, max_epochs=2.0)
    train = list(read_documents(mix(config, [given_], out=tmp_path / "out"), "train"))
    assert Counter(d.text for d in train if d.source == "small").most_common(1)[0][1] == 2
    assert len({d.id for d in train}) == len(train)
    assert size(train) > 45_000


def test_without_a_budget_nothing_repeats(tmp_path):
    given_ = corpus(tmp_path / "in", {"a": 10, "b": 30})
    train = list(read_documents(mix(MixConfig(), [given_], out=tmp_path / "out"), "train"))
    assert sorted(d.id for d in train) == sorted(d.id for d in read_documents(given_, "train"))
    assert [d.id for d in train] != [d.id for d in read_documents(given_, "train")]


def test_held_out_documents_pass_once_and_never_train(tmp_path):
    given_ = corpus(tmp_path / "in", {"a": 10, "b": 10, "unused": 5})
    config = MixConfig(weights={"a": 1.0, "b": 1.0, "unused": 0.0}, max_bytes=30_000)
    mixed = mix(config, [given_], out=tmp_path / "out")
    heldout = [d.id for d in read_documents(mixed, "heldout")]
    assert sorted(heldout) == ["a/held", "b/held"]
    assert not {d.text for d in read_documents(mixed, "train")} & {d.text for d in read_documents(mixed, "heldout")}


def test_training_documents_near_a_held_out_one_of_another_artifact_are_left_out(tmp_path):
    text = prose(77, 60)
    first = artifact(tmp_path / "a", [Document("a/0", prose(1), "a"), Document("a/held", text, "a", split="heldout")])
    second = artifact(
        tmp_path / "b", [Document("b/0", f"{text} And one word more.", "b"), Document("b/1", prose(2), "b")]
    )
    mixed = mix(MixConfig(), [first, second], out=tmp_path / "out")
    assert sorted(d.id for d in read_documents(mixed, "train")) == ["a/0", "b/1"]
    assert mixed.metrics["near_heldout_of_another"] == 1


def test_a_weight_without_a_source_is_an_error_that_lists_the_sources(tmp_path):
    given_ = corpus(tmp_path / "in", {"a": 3})
    with pytest.raises(ConfigError, match="nobody") as error:
        mix(MixConfig(weights={"nobody": 1.0, "*": 1.0}), [given_], out=tmp_path / "out")
    assert "a" in error.value.hint


def test_the_rest_takes_any_source_and_what_no_pattern_matches_is_left_out(tmp_path):
    given_ = corpus(tmp_path / "in", {"a": 3, "b": 3})
    whole = mix(MixConfig(weights={"*": 1.0}), [given_], out=tmp_path / "all")
    only = mix(MixConfig(weights={"a": 1.0}), [given_], out=tmp_path / "only")
    assert {d.source for d in read_documents(whole)} == {"a", "b"}
    assert {d.source for d in read_documents(only)} == {"a"}
    assert only.metrics["sources"]["b"]["weight"] is None


def test_nothing_to_train_on_is_an_error(tmp_path):
    given_ = artifact(tmp_path / "in", [Document("h", prose(1), "a", split="heldout")])
    with pytest.raises(DataError):
        mix(MixConfig(), [given_], out=tmp_path / "out")


def test_the_mix_is_the_same_every_time_and_another_with_another_seed(tmp_path):
    given_ = corpus(tmp_path / "in", {"a": 20, "b": 20})
    config = MixConfig(weights={"a": 1.0, "*": 2.0}, max_bytes=20_000)
    runs = [mix(config, [given_], out=tmp_path / name) for name in ("x", "y")]
    other = mix(replace(config, seed=2), [given_], out=tmp_path / "z")
    assert runs[0].manifest["files"] == runs[1].manifest["files"] != other.manifest["files"]


def test_the_most_particular_pattern_decides():
    weights = {"python-*": 1.0, "python-std*": 1.0, "*": 1.0, "python-stdlib": 1.0}
    assert [belongs_to(s, weights) for s in ("python-stdlib", "python-stdtest", "python-x", "other")] == [
        "python-stdlib", "python-std*", "python-*", "*",
    ]  # fmt: skip
    assert belongs_to("other", {"python-*": 1.0}) is None


@given(
    st.dictionaries(st.sampled_from("abcde"), st.tuples(st.floats(0.01, 9), st.integers(0, 10**6)), min_size=1),
    st.integers(1, 10**7),
    st.floats(0.5, 5),
)
def test_targets_respect_budget_and_epochs_and_waste_nothing(groups, budget, epochs):
    available = {name: size for name, (_, size) in groups.items()}
    config = MixConfig(
        weights={name: weight for name, (weight, _) in groups.items()}, max_bytes=budget, max_epochs=epochs
    )
    targets = _targets(config, available)
    assert all(targets[name] <= available[name] * epochs for name in targets)
    total = min(budget, sum(available.values()) * epochs)
    assert total - len(groups) - 1 <= sum(targets.values()) <= budget


@pytest.mark.parametrize("weights", [{}, {"a": -1.0}, {"a": float("nan")}, {"a": 0.0}])
def test_senseless_weights_are_refused(weights):
    with pytest.raises(ConfigError):
        MixConfig(weights=weights)
