"""What llama.cpp makes of the GGUF files written here, and what its own quantiser makes of the same weights.

    python benchmarks/llamacpp.py --model out/tiny/07-base              a trained checkpoint with its tokenizer
    python benchmarks/llamacpp.py --model DIR --text held-out.txt --tokens 16384

Four questions, in one run (`llama-cpp-python` must be installed: `pip install -e ".[peers]"`):

1. Greedy tokens: the F32, BF16 and F16 files, in llama.cpp and in our model, after prompts from the text.
2. Perplexity of the text from the same file: by llama.cpp, and by our model with the weights that our reader unpacks. Ours
   multiplies in float32. llama.cpp rounds what goes into each product first, to float16 or to 8 bits in blocks of 32 or 256,
   so the two agree within noise and not to the bit. The noise has no direction: the mean difference must be below three of
   its standard errors, or below 0.2% of a nat per token.
3. Quantisers: llama.cpp's and ours on the same F32 file, judged by the same reader: KL divergence from the F32 model, in nats
   per token, and the files' sizes.
4. Tokens: `Llama.tokenize` with the vocabulary in the file, ours, and `tiktoken`, on generated strings.

Q4_K and Q6_K pack 256 weights of a row together. A model whose rows do not divide so is first widened without changing what it
computes (`widened`), or these kinds would not be measured. Writes `benchmarks/results/llamacpp-DATE.json` (or `--out`).
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import tiktoken
import torch
from encode import documents
from machine import command, processor, revision
from torch import Tensor

from puna.model.checkpoint import empty_model
from puna.model.gguf import KINDS, load_gguf, write_gguf
from puna.model.llama import Llama, attend_with
from puna.model.opening import checkpoint_tokenizer, load_checkpoint
from puna.tokenizer import Tokenizer
from puna.tokenizer.pretokens import PATTERN

RESULTS = Path(__file__).parent / "results"
BLOCK = 256
_F32 = 0  # ggml's number, for the types of llama.cpp's cache
# What strings are made of: words and contractions, digits, blanks of all kinds, marks, scripts, controls, special tokens' text.
PIECES = (
    "the herd Puna WORLD it's I'LL we'Ve 'm don't x1y2 snake_case CamelCase 1 22 333 4444 55555 3.14 1,000,000 -7 2e10 0x1F "
    "... ?! -- => {}[]() <tag/> @user #tag $5 50% a/b\\c ''' \"\"\" ¿qué? naïve Zürich façade Straße ﬁn İstanbul ŉ ǅ "
    "Привет мир Ελλάδα שלום مرحبا ١٢٣ नमस्ते हिन्दी ไทย ภาษา 日本語 テキスト 中文字符 한국어 𝒳𝟙𝟚 ½ ² Ⅷ ㊿ ٣٫١٤ 👍 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 a\u0308\u0323 "
    "<|eot_id|> <|begin_of_text|> <|start_header_id|>user <|reserved_special_token_9|> <s> </s> [INST] \u200b \u200d \u00ad "
    "\ufeff \ufffd \ue000 \U0010fffd \x01 \x1b[0m \x7f \x80 \u0378 ʼ ’s ‘ll ſ K"
).split(" ")
BLANKS = [" ", "  ", "   ", " " * 17, "\n", "\n\n", "\r\n", "\r", "\t", " \n", "\n ", "\t\n", "\x0b", "\x0c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"]  # fmt: skip


def strings(count: int, seed: int) -> list[str]:
    """Generated texts, each of up to a dozen pieces with blanks between some."""
    rng = random.Random(seed)
    return [
        "".join(
            rng.choice(PIECES) + (rng.choice(BLANKS) if rng.random() < 0.6 else "") for _ in range(rng.randint(1, 12))
        )
        for _ in range(count)
    ]


def widened(model: Llama) -> Llama:
    """The same function in a model whose rows are multiples of 256 long: more columns and heads, all of them zero.

    The root mean square is then over more numbers, of which the new ones are zero; norms and epsilon make up for it.
    """
    old = model.config
    group, heads = old.n_heads // old.n_kv_heads, old.n_heads
    while heads * old.head_dim % BLOCK or heads % old.n_kv_heads:
        heads += 1
    dim, ffn = (size + -size % BLOCK for size in (old.dim, old.ffn_dim))
    share = old.dim / dim
    config = dataclasses.replace(old, dim=dim, ffn_dim=ffn, n_heads=heads, norm_eps=old.norm_eps * share)
    wide = empty_model(config, torch.float32)
    with torch.no_grad():
        for (name, weight), given in zip(wide.named_parameters(), model.parameters(), strict=True):
            weight.zero_()
            if "wq" in name or "wo" in name:  # each group of heads gets its new heads behind its own
                given, part = (w.T if "wo" in name else w for w in (given, weight))
                part = part.view(old.n_kv_heads, -1, part.shape[1])[:, : group * old.head_dim, : given.shape[1]]
                part.copy_(given.reshape(old.n_kv_heads, -1, given.shape[1]))
            elif weight.ndim == 1:
                weight[: len(given)] = given * share**0.5
            else:
                weight[: given.shape[0], : given.shape[1]] = given
    return wide


def quantised_by_llama_cpp(source: Path, out: Path, file_type: int) -> None:
    """Let llama.cpp quantise the F32 file `source`; `file_type` is its number for the kind, as in `KINDS`."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = file_type, 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), settings) != 0:
        raise SystemExit(f"llama.cpp did not quantise {source} as {file_type}")


