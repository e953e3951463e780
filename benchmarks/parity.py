"""Does each checkpoint format give exactly the model that was stored? Every family x every format, against `transformers`.

    python benchmarks/parity.py                                  all families, at their true width: 8 GB, half an hour
    python benchmarks/parity.py --width 512                      narrower heads: a minute
    python benchmarks/parity.py --only llama-3.2-1b --docs docs/checkpoints.md

For each family `families.py` makes a `transformers` model with random weights. `transformers` writes it as Hugging Face
folders, `puna convert` makes Meta's and GGUF's files from these, and each is read by `puna`, whatever it is, into float32. Both
models read the same tokens, at the first positions and at the last of the context; the table has the largest absolute
difference of any logit. Then 256 greedy tokens, by our engine and by `transformers.generate`; and for the families with
stretched positions a prompt of twice their original context, so that 8,192 positions lie beyond it.

Prints a table, and writes `benchmarks/results/parity-DATE.json` (or `--out`); with `--docs` also the table of that page.
Ends with exit code 1 if some difference reaches 1e-4 or a greedy token differs.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from families import BYTES, PRINTABLE, RELEASED, Cut, Family, reference
from machine import command, processor, revision
from torch import Tensor
from transformers import LlamaForCausalLM

from puna.chat import Request, Sampling
from puna.inference.engine import Engine
from puna.model.conversion import convert
from puna.model.llama import Llama, attend_with
from puna.model.opening import load_checkpoint
from puna.model.sizes import SIZES, LlamaConfig

LIMIT = 1e-4  # of a logit, where logits have a standard deviation near 0.5
THEIRS = "HF BF16 of ours, in transformers"
RESULTS = Path(__file__).parent / "results"
TEXT = "Far above the tree line the herd was counted at dusk, and once more when the sun rose over the puna: "
TABLE = ("<!-- the table of benchmarks/parity.py -->", "<!-- its end -->")


def formats(theirs: LlamaForCausalLM, family: Family, work: Path) -> Iterator[tuple[str, Path]]:
    """The model in one format after the other: what it is, and where. Each is removed when the next is asked for."""
    plain = work / "plain"
    theirs.save_pretrained(plain, max_shard_size="1TB")
    yield "HF F32", plain
    size = sum(weight.nbytes for weight in theirs.parameters())
    made: dict[str, Callable[[Path], Any]] = {
        "HF F32, shards": lambda out: theirs.save_pretrained(out, max_shard_size=size // 3),
        "HF BF16": lambda out: save_as(theirs, torch.bfloat16, out),
        "HF F16": lambda out: save_as(theirs, torch.float16, out),
        f"Meta {family.stored}": lambda out: convert(plain, out, "meta", family.stored, family.shards),
        "GGUF F32": lambda out: convert(plain, out, "gguf", "F32"),
        "GGUF BF16": lambda out: convert(plain, out, "gguf", "BF16"),
        "GGUF F16": lambda out: convert(plain, out, "gguf", "F16"),
    }
    for name, make in made.items():
        out = work / ("model.gguf" if "GGUF" in name else "folder")
        make(out)
        yield name, out
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def save_as(theirs: LlamaForCausalLM, dtype: torch.dtype, out: Path) -> None:
    """Let `transformers` write the model with its weights in `dtype`, without changing it."""
    state = {name: weight.to(dtype) for name, weight in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    theirs.save_pretrained(out, state_dict=state, max_shard_size="1TB")


@torch.no_grad()
def logits(model: Llama | LlamaForCausalLM, tokens: Tensor, positions: Tensor) -> Tensor:
    """Of either model, (B, T, V)."""
    if isinstance(model, Llama):
        return model(tokens, positions, attend_with(None))
    return model(tokens, position_ids=positions, use_cache=False).logits


def batch(family: Family, length: int = 96) -> tuple[Tensor, Tensor]:
    """Tokens and positions (2, T): a row at the beginning of the context, a row at its end."""
    tokens = torch.randint(BYTES.vocab_size, (2, length), generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([0, family.context - length])
    return tokens, starts[:, None] + torch.arange(length)


def expected_config(name: str, family: Family, cut: Cut) -> LlamaConfig:
    """What our table of sizes says of the family, cut likewise."""
    ours, head_dim = SIZES[name], cut.head_dim(family)
    return dataclasses.replace(
        ours, dim=ours.n_heads * head_dim, head_dim=head_dim, n_layers=cut.layers, ffn_dim=cut.ffn,
        vocab_size=BYTES.vocab_size,
    )  # fmt: skip


def differences(name: str, family: Family, cut: Cut, theirs: LlamaForCausalLM, work: Path) -> dict[str, float]:
    """The largest absolute difference of a logit, by format. Stops if a format gives another shape."""
    tokens, positions = batch(family)
    wanted = logits(theirs, tokens, positions)
    found = {}
    for form, path in formats(theirs, family, work):
        ours = load_checkpoint(path, torch.float32)
        if ours.config != expected_config(name, family, cut):
            raise SystemExit(f"{name} as {form} was read as {ours.config}")
        found[form] = (logits(ours, tokens, positions) - wanted).abs().max().item()
        del ours
    # And what we write, read by transformers.
    convert(work / "plain", work / "ours", "huggingface", "BF16")
    read = LlamaForCausalLM.from_pretrained(work / "ours", dtype=torch.float32).eval()
    found[THEIRS] = (logits(read, tokens, positions) - wanted).abs().max().item()
    return found


def greedy(theirs: LlamaForCausalLM, path: Path, tokens: int, prompt: str = TEXT) -> dict[str, Any]:
    """Greedy answers of our engine, which has the model from `path`, and of `transformers`, token by token."""
    engine = Engine(load_checkpoint(path, torch.float32), BYTES)
    completion = engine.generate([Request(prompt=prompt, sampling=Sampling(temperature=0.0, max_tokens=tokens))])[0]
    ours = BYTES.encode(completion.text)
    given = torch.tensor([[BYTES.bos, *BYTES.encode(prompt)]])
    answer = theirs.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    drawn = answer.sequences[0, given.shape[1] :].tolist()
    scores = torch.stack(answer.logits)[:, 0].double()
    best = scores.topk(2).values
    logprob = scores.log_softmax(-1).gather(1, torch.tensor(drawn)[:, None]).sum().item()
    same = next((i for i, pair in enumerate(zip(ours, drawn)) if pair[0] != pair[1]), min(len(ours), len(drawn)))
    return {
        "tokens": len(drawn),
        "same": same,
        "different tokens among them": len(set(drawn)),
        "smallest gap between the best two logits": (best[:, 0] - best[:, 1]).min().item(),
        "gap at the first difference": (best[same, 0] - best[same, 1]).item() if same < len(drawn) else None,
        "difference of the log-likelihood": abs(completion.logprob - logprob),
    }


def compared(name: str, cut: Cut, tokens: int, work: Path, seed: int = 0) -> dict[str, Any]:
    """One family: all formats, then greedy tokens."""
    family, started = RELEASED[name], time.perf_counter()
    theirs = reference(family, cut, seed)
    found = differences(name, family, cut, theirs, work)
    return {
        "cut": cut.told(family),
        "width": theirs.config.hidden_size,
        "meta files": family.shards,
        "largest logit difference": found,
        "greedy": greedy(theirs, work / "plain", tokens),
        "seconds": round(time.perf_counter() - started, 1),
    }


def beyond(name: str, times: float, work: Path, tokens: int = 32) -> dict[str, Any]:
    """A prompt of `times` the original context, read whole by both; then greedy tokens after it.

    One group of true heads (all query heads that share a key/value head), for attention over it takes time.
    """
    family, cut = RELEASED[name], Cut(layers=2, ffn=512, width=384, kv_heads=1)
    theirs = reference(family, cut, seed=1)
    theirs.save_pretrained(work)
    length = int(8192 * times)
    ids = torch.randint(BYTES.vocab_size, (1, length), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(length)[None]
    ours = load_checkpoint(work, torch.float32)
    apart = (logits(ours, ids, positions) - logits(theirs, ids, positions)).abs().amax(-1)[0]
    letters = torch.randint(PRINTABLE.start, PRINTABLE.stop, (length - 1,), generator=torch.Generator().manual_seed(4))
    return {
        "cut": cut.told(family),
        "positions": length,
        "largest logit difference within the original context": apart[:8192].max().item(),
        "largest logit difference beyond it": apart[8192:].max().item(),
        "greedy": greedy(theirs, work, tokens, bytes(letters.tolist()).decode()),
    }


def passed(record: dict[str, Any]) -> bool:
    """Whether every difference is below the limit and every greedy token the same."""
    rows = [*record["families"].values(), *record["beyond the original context"].values()]
    apart = [d for row in rows for d in row.get("largest logit difference", {}).values()]
    apart += [value for row in rows for key, value in row.items() if key.startswith("largest logit difference ")]
    return max(apart) < LIMIT and all(row["greedy"]["same"] == row["greedy"]["tokens"] for row in rows)


def markdown(record: dict[str, Any]) -> str:
    """The tables of `docs/checkpoints.md`."""
    rows = record["families"]
    forms = ["HF F32", "HF F32, shards", "HF BF16", "HF F16", "Meta", "GGUF F32", "GGUF BF16", "GGUF F16", THEIRS]
    lines = [f"| | {' | '.join(forms)} | greedy |", "|---" * (len(forms) + 2) + "|"]
    for name, row in rows.items():
        found = {k.split(" ")[0] if k.startswith("Meta") else k: v for k, v in row["largest logit difference"].items()}
        cells = [f"{found[form]:.1e}" for form in forms]
        cells[forms.index("Meta")] += f" ({row['meta files']})"
        said = row["greedy"]
        lines.append(f"| {name} | {' | '.join(cells)} | {said['same']} of {said['tokens']} |")
    far = record["beyond the original context"]
    if far:
        lines += [
            "",
            "| | positions | within the original 8,192 | beyond | greedy after them |",
            "|---|---|---|---|---|",
        ]
    for name, row in far.items():
        within = row["largest logit difference within the original context"]
        past, said = row["largest logit difference beyond it"], row["greedy"]
        lines.append(
            f"| {name} | {row['positions']:,} | {within:.1e} | {past:.1e} | {said['same']} of {said['tokens']} |"
        )
    cuts = [f"- {name}: width {row['width']:,}; {row['cut']}" for name, row in rows.items()]
    cuts += [f"- {name}, long: {row['cut']}" for name, row in far.items()]
    said = f"`{record['command']}` at {record['revision']}, {record['versions']}, {record['hardware']}."
    return "\n".join([*lines, "", "What was cut:", "", *cuts, "", said])


def put(page: Path, text: str) -> None:
    """Replace what stands between the two marks of `page`."""
    before, rest = page.read_text(encoding="utf-8").split(TABLE[0])
    page.write_text(f"{before}{TABLE[0]}\n\n{text}\n\n{TABLE[1]}{rest.split(TABLE[1])[1]}", encoding="utf-8")


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=RELEASED, default=list(RELEASED), metavar="FAMILY")
    parser.add_argument("--width", type=int, default=16384, help="of a model, at most; wider ones get narrower heads")
    parser.add_argument("--tokens", type=int, default=256, help="greedy ones")
    parser.add_argument("--beyond", type=float, default=2.0, help="length of the long prompt, in original contexts")
    parser.add_argument("--out", type=Path, help="where to write the result")
    parser.add_argument("--docs", type=Path, help="a page whose table to replace")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{torch.get_num_threads()} of {os.cpu_count()} cores of {processor()}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "revision": revision(),
        "command": command(),
        "families": {},
        "beyond the original context": {},
    }
    out = given.out or RESULTS / f"parity-{record['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    stretched = {RELEASED[name]: name for name in reversed(given.only) if RELEASED[name].stretch}  # 3.3 70B is 3.1's
    rows = [("families", name) for name in given.only]
    rows += [
        ("beyond the original context", name) for name in (reversed(stretched.values()) if given.beyond > 1 else [])
    ]
    for part, name in rows:
        with tempfile.TemporaryDirectory() as work:
            if part == "families":
                wide = min(RELEASED[name].hidden, given.width) > 8192
                cut = Cut(layers=1 if wide else 2, width=given.width)
                row = compared(name, cut, given.tokens, Path(work))
            else:
                row = beyond(name, given.beyond, Path(work))
        record[part][name] = row
        print(name, json.dumps(row), file=sys.stderr)
        out.write_text(json.dumps(record, indent=1) + "\n")  # what is there is kept if the rest does not come
    print(markdown(record))
    if given.docs:
        put(given.docs, markdown(record))
    sys.exit(0 if passed(record) else "some row failed: see above")


if __name__ == "__main__":
    main()
