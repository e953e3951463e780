"""How fast text becomes ids: ours next to the library of `transformers`, `tiktoken` and `sentencepiece`, in one run on one text.

    python benchmarks/encode.py                                  on the sources of this Python's standard library
    python benchmarks/encode.py --text corpus.txt --megabytes 20
    python benchmarks/encode.py --llama3 DIR --llama2 DIR        with released vocabularies

Two vocabularies, as byte-level ranks (Llama 3) and as SentencePiece pieces (Llama 1 and 2); where no directory is given one is
learnt from the text itself, of `--vocabulary` tokens. Everyone gets the same documents one by one, on one thread, and must
give the same ids: a run in which they differ fails. Prints a table, and writes `benchmarks/results/encode-DATE.json` (or
`--out`): megabytes and tokens per second of each, the best of `--rounds`, and ours as a ratio to each peer. Ours forgets the
words it remembers before each round; the peers keep theirs. Nothing else should run on the machine meanwhile.
"""

import argparse
import datetime
import io
import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from machine import processor, revision

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from puna.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from puna.tokenizer.bpe import write_ranks
from puna.tokenizer.export import write_hugging_face
from puna.tokenizer.pretokens import PATTERN
from puna.tokenizer.train import train_ranks

RESULTS = Path(__file__).parent / "results"
Encode = Callable[[str], list[int]]
Encoders = dict[str, Callable[[], Encode]]  # what is called before each round, and gives what is measured


def documents(path: Path | None, megabytes: float) -> list[str]:
    """The file `path`, or Python's own modules, in documents of at most 100,000 characters, up to `megabytes`."""
    found, size = [], 0
    for file in [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), 100_000):
            found.append(text[start : start + 100_000])
            size += len(found[-1].encode())
            if size >= megabytes * 1e6:
                return found
    return found


def byte_level(given: Path | None, texts: list[str], vocabulary: int, work: Path) -> Encoders:
    """Who encodes with a Llama 3 vocabulary: ours, `transformers` from our JSON of it, `tiktoken` from the ranks."""
    import tiktoken
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(given) if given else Tokenizer(train_ranks(texts, vocabulary))
    if not isinstance(ours, Tokenizer):
        raise SystemExit(f"{given} is not a byte-level vocabulary")
    write_ranks(work / "tokenizer.model", ours.ranks)
    write_hugging_face(work, ours, context=8192)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json"))
    plain = tiktoken.Encoding(name="peer", pat_str=PATTERN, mergeable_ranks=ours.ranks, special_tokens={})
    return {
        "puna": lambda: ours.encode,
        "transformers": lambda: lambda text: fast(text, add_special_tokens=False, split_special_tokens=True).input_ids,
        "tiktoken": lambda: plain.encode_ordinary,
    }


def sentencepiece(given: Path | None, texts: list[str], vocabulary: int) -> Encoders:
    """Who encodes with a Llama 2 vocabulary: ours, `sentencepiece`, and `transformers` from the same pieces."""
    import sentencepiece as library
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        if given:
            path.write_bytes((given / "tokenizer.model" if given.is_dir() else given).read_bytes())
        else:
            path.write_bytes(learnt(library, texts, vocabulary))
        ours = load_tokenizer(path)
        peer = library.SentencePieceProcessor(model_file=str(path))
    if not isinstance(ours, SentencePieceTokenizer):
        raise SystemExit(f"{given} is not a SentencePiece model")
    ids = {piece.text: id for id, piece in enumerate(ours.pieces)}
    scores = {piece.text: piece.score for piece in ours.pieces if piece.kind == 1}
    # The older behaviour, which puts a space before every text as SentencePiece does; a file of it has this normaliser.
    fast = LlamaTokenizer(vocab=ids, merges=generate_merges(ids, scores))
    from tokenizers import normalizers

    fast.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.backend_tokenizer.pre_tokenizer = None
    return {
        "puna": lambda: SentencePieceTokenizer(ours.pieces).encode,
        "sentencepiece": lambda: peer.encode,
        "transformers": lambda: lambda text: fast(text, add_special_tokens=False, split_special_tokens=True).input_ids,
    }


def learnt(library, texts: list[str], vocabulary: int) -> bytes:
    """A SentencePiece model with Llama 2's options."""
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=lines(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def lines(texts: list[str]) -> Iterator[str]:
    """The lines that are not empty: what the trainer counts words in."""
    for text in texts:
        yield from (line for line in text.splitlines() if line.strip())


def measured(encoders: Encoders, texts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Each one's speed on `texts`. Stops where the ids differ."""
    size = sum(len(text.encode()) for text in texts)
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    ids: dict[str, list[list[int]]] = {}
    for _ in range(rounds):  # in turns, so that a busy moment hits everyone
        for name, prepare in encoders.items():
            encode = prepare()
            started = time.perf_counter()
            ids[name] = [encode(text) for text in texts]
            seconds[name].append(time.perf_counter() - started)
    for name, found in ids.items():
        if found != ids["puna"]:
            place = next(i for i, (mine, theirs) in enumerate(zip(ids["puna"], found)) if mine != theirs)
            raise SystemExit(f"{name} gives other ids than puna for document {place}")
    tokens = sum(map(len, ids["puna"]))
    ours = min(seconds["puna"])
    return {
        name: {
            "megabytes per second": round(size / min(times) / 1e6, 3),
            "tokens per second": round(tokens / min(times)),
            "puna's speed as a ratio to this": round(min(times) / ours, 3),
        }
        for name, times in seconds.items()
    } | {"text": {"documents": len(texts), "bytes": size, "tokens": tokens}}


def main() -> None:
    """Learn or read two vocabularies, measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, help="a text file; the standard library's sources by default")
    parser.add_argument("--megabytes", type=float, default=10, help="how much of it, at most")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens to learn where no vocabulary is given")
    parser.add_argument("--llama3", type=Path, help="directory with a byte-level vocabulary")
    parser.add_argument("--llama2", type=Path, help="directory or file with a SentencePiece model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the result")
    given = parser.parse_args()
    texts = documents(given.text, given.megabytes)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"one thread of {os.cpu_count()} cores of {processor()}",
        "revision": revision(),
        "command": " ".join(["python benchmarks/encode.py", *sys.argv[1:]]),
    }
    with tempfile.TemporaryDirectory() as work:
        encoders = byte_level(given.llama3, texts, given.vocabulary, Path(work))
        record["byte-level"] = measured(encoders, texts, given.rounds)
    encoders = sentencepiece(given.llama2, texts, given.vocabulary)
    record["sentencepiece"] = measured(encoders, texts, given.rounds)
    for kind in ("byte-level", "sentencepiece"):
        for name, speed in record[kind].items():
            if name != "text":
                print(f"{kind:14} {name:14} " + "  ".join(f"{value:>12,} {what}" for what, value in speed.items()))
    out = given.out or RESULTS / f"encode-{record['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
