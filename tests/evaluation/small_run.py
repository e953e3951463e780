"""A whole run in miniature: artifacts of every stage with plausible metrics, and a document that tries to be a script."""

import json
import math
import random
from pathlib import Path

from puna import artifacts
from puna.artifacts import Artifact
from puna.evaluation import scores
from puna.evaluation.bits import account
from puna.evaluation.contamination import ContaminationConfig, Overlap, _summary
from puna.evaluation.heldout import Excerpt

HOSTILE = '<script>alert("&")</script>\u202e\x00'
TASKS = {
    "arithmetic/tool": 0.0,
    "arithmetic/plain": 0.0,
    "lookup/search": 0.0,
    "python/one-liner": 0.0,
    "functions/one listed": 1.0,
    "functions/three listed": 1 / 3,
    "constraints/repeat": 0.0,
    "constraints/list": 0.0,
    "facts/known": 0.04,
    "unknown/refuse": 0.0,
}


def build(root: Path, *, hostile: bool = False) -> list[Artifact]:
    """The artifacts of a made-up run, in the order of making."""
    return _Run(root, HOSTILE if hostile else "").build()


class _Run:
    def __init__(self, root: Path, extra: str):
        self.root, self.extra, self.draw = root, extra, random.Random(0)
        self.made: list[Artifact] = []

    def build(self) -> list[Artifact]:
        raw = self.root / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        (raw / "a.txt").write_text("text")
        curated = self.add("00-documents", "documents", "curate", self.curated(), pages=[raw], config={"seed": 1})
        mixed = self.add("01-mix", "documents", "mix", self.mixed(), documents=[curated])
        tokenizer = self.add("02-tokenizer", "tokenizer", "train_tokenizer", self.tokenizer(), documents=[mixed])
        tokens = self.add(
            "03-tokens", "tokens", "tokenise", {"train": 2_510_331}, documents=[mixed], tokenizer=[tokenizer]
        )
        base = self.train("04-base", "lm", 640, 8.3, 3.1, data=[tokens], tokenizer=[tokenizer])
        dialogs = self.add("05-dialogs", "dialogs", "build_dialogs", {"demonstrations": {"facts": 900}})
        sft = self.train("06-sft", "sft", 300, 3.0, 0.6, data=[dialogs], tokenizer=[tokenizer], base=[base])
        sampled = self.add(
            "07-samples", "preferences", "sample", {"samples": 2000}, checkpoint=[sft], prompts=[dialogs]
        )
        reward = self.train("08-reward", "reward", 120, 0.69, 0.2, data=[sampled], tokenizer=[tokenizer], base=[base])
        again = self.train(
            "09-sft-rejection", "sft", 300, 3.0, 0.4, data=[sampled, reward], tokenizer=[tokenizer], base=[base]
        )
        dpo = self.train("10-dpo", "dpo", 150, 0.8, 0.5, data=[sampled], tokenizer=[tokenizer], base=[again])
        self.add(
            "11-baselines",
            "evaluation",
            "measure_baselines",
            self.baselines(),
            documents=[mixed],
            tokenizer=[tokenizer],
        )
        levels = ((base, 0.02, 1.93), (sft, 0.42, 2.2), (again, 0.71, 2.21), (dpo, 0.74, 2.24))
        for i, (checkpoint, level, bits) in enumerate(levels):
            metrics = self.evaluated(checkpoint.path.name, level, bits)
            self.add(
                f"{12 + i}-evaluate-{checkpoint.path.name[3:]}",
                "evaluation",
                "evaluate",
                metrics,
                checkpoint=[checkpoint],
                dialogs=[dialogs],
            )
        decisions = {"decisions": [self.decision(1, sft, again, True), self.decision(1, again, dpo, False)]}
        self.add("16-promote", "evaluation", "promote", decisions, candidates=[sft, again, dpo])
        for name, worse in (("int8", 1.001), ("int4", 1.021)):
            small = self.add(
                f"17-{name}",
                "quantised",
                "quantise",
                {"bits": int(name[3:])},
                checkpoint=[dpo],
                config={"scheme": name},
            )
            metrics = {"bits_per_byte": self.bits(2.24 * worse), "checkpoint": f"17-{name}"}
            self.add(f"18-evaluate-{name}", "evaluation", "evaluate", metrics, checkpoint=[small])
        return self.made

    def add(
        self, name: str, kind: str, stage: str, metrics: dict, *, config: dict | None = None, files=None, **inputs
    ) -> Artifact:
        def fill(_config, *_inputs, out):
            for file, content in (files or {"content.txt": name}).items():
                (out / file).write_text(content)
            return metrics

        fill.__name__ = stage
        fill.__signature__ = _signature(inputs)
        artifact = artifacts.stage(kind)(fill)(config or {"seed": 1}, *inputs.values(), out=self.root / name)
        seconds = {"train": 95.0, "sample": 61.0, "curate": 42.0}.get(stage, 4.0) * self.draw.uniform(0.6, 1.5)
        artifact.manifest["seconds"] = round(seconds, 3)  # as if it had taken so long
        self.made.append(artifact)
        return artifact

    def curated(self) -> dict:
        dropped = {
            "near-duplicate": {"documents": 1893, "bytes": 9_100_000, "step": "near-duplicates"},
            "exact duplicate": {"documents": 811, "bytes": 2_100_000, "step": "exact duplicates"},
            "too few words": {"documents": 640, "bytes": 120_000, "step": "filters"},
            "duplicate 10-grams": {"documents": 210, "bytes": 1_900_000, "step": "repetition"},
            "low quality score": {"documents": 155, "bytes": 800_000, "step": "quality"},
            f"not text{self.extra}": {"documents": 12, "bytes": 64_000, "step": "reading"},
        }
        return {
            "read": {"documents": 6142, "bytes": 31_000_000},
            "kept": {"documents": 2421, "bytes": 9_700_000},
            "heldout": {"documents": 121},
            "dropped": dropped,
            "examples": {
                reason: [f"lib/{i}.py: {self.extra} import os, sys  # {reason}" for i in range(3)] for reason in dropped
            },
            "sources": {
                "python": {
                    "read_documents": 4800,
                    "kept_documents": 1800,
                    "read_bytes": 25_000_000,
                    "kept_bytes": 7_000_000,
                },
                "docs": {
                    "read_documents": 1342,
                    "kept_documents": 621,
                    "read_bytes": 6_000_000,
                    "kept_bytes": 2_700_000,
                },
            },
            "languages": {"en": 2300, "code": 60, "de": 20, "fr": 18, "es": 9, "ja": 8, "zh": 6},
            "quality": {
                "judge": "heuristic stand-in",
                "graded": 800,
                "classifier": {"auc": 0.913, "interval": [0.87, 0.95]},
            },
            "pii": {"email": 310, "ip": 12},
        }

    def mixed(self) -> dict:
        group = {"asked_share": 0.5, "share": 0.48, "bytes": 3_500_000, "available_bytes": 7_000_000, "epochs": 0.5}
        return {"groups": {"code": group, "documentation": group}}

    def tokenizer(self) -> dict:
        by_source = {"python": 3.4, "docs": 3.0}
        return {
            "vocab_size": 4096,
            "bytes_per_token": 3.31,
            "characters_per_token": 3.29,
            "bytes_per_token_by_source": by_source,
        }

    def train(self, name: str, objective: str, steps: int, start: float, end: float, **inputs) -> Artifact:
        records = []
        for step in range(1, steps + 1):
            loss = end + (start - end) * math.exp(-6 * step / steps) + self.draw.gauss(0, 0.06 * end)
            speed = 5200 + self.draw.gauss(0, 150)
            rate = 3e-3 * min(1, step / 20) * (1 - step / (steps + 1))
            record = {
                "step": step,
                "tokens": 4096,
                "loss": loss,
                "grad_norm": 1 + 4 / step,
                "lr": rate,
                "tokens_per_s": speed,
                "mfu": 0.31,
            }
            if step % 80 == 0 and objective == "lm":
                record["val_loss"] = loss + 0.08
            records.append(json.dumps(record))
        metrics = {
            "parameters": 4_200_000, "steps": steps, "tokens": steps * 4096, "loss": end, "tokens_per_s": 5203, "mfu": 0.31,
        }  # fmt: skip
        files = {"metrics.jsonl": "\n".join(records) + "\n", "model.safetensors": "x" * 40_000}
        return self.add(
            name, "checkpoint", "train", metrics, files=files, config={objective: {"rows": 16}, "seed": 1}, **inputs
        )

    def bits(self, level: float) -> dict:
        draw = random.Random(7)
        excerpts = [
            Excerpt(id=str(i), source=("python", "docs")[i % 2], text="x" * draw.randint(300, 2000)) for i in range(90)
        ]
        return account(excerpts, [e.bytes * level * draw.uniform(0.6, 1.4) for e in excerpts], 0)

    def baselines(self) -> dict:
        levels = {
            "gzip_each": (3.98, "gzip, each excerpt alone", "nothing"),
            "gzip_all": (3.41, "gzip, excerpts in a row", "other excerpts"),
            "xz_each": (4.24, "xz, each excerpt alone", "nothing"),
            "xz_primed": (2.32, "xz, after the training text", "training text"),
            "bytes_8gram": (2.3, "8-gram, bytes", "training text"),
            "tokens_5gram": (2.1, "5-gram, same tokens", "training text"),
        }
        shown = {
            n: {"label": label, "prior": prior, "bits_per_byte": self.bits(v)}
            for n, (v, label, prior) in levels.items()
        }
        return {"training": {"documents": 2300, "bytes": 7_100_000}, "baselines": shown}

    def evaluated(self, name: str, level: float, bits: float) -> dict:
        outcomes = {
            t: [self.draw.random() < min(1, level * (0.6 + 0.9 * (i % 3) / 2)) for _ in range(120)]
            for i, t in enumerate(TASKS)
        }
        known = [self.draw.gauss(0, 1) for _ in range(200)]
        unknown = [self.draw.gauss(0.5, 1) for _ in range(200)]
        refused = [s > 0.4 for s in known], [s > 0.4 for s in unknown]
        refusal = scores.refusal([not r and self.draw.random() < 0.7 for r in refused[0]], *refused, known, unknown)
        rate = (sum(refused[0]) + sum(refused[1])) / 400
        refusal["control"] = {"known_answered": 0.7 * (1 - rate), "known_refused": rate, "unknown_refused": rate}
        choice = scores.score("q", [self.draw.random() < 0.25 + level / 3 for _ in range(200)], chance=0.25).json()
        ratios = [min(1.0, max(0.0, self.draw.gauss(0, 0.12))) for _ in range(300)]
        blocked = Overlap(*map(__import__("numpy").array, (ratios, [True] * 296 + [False] * 4, [False] * 300)))
        return {
            "checkpoint": name,
            "bits_per_byte": self.bits(bits),
            "tasks": scores.tasks(outcomes, TASKS),
            "refusal": refusal if level > 0.1 else {},
            "choice": {"who lives where": {"items": 200, "raw": choice, "per_byte": choice}},
            "contamination": {"tasks": _summary(blocked, ContaminationConfig()) | {"gain": {"threshold": None}}},
            "speed": {"decode_tokens_per_s": 412.0, "prefill_tokens_per_s": 9120.0},
            "samples": [self.sample(name), self.sample_of_python(), self.refusal()],
        }

    def sample(self, name: str) -> dict:
        call = {"name": "calculator", "arguments": {"expression": f"37 * 91{self.extra}"}, "dialect": "json"}
        dialog = [
            {"role": "system", "content": f"You can use: calculator(expression).{self.extra}"},
            {"role": "user", "content": f"What is 37 times 91?{self.extra}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "ipython", "content": f"3367{self.extra}"},
            {"role": "assistant", "content": f"37 times 91 is 3367.{self.extra}"},
        ]
        return {"title": f"arithmetic/tool{self.extra}", "dialog": dialog, "passed": name != "04-base"}

    def sample_of_python(self) -> dict:
        call = {"name": "code_interpreter", "arguments": {"code": "print(sorted('llama'))"}, "dialect": "python"}
        dialog = [
            {"role": "user", "content": "Ordne die Buchstaben von 'llama'. 日本語でも大丈夫です。"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "ipython", "content": "['a', 'a', 'l', 'l', 'm']"},
            {"role": "assistant", "content": "a a l l m"},
        ]
        return {"title": "python/one-liner", "dialog": dialog, "passed": True, "note": "greedy"}

    def refusal(self) -> dict:
        dialog = [
            {"role": "user", "content": "Where was Orla Venn born?"},
            {"role": "assistant", "content": "In Tarmouth."},
        ]
        return {"title": "unknown/refuse", "dialog": dialog, "passed": False}

    def decision(self, number: int, before: Artifact, after: Artifact, promoted: bool) -> dict:
        comparison = scores.compare(
            scores.score("a", [1, 0, 0, 1] * 60), scores.score("a", [1, 1, 0, int(promoted)] * 60)
        )
        reason = "higher verified score" if promoted else f"not better than what it started from{self.extra}"
        return {
            "round": number, "candidate": after.path.name, "incumbent": before.path.name, "promoted": promoted,
            "reason": reason, "comparison": scores.plain(comparison),
        }  # fmt: skip


def _signature(inputs: dict):
    import inspect

    names = ["config", *inputs]
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    return inspect.Signature([*parameters, inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY)])