class Theirs:
    """A GGUF file in llama.cpp, its cache in float32."""

    def __init__(self, path: Path, context: int):
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_gpu_layers=0, type_k=_F32,
            type_v=_F32, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(),
        )  # fmt: skip

    def logits(self, ids: list[int]) -> Tensor:
        """After each of the tokens, (T, V)."""
        self._llama.reset()
        self._llama.eval(ids)
        return torch.tensor(self._llama.scores[: len(ids)])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` tokens that follow."""
        drawn: list[int] = []
        for token in self._llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            drawn.append(token)
            if len(drawn) == count:
                break
        return drawn

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: no begin token, and no special token however it is spelt."""
        return self._llama.tokenize(text.encode(), add_bos=False, special=False)


class Ours:
    """A GGUF file in our model, unpacked to float32."""

    def __init__(self, path: Path):
        self._model = load_gguf(path, torch.float32).eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """After each of the tokens, (T, V)."""
        return self._model(torch.tensor([ids]), torch.arange(len(ids))[None], attend_with(None))[0]

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """The `count` tokens that follow, and by how much the logit of each was above the second best."""
        ids, gaps = list(ids), []
        for _ in range(count):
            best = self.logits(ids)[-1].topk(2)
            gaps.append((best.values[0] - best.values[1]).item())
            ids.append(int(best.indices[0]))
        return ids[-count:], gaps


def same_greedy(path: Path, prompts: list[list[int]], count: int, context: int) -> dict[str, Any]:
    """How many greedy tokens agree, and how sure our model was where the first one does not."""
    ours, theirs, agreed, gaps, distinct = Ours(path), Theirs(path, context), 0, [], set()
    for prompt in prompts:
        mine, sure = ours.greedy(prompt, count)
        other = theirs.greedy(prompt, count)
        same = next((i for i, pair in enumerate(zip(mine, other)) if pair[0] != pair[1]), count)
        agreed += same
        distinct |= set(mine)
        gaps += [sure[same]] if same < count else []
    return {
        "prompts": len(prompts),
        "tokens": count * len(prompts),
        "same": agreed,
        "different tokens among them": len(distinct),
        "gaps at first differences": gaps,
    }


def read_by_both(path: Path, plain: Path, texts: list[list[int]]) -> dict[str, float]:
    """Perplexity of `texts` from the file `path` by both, their difference, and divergence from the F32 file `plain`."""
    ours, theirs, exact = Ours(path), Theirs(path, max(map(len, texts))), Ours(plain)
    losses, divergence, apart = [], [], 0.0
    for ids in texts:
        mine, other = ours.logits(ids), theirs.logits(ids)
        wanted = torch.tensor(ids[1:])
        losses.append(torch.stack([loss(mine, wanted), loss(other, wanted)]))
        divergence.append(kl(exact.logits(ids), mine))
        apart = max(apart, (mine - other).abs().max().item())
    both = torch.cat(losses, dim=1).double()
    difference = both[0] - both[1]
    return {
        "bytes": path.stat().st_size,
        "tokens": both.shape[1],
        "perplexity, ours": both[0].mean().exp().item(),
        "perplexity, llama.cpp": both[1].mean().exp().item(),
        "difference in nats per token": difference.mean().item(),
        "its standard error": (difference.std() / len(difference) ** 0.5).item(),
        "largest logit difference": apart,
        "KL from F32, nats per token": torch.cat(divergence).double().mean().item(),
    }


def agrees(read: dict[str, float]) -> bool:
    """Whether the two perplexities are one but for noise without a direction."""
    return abs(read["difference in nats per token"]) < max(3 * read["its standard error"], 2e-3)


def loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Nats of each next token."""
    return torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="none")


def kl(exact: Tensor, other: Tensor) -> Tensor:
    """Of each place, nats."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def tokens_compared(path: Path, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """How many strings llama.cpp and `tiktoken` encode as we do; those that differ, with what each says."""
    theirs = Theirs(path, 8)
    plain = tiktoken.Encoding(name="peer", pat_str=PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={})
    differ, wrong = [], 0
    for text in texts:
        mine, other, third = tokenizer.encode(text), theirs.encode(text), plain.encode_ordinary(text)
        wrong += mine != third
        if mine != other:
            differ.append({"text": text, "ours": mine, "llama.cpp": other, "tiktoken": third})
    return {"strings": len(texts), "unlike tiktoken": wrong, "unlike llama.cpp": len(differ), "differing": differ}


def cut_up(tokenizer: Tokenizer, documents: Iterator[str] | list[str], count: int, length: int) -> list[list[int]]:
    """About `count` tokens of text in windows, each beginning with the begin token."""
    ids = [id for text in documents for id in tokenizer.encode(text)][:count]
    return [[tokenizer.bos, *ids[start : start + length - 1]] for start in range(0, len(ids) - 1, length - 1)]


def measured(model: Llama, tokenizer: Tokenizer, texts: list[list[int]], work: Path, say: Callable) -> dict[str, Any]:
    """All but the tokens, for one model."""
    found: dict[str, Any] = {"greedy": {}, "files": {}}
    context = max(map(len, texts))
    for kind in KINDS:
        write_gguf(model, tokenizer, work / f"{kind}.gguf", kind)
    for kind in ("F32", "BF16", "F16"):
        prompts = [text[:24] for text in texts[:8]]
        count = min(128, context - 24)
        found["greedy"][kind] = same_greedy(work / f"{kind}.gguf", prompts, count, context)
        say(kind, found["greedy"][kind])
    for kind in KINDS:
        by = {"ours": work / f"{kind}.gguf"}
        if kind not in ("F32", "F16", "BF16"):
            by["llama.cpp"] = work / f"theirs-{kind}.gguf"
            quantised_by_llama_cpp(work / "F32.gguf", by["llama.cpp"], KINDS[kind][0])
        for who, path in by.items():
            found["files"][f"{kind} by {who}"] = read_by_both(path, work / "F32.gguf", texts)
            say(f"{kind} by {who}", found["files"][f"{kind} by {who}"])
    return found


def main() -> None:
    """Write the files, ask the four questions, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint with a byte-level tokenizer")
    parser.add_argument("--text", type=Path, help="a text file; the standard library's sources by default")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text")
    parser.add_argument("--strings", type=int, default=2_000)
    parser.add_argument("--out", type=Path, help="where to write the result")
    given = parser.parse_args()
    model, tokenizer = load_checkpoint(given.model, torch.float32), checkpoint_tokenizer(given.model)
    if not isinstance(tokenizer, Tokenizer):
        raise SystemExit(f"{given.model} has no byte-level vocabulary")
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{torch.get_num_threads()} of {os.cpu_count()} cores of {processor()}",
        "versions": f"torch {torch.__version__}, llama-cpp-python {llama_cpp.__version__}",
        "revision": revision(),
        "command": command(),
        "model": dataclasses.asdict(model.config),
    }
    wide = widened(model)
    record["widened to"] = {"dim": wide.config.dim, "heads": wide.config.n_heads, "ffn": wide.config.ffn_dim}
    texts = cut_up(tokenizer, documents(given.text, given.tokens / 1e5), given.tokens, min(512, model.config.context))
    say = lambda name, row: print(name, json.dumps(row), file=sys.stderr)  # noqa: E731
    with tempfile.TemporaryDirectory() as work:
        record |= measured(wide, tokenizer, texts, Path(work), say)
        record["tokenizer"] = tokens_compared(Path(work) / "F32.gguf", tokenizer, strings(given.strings, 0))
    for name, row in record["files"].items():
        noise = f"{row['difference in nats per token']:+.5f} ± {row['its standard error']:.5f}"
        print(
            f"{name:20} {row['bytes']:>12,} bytes  perplexity {row['perplexity, ours']:.4f}, in llama.cpp "
            f"{row['perplexity, llama.cpp']:.4f} ({noise})  KL {row['KL from F32, nats per token']:.6f}"
        )
    for kind, row in record["greedy"].items():
        print(
            f"{kind:20} {row['same']} of {row['tokens']} greedy tokens the same, gaps {row['gaps at first differences']}"
        )
    told = record["tokenizer"]
    print(
        f"{told['strings']} strings: {told['unlike tiktoken']} unlike tiktoken, {told['unlike llama.cpp']} unlike llama.cpp"
    )
    out = given.out or RESULTS / f"llamacpp-{record['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    right = all(agrees(row) for row in record["files"].values())
    sys.exit(0 if right and not told["unlike tiktoken"] else "some row failed: see above")


if __name__ == "__main__":
    main()
