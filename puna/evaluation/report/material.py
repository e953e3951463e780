"""The report's sections on what went in: documents read and dropped, the mix, the tokenizer."""

from typing import Any

from puna.evaluation.report.markup import Child, Markup, el
from puna.evaluation.report.parts import MISSING, more, panel, panels, section, size, table

_LEAD = (
    "Every document that was read is kept or dropped for one named reason; the ledger beside the documents has the "
    "decision for each."
)
_LANGUAGES_SHOWN = 12


def material(found: dict[str, Any]) -> Markup:
    curation = [_curation(c, many=len(found["curation"]) > 1) for c in found["curation"]]
    return section("data", "What went in", _LEAD, curation or MISSING, _mix(found), _tokenizer(found))


def _curation(curated: dict[str, Any], *, many: bool) -> list[Child]:
    read, kept = curated.get("read"), curated.get("kept")
    if not read or not kept:
        return [MISSING]
    heldout = curated.get("heldout", {}).get("documents")
    aside = f" Of these {heldout:,} are held out: never trained on, used to measure." if heldout else ""
    return [
        el("h3", curated["name"]) if many else None,
        el(
            "p",
            f"{read['documents']:,} documents ({size(read['bytes'])}) were read and {kept['documents']:,} "
            f"({size(kept['bytes'])}) kept.{aside}",
        ),
        _funnel(curated, read, kept),
        panels([_sources(curated), _languages(curated), _quality(curated)], three=True),
    ]


def _funnel(curated: dict[str, Any], read: dict, kept: dict) -> Markup:
    examples = curated.get("examples", {})
    total = max(1, read["documents"])
    dropped = curated.get("dropped", {})
    rows = [
        _funnel_row(reason, d.get("step", ""), d["documents"], d["bytes"], total, examples.get(reason, ()))
        for reason, d in dropped.items()
    ]
    rows.append(_funnel_row("kept", "", kept["documents"], kept["bytes"], total, (), cls="kept total"))
    lost = read["documents"] - kept["documents"] - sum(d["documents"] for d in dropped.values())
    if lost:
        rows.append(_funnel_row("not accounted for", "", lost, 0, total, ()))
    heads = (
        ("dropped because", None),
        ("step", None),
        ("documents", "num"),
        ("", None),
        ("bytes", "num"),
        ("examples", None),
    )
    top = el("tr", [el("th", text, cls=cls, scope="col") for text, cls in heads])
    return el("div", el("table", el("thead", top), el("tbody", rows)), cls="scroll full", tabindex=0)


def _funnel_row(
    reason: str, step: str, documents: int, bytes: int, total: int, examples: Child, *, cls: str | None = None
) -> Markup:
    share = documents / total
    bar = el("svg", el("rect", width=f"{100 * share:.2f}%", height="100%", rx=2), cls="inline-bar", aria_hidden="true")
    shown = (
        more(f"{len(examples)} shown", el("ul", [el("li", e) for e in examples], cls="excerpts")) if examples else None
    )
    cells = (
        el("td", reason),
        el("td", el("small", step)),
        el("td", f"{documents:,} ", el("small", f"{share:.1%}"), cls="num"),
        el("td", bar),
        el("td", size(bytes), cls="num"),
        el("td", shown, cls="wide" if shown else None),
    )
    return el("tr", cells, cls=cls)


def _sources(curated: dict[str, Any]) -> Markup | None:
    rows = [
        (
            name,
            f"{s['read_documents']:,}",
            f"{s['kept_documents']:,}",
            f"{s['kept_documents'] / max(1, s['read_documents']):.0%}",
        )
        for name, s in curated.get("sources", {}).items()
    ]
    return panel("Sources", table(("source", "read", "kept", "share"), rows, numeric=(1, 2, 3))) if rows else None


def _languages(curated: dict[str, Any]) -> Markup | None:
    counted = sorted(curated.get("languages", {}).items(), key=lambda item: -item[1])
    if not counted:
        return None
    rows = [(language, f"{count:,}") for language, count in counted[:_LANGUAGES_SHOWN]]
    if rest := counted[_LANGUAGES_SHOWN:]:
        rows.append((f"{len(rest)} more", f"{sum(count for _, count in rest):,}"))
    return panel("Languages kept", table(("language", "documents"), rows, numeric=(1,)))


def _quality(curated: dict[str, Any]) -> Markup | None:
    quality = curated.get("quality") or {}
    if "judge" not in quality:
        return None
    lines = [f"Judge: {quality['judge']}, which graded {quality.get('graded', 0):,} documents."]
    classifier = quality.get("classifier")
    if classifier:
        low, high = classifier["interval"]
        lines.append(
            f"The classifier that learnt from it separates held-out grades with an area under the curve of "
            f"{classifier['auc']:.2f} ({low:.2f} to {high:.2f})."
        )
    else:
        lines.append("No classifier was trained: too few grades, or all alike.")
    redacted = ", ".join(f"{count:,} {kind}" for kind, count in curated.get("pii", {}).items())
    lines.append(f"Personal data redacted: {redacted or 'none found'}.")
    return panel("Quality and privacy", [el("p", line) for line in lines])


def _mix(found: dict[str, Any]) -> list[Markup]:
    shown = []
    for mix in found["mix"]:
        rows = [
            (
                name,
                f"{g['asked_share']:.1%}",
                f"{g['share']:.1%}",
                size(g["bytes"]),
                size(g["available_bytes"]),
                f"{g['epochs']:.2f}",
            )
            for name, g in mix.get("groups", {}).items()
        ]
        heads = ("group", "asked for", "got", "bytes", "available", "passes over it")
        shown += [el("h3", "The training mix"), table(heads, rows, numeric=(1, 2, 3, 4, 5))]
    return shown


def _tokenizer(found: dict[str, Any]) -> Markup | None:
    t = found["tokenizer"]
    if not t:
        return None
    text = f"The tokenizer has {t['vocab_size']:,} tokens" if "vocab_size" in t else "The tokenizer"
    if "bytes_per_token" in t:
        text += f" and packs {t['bytes_per_token']:.2f} bytes ({t['characters_per_token']:.2f} characters) of held-out text into each"
    by_source = t.get("bytes_per_token_by_source", {})
    rows = [(source, f"{value:.2f}") for source, value in by_source.items()]
    shown = more("by source", table(("source", "bytes per token"), rows, numeric=(1,))) if rows else None
    return el("div", el("h3", "Tokenizer"), el("p", f"{text}."), shown)
