"""The dialogues stage: deterministic, faulty in the share that was asked for, and disjoint from its evaluation."""

import json
from dataclasses import replace

import pytest

from puna.chat import ToolCall, assistant, dialog_from_json, dialog_to_json, user
from puna.errors import ConfigError
from puna.posttrain.tasks.build import TASKS, DialogConfig, build_dialogs
from puna.posttrain.tasks.dialogs_io import (
    item_from_json,
    item_to_json,
    read_dialogs,
    read_items,
)
from puna.posttrain.tasks.item import Item
from puna.posttrain.tasks.overlap import overlaps
from puna.posttrain.tasks.transcripts import TranscriptConfig, pretraining_dialogs, transcript, transcripts
from puna.posttrain.tasks.verify import verify
from puna.posttrain.world import WorldConfig, build_world, documents, load_world
from puna.train.objectives.sft import read_lines

FILES = ("sft.jsonl", "prompts.jsonl", "dev.jsonl", "eval.jsonl", "choice.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(WorldConfig(), out=tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="module")
def dialogs(world, tmp_path_factory):
    return build_dialogs(DialogConfig(), world, out=tmp_path_factory.mktemp("dialogs") / "dialogs")


def test_the_same_configuration_writes_the_same_bytes(world, dialogs, tmp_path):
    again = build_dialogs(DialogConfig(), world, out=tmp_path / "again")
    other = build_dialogs(DialogConfig(seed=1), world, out=tmp_path / "other")
    for name in FILES:
        assert again.file(name).read_bytes() == dialogs.file(name).read_bytes()
        assert other.file(name).read_bytes() != dialogs.file(name).read_bytes()


def test_nothing_of_the_evaluation_is_in_training(world, dialogs):
    texts = [document.text for document in documents(load_world(world))]
    records = list(read_lines(dialogs.file("sft.jsonl")))
    told = pretraining_dialogs(load_world(world), TranscriptConfig())
    records += [{"dialog": dialog_to_json(dialog)} for dialog in told]
    prompts, items = (read_items(dialogs.file(f"{name}.jsonl")) for name in ("prompts", "eval"))
    items += read_items(dialogs.file("dev.jsonl"))
    assert all(item.entities for item in items)
    assert overlaps(texts, records, prompts, items) == []
    assert dialogs.metrics["overlaps"] == 0


def test_transcripts_are_a_function_of_the_seed_and_say_who_speaks(world):
    invented, config = load_world(world), TranscriptConfig(counts={"arithmetic": 20, "functions": 20})
    texts = [document.text for document in transcripts(invented, config)]
    assert texts == [document.text for document in transcripts(invented, config)] and len(set(texts)) == 40
    assert texts != [document.text for document in transcripts(invented, replace(config, seed=1))]
    call = ToolCall(name="wolfram_alpha", arguments={"query": "2 + 3"}, dialect="builtin")
    told = transcript((user("What is 2 + 3?"), assistant("", call)))
    assert told == 'user:\nWhat is 2 + 3?\nassistant:\nwolfram_alpha.call(query="2 + 3")\n'


def test_transcripts_of_an_unknown_task_are_refused():
    with pytest.raises(ConfigError, match="no such task"):
        TranscriptConfig(counts={"poetry": 1})


def test_dev_and_evaluation_share_nothing_either(dialogs):
    dev, evaluation = (
        {entity for item in read_items(dialogs.file(f"{name}.jsonl")) for entity in item.entities}
        for name in ("dev", "eval")
    )
    assert dev.isdisjoint(evaluation)


@pytest.mark.parametrize(
    ("entity", "read", "said", "call"),
    [
        ("person:Kari Tolvu", "Kari Tolvu works.", "", {}),
        ("person:Kari Tolvu", "", "Who is Kari Tolvu?", {}),
        ("known:Kari Tolvu", "", "Who is Kari Tolvu?", {}),
        ("person:Kari Tolvu", "", "", {"query": "Kari Tolvu"}),
        ("word:kamo", "", "Say KAMO.", {}),
        ("function:kamo", "kamo is here", "", {}),
        ("operand:31", "", "What is 31 + 4?", {}),
        ("operand:31", "", "", {"a": 31}),
    ],
)
def test_each_kind_of_overlap_is_found(entity, read, said, call):
    item = Item(task="t", variant="v", id="i", dialog=(user("new"),), entities=(entity,))
    messages = (user(said or "other"), assistant("", ToolCall(name="f", arguments=call)))
    record = {"dialog": dialog_to_json(messages)}
    assert overlaps([read], [record], [], [item]) == [f"i: {entity} is in training"]
    assert overlaps(["Kari said"], [{"dialog": dialog_to_json((user("Tolvu 310"), assistant("31")))}], [], [item]) == []


def test_a_known_person_may_be_read_about_and_a_shared_prompt_is_found():
    item = Item(task="t", variant="v", id="i", dialog=(user("Who?"),), entities=("known:Kari Tolvu",))
    assert overlaps(["Kari Tolvu works."], [], [], [item]) == []
    assert overlaps([], [], [replace(item, id="p")], [item]) == ["i: the prompt is one of training"]


def test_prompts_for_sampling_are_no_prompts_of_demonstrations(dialogs):
    demonstrated = {dialog[i].content for dialog in read_dialogs(dialogs.file("sft.jsonl")) for i in (0, 1)}
    prompts = read_items(dialogs.file("prompts.jsonl"))
    assert len(prompts) > 1000
    assert not [item.id for item in prompts if item.dialog[-1].content in demonstrated]


def test_ids_are_unique(dialogs):
    for name in FILES:
        ids = [record["id"] for record in read_lines(dialogs.file(name))]
        assert len(set(ids)) == len(ids)


def test_a_demonstration_passes_its_item_unless_it_is_faulty(dialogs):
    for record in read_lines(dialogs.file("sft.jsonl")):
        item, dialog = item_from_json(record["item"]), dialog_from_json(record["dialog"])
        assert item.id == record["id"]
        assert verify(item, dialog) is not record["faulty"]


def test_faults_come_in_the_share_asked_for_and_are_marked(world, tmp_path):
    counts = dict.fromkeys(TASKS, 0)
    config = DialogConfig(
        demonstrations={"constraints": 400, "facts": 100},
        prompts=counts,
        dev=counts,
        evaluation=counts,
        noise={"constraints": 0.5},
        choices=0,
    )
    built = build_dialogs(config, world, out=tmp_path / "noisy")
    assert 160 < built.metrics["faulty"]["constraints"] < 240
    assert "facts" not in built.metrics["faulty"]
    assert built.metrics["demonstrations"] == {"constraints": 400, "facts": 100}
    assert built.metrics["faulty"]["constraints"] == sum(r["faulty"] for r in read_lines(built.file("sft.jsonl")))


def test_every_task_is_there_in_the_numbers_asked_for(dialogs):
    config = DialogConfig()
    for name, asked in (("eval", config.evaluation), ("dev", config.dev), ("prompts", config.prompts)):
        assert sum(dialogs.metrics[name].values()) == sum(asked.values())
    assert sum(dialogs.metrics["demonstrations"].values()) == sum(config.demonstrations.values())


def test_items_read_back_equal(dialogs):
    for item in read_items(dialogs.file("eval.jsonl")):
        assert item_from_json(json.loads(json.dumps(item_to_json(item)))) == item
        assert not verify(item, item.dialog)


@pytest.mark.parametrize("change", [{"noise": {"facts": 1.5}}, {"evaluation": {"fact": 3}}, {"dev": {"facts": -1}}])
def test_an_impossible_configuration_is_refused(change):
    with pytest.raises(ConfigError):
        DialogConfig(**change)
