import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import small_run

from puna import artifacts
from puna.artifacts import MANIFEST
from puna.evaluation.report import ReportConfig, write_report
from puna.evaluation.report.charts import Curve, Mark, bars, lines, ticks, whiskers
from puna.evaluation.report.markup import el, join

SECTIONS = [
    "data", "training", "bits", "tasks", "refusals", "choice", "contamination", "quantisation", "samples", "speed",
    "time", "lineage", "environment",
]  # fmt: skip


class Reader(HTMLParser):
    """Checks that elements nest, and collects what matters."""

    void = {"meta", "br", "hr", "input"}  # noqa: RUF012

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.links, self.scripts, self.addresses, self.words = [], [], [], 0, [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.open += [] if tag in self.void else [tag]
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "srcset") and v]
        self.scripts += tag == "script"
        assert not any(k.startswith("on") for k in given), given

    def handle_startendtag(self, tag, attributes):
        assert not any(k.startswith("on") for k in dict(attributes))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run.build(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(run):
    return write_report(ReportConfig(title="Puna tiny"), run, out=run[0].path.parent / "report")


def test_every_section_is_there_and_every_link_leads_somewhere(report):
    read = Reader(report.file("report.html").read_text())
    assert [i for i in read.ids if i in SECTIONS] == SECTIONS
    assert len(read.ids) == len(set(read.ids))
    assert read.links and all(link.startswith("#") and link[1:] in read.ids for link in read.links)


def test_the_page_needs_no_network(report):
    html = report.file("report.html").read_text()
    assert not [a for a in Reader(html).addresses if not a.startswith("#")]
    assert not re.search(r"https?://|@import|url\(", html)


def test_a_complete_run_has_nothing_unmeasured(report):
    assert "not measured" not in " ".join(Reader(report.file("report.html").read_text()).words)


def test_without_artifacts_every_number_is_said_to_be_not_measured(tmp_path):
    empty = write_report(ReportConfig(), [], out=tmp_path / "report")
    read = Reader(empty.file("report.html").read_text())
    assert [i for i in read.ids if i in SECTIONS] == SECTIONS
    assert read.words.count("not measured") >= 12
    assert all(line["value"] is None for line in empty.metrics["headlines"] if line["unit"] != "seconds")


@pytest.mark.parametrize("gone", ["evaluation", "checkpoint", "documents", "quantised", "tokenizer", "preferences"])
def test_a_run_without_one_kind_of_artifact_is_still_reported(run, gone, tmp_path):
    some = [a for a in run if a.kind != gone]
    Reader(write_report(ReportConfig(), some, out=tmp_path / "report").file("report.html").read_text())


def test_what_documents_and_models_say_is_text_and_never_markup(tmp_path):
    hostile = small_run.build(tmp_path / "run", hostile=True)
    config = ReportConfig(title=small_run.HOSTILE, note="<b>note</b>")
    report = write_report(config, hostile, out=tmp_path / "report")
    html = report.file("report.html").read_text()
    assert Reader(html).scripts == 1  # our own
    assert html.count("&lt;script&gt;alert(&quot;&amp;&quot;)") > 10
    assert "\u202e" not in html and "\x00" not in html
    json.loads(report.file("report.json").read_text())


def test_the_numbers_for_machines_are_strict_json_and_hold_the_headlines(report):
    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(report.file("report.json").read_text(), parse_constant=refuse)
    assert found["headlines"] == report.metrics["headlines"]
    value = {line["label"]: line["value"] for line in found["headlines"]}
    assert value["verified tasks passed, last promoted model"] == found["results"][2]["tasks"]["all"]["value"]
    base = next(r for r in found["results"] if r["objective"] == "lm")
    assert value["held-out bits per byte, base model"] == base["bits_per_byte"]["overall"]["value"]


def test_the_last_promoted_model_is_the_headline_not_the_last_made(report):
    (line,) = (h for h in report.metrics["headlines"] if "promoted" in h["label"])
    assert line["note"].startswith("09-sft-rejection")


def test_quantisation_is_compared_with_the_checkpoint_it_was_made_from_document_by_document(report):
    found = json.loads(report.file("report.json").read_text())
    int8, int4 = found["quantisation"]
    assert int8["parent"] == int4["parent"] == "10-dpo"
    assert int8["change"]["value"] == pytest.approx(0.001, abs=1e-4)
    assert int4["change"]["low"] == pytest.approx(0.021, abs=1e-3)


def test_models_are_compared_item_by_item_with_the_one_before(report):
    found = json.loads(report.file("report.json").read_text())
    names = [r["checkpoint"] for r in found["results"] if r["kind"] == "checkpoint"]
    assert [(c["before"], c["after"]) for c in found["comparisons"]] == list(pairwise(names))
    assert all(c["wins"] + c["losses"] + c["ties"] == 1200 for c in found["comparisons"])


def test_the_same_artifacts_give_the_same_bytes(run, report, tmp_path):
    again = write_report(ReportConfig(title="Puna tiny"), run, out=tmp_path / "other" / "report")
    assert again.file("report.html").read_bytes() == report.file("report.html").read_bytes()


def test_documents_that_are_neither_kept_nor_dropped_are_shown(tmp_path):
    @artifacts.stage("documents")
    def curate(config, *, out):
        kept, read = {"documents": 5, "bytes": 50}, {"documents": 12, "bytes": 90}
        return {"read": read, "kept": kept, "dropped": {"empty": {"documents": 4, "bytes": 0, "step": "reading"}}}

    report = write_report(ReportConfig(), [curate({}, out=tmp_path / "documents")], out=tmp_path / "report")
    assert "not accounted for" in report.file("report.html").read_text()


def test_a_damaged_metrics_file_is_found(tmp_path):
    run = small_run.build(tmp_path / "run")
    (base,) = (a for a in run if a.path.name == "04-base")
    damaged = base.path / "metrics.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"4", b"5", 1))
    with pytest.raises(artifacts.ArtifactError, match="damaged"):
        write_report(ReportConfig(), run, out=tmp_path / "report")
    assert not (tmp_path / "report" / MANIFEST).exists()


def test_elements_escape_text_and_attributes_but_not_other_elements():
    made = el("p", "a < b", el("b", "&"), None, ["x", 3], cls='"', data_id=1, hidden=True, title=None)
    assert made == '<p class="&quot;" data-id="1" hidden>a &lt; b<b>&amp;</b>x3</p>'
    assert join("<i>", el("br")) == "&lt;i&gt;<br>"


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [(0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]), (1, 640, ["200", "400", "600"]), (0, 4200, ["0", "1,000", "2,000", "3,000", "4,000"]), (0, 3e-3, ["0", "0.001", "0.002", "0.003"])],
)  # fmt: skip
def test_ticks_are_round_numbers_inside_the_range(low, high, labels):
    assert [label for _, label in ticks(low, high)] == labels
    assert all(low <= t <= high + 1e-9 for t, _ in ticks(low, high))


def test_marks_without_a_value_say_so_and_intervals_are_read_aloud():
    html = whiskers([Mark(label="a", value=None), Mark(label="b", value=0.5, low=0.4, high=0.6)], chance=0.25)
    assert "a: not measured" in html and "b: 50.0%, 95% interval 40.0% to 60.0%" in html
    assert bars([Mark(label="zero", value=0.0)], unit="bits")


def test_curves_with_a_spike_a_constant_or_nothing_are_drawn():
    spike = [(i, 1e9 if i == 0 else 2.0 + i / 1000) for i in range(1000)]
    assert "nan" not in lines([Curve(label="a", points=spike)], x_label="step", y_label="loss")
    assert "nan" not in lines([Curve(label="a", points=[(1, 2.0)])], x_label="step", y_label="loss")
    assert "not measured" in lines([Curve(label="a", points=[])], x_label="step", y_label="loss")
