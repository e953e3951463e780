"""From a run's artifacts to what the report says: one plain JSON value, which is also `report.json`.

Nothing is measured here. What an artifact's manifest does not have is left out, and the page says "not measured". The
stages' metrics that are read (others are shown only in the lineage):

    curate             read, kept {documents, bytes}; dropped {reason: {documents, bytes, step}}; examples {reason: [text]};
                       sources {name: {read_documents, read_bytes, kept_documents, kept_bytes}}; languages {code: documents}
    mix                groups {name: {asked_share, share, bytes, available_bytes, epochs}}
    train_tokenizer    vocab_size, bytes_per_token, characters_per_token
    train              parameters, steps, tokens, loss, val_loss, tokens_per_s, mfu; file metrics.jsonl, a line per step with
                       step, loss, grad_norm, lr, tokens_per_s and now and then val_loss
    measure_baselines  as evaluation.baselines writes them
    promote            decisions: [{round, candidate, incumbent, promoted, reason, comparison?}]
    any other stage of kind `evaluation`, one per checkpoint, with that checkpoint (or quantised model) among its inputs:
                       checkpoint (its name), bits_per_byte (evaluation.bits), tasks and refusal (evaluation.scores),
                       choice {name: evaluation.choice}, contamination {set: evaluation.contamination},
                       samples [{title, dialog (chat.dialog_to_json), passed?, note?}],
                       speed {name_with_unit: number}
                       refusal may have `control`: {known_answered, known_refused, unknown_refused}, shares expected
                       if the same number of refusals were dealt out at random

An evaluation belongs to the artifact among its inputs that is a checkpoint or quantised; a quantised model's loss is
its bits per byte against those of the checkpoint that it was made from, document by document.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from puna import config
from puna.artifacts import Artifact
from puna.evaluation import intervals
from puna.evaluation.scores import compare, plain

OBJECTIVES = ("lm", "sft", "reward", "dpo")
_CURVE_POINTS = 240
_CURVES = ("loss", "grad_norm", "lr", "tokens_per_s")


def collect(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Everything the report says about a run whose artifacts are given in the order in which they were made."""
    evaluated = [a for a in artifacts if a.kind == "evaluation" and a.stage not in ("measure_baselines", "promote")]
    subjects = {a.digest: a for a in artifacts if a.kind in ("checkpoint", "quantised")}
    results = [_result(a, subjects) for a in evaluated]
    found = {
        "run": _run(artifacts),
        "curation": [{"name": a.path.name, **a.metrics} for a in artifacts if a.stage == "curate"],
        "mix": [{"name": a.path.name, **a.metrics} for a in artifacts if a.stage == "mix"],
        "tokenizer": next((a.metrics for a in artifacts if a.kind == "tokenizer"), None),
        "training": [_training(a) for a in artifacts if a.stage == "train"],
        "baselines": next((a.metrics for a in artifacts if a.stage == "measure_baselines"), None),
        "results": results,
        "comparisons": _comparisons(results),
        "promotions": [d for a in artifacts if a.stage == "promote" for d in a.metrics.get("decisions", ())],
        "quantisation": _quantisation(artifacts, results),
        "lineage": _lineage(artifacts),
    }
    return plain({"headlines": headlines(found), **found})


