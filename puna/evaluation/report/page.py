"""The report as one HTML file: no network, no library; styles, script and charts inside."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from puna.evaluation.report import material, models, record
from puna.evaluation.report.charts import number, percent
from puna.evaluation.report.markup import Child, Markup, el, join
from puna.evaluation.report.parts import amount, interval, signed
from puna.log import duration

_NAVIGATION = (
    ("data", "Data"),
    ("training", "Training"),
    ("bits", "Bits per byte"),
    ("tasks", "Tasks"),
    ("refusals", "Refusals"),
    ("choice", "Choice"),
    ("contamination", "Contamination"),
    ("quantisation", "Quantisation"),
    ("samples", "Samples"),
    ("speed", "Speed"),
    ("time", "Time"),
    ("lineage", "Lineage"),
    ("environment", "Environment"),
)
_FORMS = {
    "share": percent,
    "change": signed,
    "seconds": duration,
    "area": "{:.2f}".format,
    "bits/byte": "{:.3f}".format,
}
# The page may run its own script and nothing else, and load nothing, whatever a document in it says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def page(found: dict[str, Any], *, title: str, note: str, samples: int) -> str:
    """The whole document for what `findings.collect` found."""
    sections = (
        _head(found, title, note),
        material.material(found),
        models.training(found),
        models.bits(found),
        models.tasks(found),
        models.refusals(found),
        models.choices(found),
        models.contamination(found),
        models.quantisation(found),
        record.samples(found, samples),
        record.speed(found),
        record.time(found),
        record.lineage(found),
        record.environment(found),
        el("footer", "The same numbers for machines are in report.json, beside this file."),
    )
    return document(f"{title}: report", sections, _NAVIGATION)


def document(title: str, sections: Child, navigation: Sequence[tuple[str, str]]) -> str:
    """A self-contained page of any sections; `navigation` is (id, text) of those that are linked at its top."""
    body = (
        el("a", "Skip to the content", href="#content", cls="skip"),
        el(
            "div",
            el("div", _links(navigation), el("button", "Dark", id="theme", type="button", hidden=True)),
            cls="top",
        ),
        el("main", sections, id="content"),
        el("script", _asset("page.js")),
    )
    head = (
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", title),
        el("style", _asset("page.css")),
    )
    return join(Markup("<!doctype html>\n"), el("html", el("head", head), el("body", body), lang="en"), "\n")


def _asset(name: str) -> Markup:
    return Markup(files("puna.evaluation.report").joinpath(name).read_text())


def _links(navigation: Sequence[tuple[str, str]]) -> Markup:
    return el("nav", [el("a", text, href=f"#{id}") for id, text in navigation], aria_label="Sections")


def _head(found: dict[str, Any], title: str, note: str) -> Markup:
    run, first = found["run"], next(iter(found["training"]), {})
    facts = []
    if "parameters" in first:
        facts.append(f"a Llama of {amount(first['parameters'])} parameters")
    pretraining = sum(t.get("tokens", 0) for t in found["training"] if t["objective"] == "lm")
    if pretraining:
        facts.append(f"pretrained on {amount(pretraining)} tokens")
    facts.append(f"{run['artifacts']} stages in {duration(run['seconds'])}")
    if run["finished"]:
        facts.append(f"finished {run['finished'].replace('T', ' ').replace('Z', ' UTC')}")
    return el(
        "header",
        el("h1", title),
        el("p", ", ".join(facts) + ".", cls="lead"),
        el("p", note) if note else None,
        el("ul", [_tile(line) for line in found["headlines"]], cls="tiles"),
    )


def _tile(line: dict[str, Any]) -> Markup:
    form = _FORMS.get(line["unit"], number)
    value = line["value"]
    figure = el("div", form(value), cls="figure") if value is not None else el("div", "not measured", cls="figure none")
    bounds = interval(line, form)
    return el(
        "li",
        el("div", line["label"], cls="what"),
        figure,
        el("div", f"95% interval {bounds}", cls="interval") if bounds else None,
        el("div", line["note"], cls="note small") if line["note"] else None,
    )
