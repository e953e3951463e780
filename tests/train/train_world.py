"""A small world for training tests: a learnt tokenizer, a few documents, dialogs and preferences, a toy model."""

import json
from dataclasses import dataclass
from pathlib import Path

from puna import artifacts, chat
from puna.curation.documents import Document, write_documents
from puna.model.sizes import LlamaConfig
from puna.tokenizer.shards import TokeniseConfig, tokenise
from puna.tokenizer.train import TokenizerConfig, train_tokenizer

TOY = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=528, context=128, tied=True
)


@dataclass(frozen=True, kw_only=True)
class Nothing:
    pass


@artifacts.stage("documents")
def some_documents(config, *, out):
    texts = [
        f"Story {i}. " + " ".join(f"the {w} {w} has {i * 7 % 13} legs." for w in ["ox", "ant", "hen", "cat"])
        for i in range(60)
    ]
    documents = [
        Document(id=str(i), text=t, source="s", split="heldout" if i % 6 == 0 else "train") for i, t in enumerate(texts)
    ]
    write_documents(out / "documents.parquet", documents)
    return {}


def dialog(i: int) -> chat.Dialog:
    return (chat.user(f"How many legs has ant {i}?"), chat.assistant(f"It has {i % 9} legs."))


@artifacts.stage("dialogs")
def some_dialogs(config, *, out):
    lines = [{"dialog": chat.dialog_to_json(dialog(i))} for i in range(40)]
    (out / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {}


@artifacts.stage("preferences")
def some_preferences(config, *, out):
    lines = []
    for i in range(24):
        prompt, good = dialog(i)[:1], dialog(i)[1:]
        bad = (chat.assistant(f"Sure! It has {(i + 1) % 9}"),)
        sides = {"prompt": prompt, "chosen": good, "rejected": bad}
        lines.append({name: chat.dialog_to_json(side) for name, side in sides.items()})
    (out / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {}


@dataclass(frozen=True)
class SmallWorld:
    tokens: artifacts.Artifact
    tokenizer: artifacts.Artifact
    dialogs: artifacts.Artifact
    preferences: artifacts.Artifact


def build(folder: Path) -> SmallWorld:
    documents = some_documents(Nothing(), out=folder / "documents")
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=528, context=128), documents, out=folder / "tokenizer")
    return SmallWorld(
        tokens=tokenise(TokeniseConfig(), documents, tokenizer, out=folder / "tokens"),
        tokenizer=tokenizer,
        dialogs=some_dialogs(Nothing(), out=folder / "dialogs"),
        preferences=some_preferences(Nothing(), out=folder / "preferences"),
    )
