"""What the fuzzer breaks: small valid checkpoints and tokenizers of every kind, and what is then done with a broken one.

What is accepted is used as a person would use it: inspected, loaded, run on a few tokens; its tokenizer encodes and
decodes.
"""

import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TEXT = "The llama's 1,234 steps — 山! <|eot_id|> </s> \x00"


@dataclass(frozen=True)
class Target:
    """A valid checkpoint: the content of its files, those to break, and what is then done with the broken one."""

    files: Mapping[str, bytes]
    broken: tuple[str, ...]
    use: Callable[[Path], None]
    scope: Callable[[str], str] = lambda _: "."  # the file that was broken -> what is used, in the folder


def target(name: str) -> Target:
    """The target `name`, made anew."""
    with tempfile.TemporaryDirectory() as folder:
        return _MAKERS[name](Path(folder))


def _weights(folder: Path) -> Target:
    """A Hugging Face folder in two shards."""
    _save(folder)
    from safetensors.torch import load, save

    state = load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    halves = [dict(list(state.items())[n::2]) for n in range(2)]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        (folder / name).write_bytes(save(half, {"format": "pt"}))
    index = {"metadata": {}, "weight_map": {t: n for n, half in zip(names, halves, strict=True) for t in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Target(_contents(folder), (*names, "model.safetensors.index.json"), use_model)


def _config(folder: Path) -> Target:
    _save(folder)
    return Target(_contents(folder), ("config.json",), use_model)


def _meta(folder: Path) -> Target:
    from puna.model.meta import write_meta

    write_meta(small_model(), None, folder, 2)
    return Target(_contents(folder), ("consolidated.00.pth", "consolidated.01.pth", "params.json"), use_model)


def _gguf(folder: Path) -> Target:
    from puna.model.gguf import write_gguf

    write_gguf(small_model(), byte_level(), folder / "a.gguf", "Q4_0")
    write_gguf(small_model(), llama2_vocabulary(), folder / "b.gguf", "F32")
    return Target(_contents(folder), ("a.gguf", "b.gguf"), use_gguf, lambda file: file)


def _tokenizer(folder: Path) -> Target:
    from puna.tokenizer.bpe import write_ranks
    from puna.tokenizer.export import write_hugging_face

    tokenizer = byte_level()
    for name in ("ranks", "llama3", "llama2", "pieces"):
        (folder / name).mkdir()
    write_ranks(folder / "ranks/tokenizer.model", tokenizer.ranks)
    write_hugging_face(folder / "llama3", tokenizer, context=64)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / "llama3" / name).unlink()
    (folder / "llama2/tokenizer.json").write_text(json.dumps(_llama2_json()))
    (folder / "pieces/tokenizer.model").write_bytes(_sentencepiece())
    decoder = {"added_tokens_decoder": {str(len(_pieces())): {"content": "<pad>"}}}
    (folder / "pieces/tokenizer_config.json").write_text(json.dumps(decoder))
    files = _contents(folder)
    return Target(files, tuple(files), use_tokenizer, os.path.dirname)


_MAKERS = {"safetensors": _weights, "config": _config, "tokenizer": _tokenizer, "gguf": _gguf, "meta": _meta}


def small_model():
    from puna.model.llama import Llama
    from puna.model.sizes import LlamaConfig, RopeScaling

    config = LlamaConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=32, vocab_size=544, context=64,
        rope_theta=5e5, rope_scaling=RopeScaling(original_context=16),
    )  # fmt: skip
    return Llama(config).init_weights(0)


def _save(folder: Path) -> None:
    from puna.model.checkpoint import save_model

    save_model(small_model(), None, folder)


def byte_level():
    from puna.tokenizer import Tokenizer

    words = [b"th", b"the", b" the", b"ll", b"am", b"llam", "é".encode(), "山".encode()[:2], "山".encode()]
    return Tokenizer({word: id for id, word in enumerate([*(bytes([b]) for b in range(256)), *words])})


def _pieces() -> list[tuple[str, float, int]]:
    """A vocabulary of Llama 2's kind: text, score, kind."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    words = ["▁▁", "▁t", "he", "▁the", "ll", "am", "llam", "llama"]
    letters = sorted(set("".join(words)) | set("abc"))
    return pieces + [(w, float(-n), 1) for n, w in enumerate([*words, *letters])]


def _sentencepiece() -> bytes:
    """The same as SentencePiece stores it: see `protobuf.py`."""

    def field(number: int, content: bytes) -> bytes:
        size, head = len(content), bytes([number << 3 & 127 | 2 | (128 if number > 15 else 0)])
        head += bytes([number >> 4]) if number > 15 else b""
        return head + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + content

    pieces = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
        for text, score, kind in _pieces()
    )
    return pieces + field(2, b"\x18\x02\x98\x02\x01") + field(3, b"\x18\x01\x20\x00\x28\x01")


def _llama2_json() -> dict:
    vocab = {text: id for id, (text, _, _) in enumerate(_pieces())}
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"], ["l", "l"], ["a", "m"], ["ll", "am"], ["llam", "a"]]
    special = [{"id": i, "content": name, "special": True} for i, name in enumerate(["<unk>", "<s>", "</s>"])]
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges},
    }  # fmt: skip


def llama2_vocabulary():
    from puna.model.gguf.vocabulary import Vocabulary

    pieces = _pieces()
    pieces += [(f"[PAD{id}]", 0.0, 5) for id in range(len(pieces), small_model().config.vocab_size)]
    texts, scores, kinds = zip(*pieces, strict=True)
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    return Vocabulary(model="llama", tokens=texts, scores=scores, types=kinds, ids=ids, add_bos=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def use_model(path: Path) -> None:
    """Open, inspect, load and run."""
    import torch

    from puna.model.inspect import inspect
    from puna.model.llama import attend_with
    from puna.model.opening import load_checkpoint, open_checkpoint

    with open_checkpoint(path) as opened:
        inspect(opened.kind, opened.config, opened.weights)
    model = load_checkpoint(path)
    tokens = torch.arange(3).view(1, 3) % model.config.vocab_size
    with torch.no_grad():
        assert model(tokens, torch.arange(3).view(1, 3), attend_with(None)).shape == (1, 3, model.config.vocab_size)


def use_gguf(path: Path) -> None:
    """The model, and the vocabulary in the file."""
    from puna.model.opening import checkpoint_tokenizer

    use_model(path)
    _round_trip(checkpoint_tokenizer(path))


def use_tokenizer(path: Path) -> None:
    """Read, encode, decode."""
    from puna.tokenizer import load_tokenizer

    _round_trip(load_tokenizer(path))


def _round_trip(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    tokenizer.decode(range(tokenizer.vocab_size))
    if type(tokenizer).__name__ == "Tokenizer":
        assert tokenizer.decode(ids) == TEXT
