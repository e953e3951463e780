"""What a form of the answer costs: making it, and the mask of each token, for a small and a large vocabulary.

    python benchmarks/forms.py --seconds 3          for each form and vocabulary; half a minute in all

The tokens are drawn at random from what the form allows, so the masks are those of answers. `make` is the time from the
text of the form to a matcher whose first mask is there; `again` the same for a form that was asked for before. Vocabularies:
one of 4,096 tokens and one of Llama 3's size, of random words. Prints a table and writes `benchmarks/results/forms-DATE.json`.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import time
from pathlib import Path

from machine import command, processor, revision

from puna.chat import Structure
from puna.inference.structure import Forms
from puna.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
    "required": ["v", "kids"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "job": {"enum": ["baker", "sailor", "cook"]},
    },
    "required": ["name", "age", "job"],
    "additionalProperties": False,
}
FORMS = {
    "a flat object": Structure(kind="json", text=json.dumps(PERSON)),
    "a recursive object": Structure(kind="json", text=json.dumps({"$ref": "#/$defs/node", "$defs": {"node": NODE}})),
    "any JSON object": Structure(kind="json", text='{"type": "object"}'),
    "a date": Structure(kind="regex", text=r"[0-9]{4}-[01][0-9]-[0-3][0-9]( [A-Za-z ]{1,200}\.)?"),
    "arithmetic": Structure(kind="grammar", text='start: NUMBER | "(" start /[-+*]/ start ")"\nNUMBER: /[0-9]{1,9}/'),
}


def vocabulary(size: int) -> Tokenizer:
    """Bytes, and random words of two to ten letters, about half of them after a space."""
    rng, ranks = random.Random(0), {bytes([b]): b for b in range(256)}
    special = len(Tokenizer(ranks).special_names)
    while len(ranks) < size - special:
        word = " " * rng.randrange(2) + "".join(rng.choice("etaoinshrdlucmfw") for _ in range(rng.randrange(2, 11)))
        ranks.setdefault(word.encode(), len(ranks))
    return Tokenizer(ranks)


def measured(forms: Forms, form: Structure, size: int, seconds: float) -> dict[str, float]:
    """Milliseconds."""
    began = time.perf_counter()
    forms.matcher(form)
    made = time.perf_counter()
    forms.matcher(form)
    again = time.perf_counter()
    times, rng, end = [], random.Random(1), time.monotonic() + seconds
    while time.monotonic() < end:
        matcher = forms.matcher(form)
        for _ in range(100):
            start = time.perf_counter()
            allowed = matcher.allowed(size)
            times.append(1e3 * (time.perf_counter() - start))
            tokens = [i for i, fits in enumerate(allowed.tolist()) if fits]
            matcher.take(rng.choice(tokens))
            if matcher.complete:
                break
    cuts = statistics.quantiles(times, n=100)
    return {
        "make": 1e3 * (made - began),
        "again": 1e3 * (again - made),
        "mask, median": cuts[49],
        "mask, 99th percentile": cuts[98],
        "masks": len(times),
    }


def main() -> None:
    """A table, and a dated record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3, help="for each form and vocabulary")
    parser.add_argument("--out", type=Path, help="where to write the result")
    given = parser.parse_args()
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{os.cpu_count()} cores of {processor()}",
        "revision": revision(),
        "command": command(),
        "unit": "ms",
    }
    for size in (4096, 128_256):
        tokenizer = vocabulary(size)
        forms = Forms(tokenizer)
        began = time.perf_counter()
        forms.matcher(Structure(kind="regex", text="a"))  # what the library keeps of a vocabulary is made once
        found = {"vocabulary": 1e3 * (time.perf_counter() - began)}
        print(f"{size:,} tokens: known after {found['vocabulary']:,.0f} ms")
        for name, form in FORMS.items():
            found[name] = measured(forms, form, tokenizer.vocab_size, given.seconds)
            print(
                f"  {name:20} " + "  ".join(f"{what} {value:,.3f}" for what, value in found[name].items()), flush=True
            )
        record[f"{size} tokens"] = found
    out = given.out or RESULTS / f"forms-{record['date'][:10]}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