def _run(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    manifests = [a.manifest for a in artifacts]
    return {
        "artifacts": len(artifacts),
        "seconds": sum(m["seconds"] for m in manifests),
        "finished": max((m["created"] for m in manifests), default=None),
        "code": sorted({m["code"] for m in manifests}),
        "environments": _distinct(m["environment"] for m in manifests),
        "seeds": sorted({m["config"]["seed"] for m in manifests if isinstance(m["config"].get("seed"), int)}),
    }


def _distinct(values: Any) -> list[Any]:
    return list({json.dumps(v, sort_keys=True): v for v in values}.values())


def _result(artifact: Artifact, subjects: dict[str, Artifact]) -> dict[str, Any]:
    given = [i["digest"] for role in artifact.manifest["inputs"].values() for i in role]
    subject = next((subjects[d] for d in given if d in subjects), None)
    name = artifact.metrics.get("checkpoint") or (subject.path.name if subject else artifact.path.name)
    return {
        **artifact.metrics,
        "checkpoint": name,
        "kind": subject.kind if subject else None,
        "objective": objective(subject) if subject else None,
        "digest": subject.digest if subject else None,
        "seconds": artifact.manifest["seconds"],
    }


def objective(artifact: Artifact) -> str | None:
    """What a checkpoint was trained for (lm, sft, reward or dpo); None if another stage made it (averaging, say)."""
    return next((name for name in OBJECTIVES if artifact.config.get(name)), None)


def _training(artifact: Artifact) -> dict[str, Any]:
    kept = ("parameters", "steps", "tokens", "loss", "val_loss", "tokens_per_s", "mfu")
    return {
        "name": artifact.path.name,
        "objective": objective(artifact),
        "seconds": artifact.manifest["seconds"],
        **{key: artifact.metrics[key] for key in kept if key in artifact.metrics},
        "curve": _curve(artifact) if "metrics.jsonl" in artifact.manifest["files"] else {},
    }


def _curve(artifact: Artifact) -> dict[str, list]:
    """The training curves, thinned to what a screen can show: each point is the mean of the steps that it stands for."""
    records = [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]
    stride = max(1, -(-len(records) // _CURVE_POINTS))
    groups = [records[i : i + stride] for i in range(0, len(records), stride)]
    curve: dict[str, list] = {"step": [g[-1]["step"] for g in groups]}
    for name in _CURVES:
        if all(name in r for r in records):
            curve[name] = [sum(r[name] for r in g) / len(g) for g in groups]
    curve["val_loss"] = [[r["step"], r["val_loss"]] for r in records if "val_loss" in r]
    return curve


def _comparisons(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each evaluated model with the one before it, on all tasks together, item by item."""
    tested = [r for r in results if r["kind"] != "quantised" and "outcomes" in r.get("tasks", {}).get("all", {})]
    pairs = []
    for before, after in pairwise(tested):
        first, second = before["tasks"]["all"], after["tasks"]["all"]
        if len(first["outcomes"]) == len(second["outcomes"]):
            pairs.append(
                {"before": before["checkpoint"], "after": after["checkpoint"], **plain(compare(first, second))}
            )
    return pairs


def _quantisation(artifacts: Sequence[Artifact], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_subject = {r["digest"]: r for r in results if r.get("bits_per_byte")}
    size = {a.digest: sum(f["size"] for f in a.manifest["files"].values()) for a in artifacts}
    rows = []
    for artifact in (a for a in artifacts if a.kind == "quantised"):
        parent = next((i["digest"] for i in artifact.manifest["inputs"].get("checkpoint", ())), None)
        row = {"name": artifact.path.name, "bytes": size[artifact.digest], "parent_bytes": size.get(parent)}
        row["config"] = artifact.config
        own, full = by_subject.get(artifact.digest), by_subject.get(parent)
        if own:
            row["bits_per_byte"] = own["bits_per_byte"]["overall"]
        if own and full:
            row["parent"] = full["checkpoint"]
            before, after = (r["bits_per_byte"]["per_document"] for r in (full, own))
            if before["bytes"] == after["bytes"]:  # the very same excerpts
                row["change"] = intervals.ratio_change(before["bits"], after["bits"])
        rows.append(row)
    return rows


def _lineage(artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    names = {a.digest: a.path.name for a in artifacts}
    return [
        {
            "name": a.path.name,
            "stage": a.stage,
            "kind": a.kind,
            "seconds": a.manifest["seconds"],
            "digest": a.digest,
            "bytes": sum(f["size"] for f in a.manifest["files"].values()),
            "config": a.config,
            "config_digest": config.digest(a.config),
            "inputs": [
                {"role": role, "name": names.get(i["digest"], i["path"]), "digest": i["digest"]}
                for role, given in a.manifest["inputs"].items()
                for i in given
            ],
        }
        for a in artifacts
    ]


def headlines(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The few numbers that answer "did it work?": `{label, value, unit, low?, high?, note}`, value None if not measured."""
    lines = [_headline_bits(found), _headline_tasks(found), _headline_refusals(found)]
    return [*lines, *_headline_quantisation(found), _headline_time(found)]


def _headline_bits(found: dict[str, Any]) -> dict[str, Any]:
    base = next((r for r in found["results"] if r["objective"] == "lm" and r.get("bits_per_byte")), None)
    line = {"label": "held-out bits per byte, base model", "unit": "bits/byte", "value": None, "note": ""}
    if base:
        line |= {k: base["bits_per_byte"]["overall"][k] for k in ("value", "low", "high")}
    rivals = (found["baselines"] or {}).get("baselines", {})
    fair = [
        (b["bits_per_byte"]["overall"]["value"], b["label"]) for b in rivals.values() if b["prior"] == "training text"
    ]
    if fair:
        best, label = min(fair)
        line["note"] = f"best baseline that read the same text: {best:.3f} ({label})"
    return line


def _headline_tasks(found: dict[str, Any]) -> dict[str, Any]:
    line = {"label": "verified tasks passed, last promoted model", "unit": "share", "value": None, "note": ""}
    tested = [r for r in found["results"] if r.get("tasks", {}).get("all") and r["kind"] != "quantised"]
    if tested:
        chosen = {d["candidate"] if d["promoted"] else d["incumbent"]: None for d in found["promotions"]}
        promoted = [r for r in tested if chosen and r["checkpoint"] == list(chosen)[-1]]
        last = (promoted or tested)[-1]
        line |= {k: last["tasks"]["all"][k] for k in ("value", "low", "high")}
        line["note"] = f"{last['checkpoint']}; {tested[0]['checkpoint']}: {tested[0]['tasks']['all']['value']:.1%}"
        if not promoted:
            line["label"] = "verified tasks passed, last model"
    return line


def _headline_refusals(found: dict[str, Any]) -> dict[str, Any]:
    line = {"label": "known or unknown: area under the curve", "unit": "area", "value": None, "note": "0.5 is guessing"}
    last = next((r for r in reversed(found["results"]) if r.get("refusal", {}).get("auc")), None)
    if last:
        line |= {k: last["refusal"]["auc"][k] for k in ("value", "low", "high")}
        line["note"] = f"{last['checkpoint']}; 0.5 is guessing"
    return line


def _headline_quantisation(found: dict[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for row in found["quantisation"]:
        change = plain(row.get("change")) or {"value": None, "low": None, "high": None}
        line = {"label": f"change of bits per byte by quantisation, {row['name']}", "unit": "change", "note": ""}
        lines.append(line | {k: change[k] for k in ("value", "low", "high")})
    return lines


def _headline_time(found: dict[str, Any]) -> dict[str, Any]:
    run = found["run"]
    note = f"{run['artifacts']} stages; the last attempt of each that was interrupted"
    return {"label": "time in all stages", "unit": "seconds", "value": run["seconds"], "note": note}
