import gzip
import io
import json
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from puna.curation.documents import Document
from puna.curation.readers import Fault, ReaderConfig, read
from puna.curation.streams import Damaged, lines, open_bytes
from puna.curation.warc import extract
from puna.errors import DataError

from .conftest import prose, write_jsonl

SMALL = ReaderConfig(max_document_bytes=50_000, max_record_bytes=100_000, piece_bytes=4_000)


def split(items):
    items = list(items)
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Fault)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.md", "a.txt.gz", "a.py", "a.parquet"]
)
def test_each_format_gives_back_its_text(tmp_path, name):
    text, path = prose(1), tmp_path / name
    data = (json.dumps({"text": text, "url": "u", "source": "s"}) if "jsonl" in name else text).encode()
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(data))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(data))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [text], "url": ["u"], "source": ["s"]}), path)
    else:
        path.write_bytes(data)
    documents, faults = split(read(path, ReaderConfig()))
    assert [d.text for d in documents] == [text] and not faults
    if "jsonl" in name or "parquet" in name:
        assert (documents[0].source, documents[0].url) == ("s", "u")


def test_a_folder_is_read_in_the_order_of_its_paths_and_hidden_files_are_not(tmp_path):
    for name in ("b/2.txt", "a.txt", "b/1.md", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(prose(hash(name) % 1000))
    documents, _ = split(read(tmp_path, ReaderConfig()))
    assert [d.id for d in documents] == ["a.txt", "b/1.md", "b/2.txt"]
    assert [d.source for d in documents] == [tmp_path.name, "b", "b"]


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(prose(seed, 30) for seed in range(12))
    (tmp_path / "book.txt").write_text(text)
    documents, faults = split(read(tmp_path / "book.txt", SMALL))
    assert len(documents) > 3 and not faults
    assert "".join(d.text for d in documents) == text
    assert [d.id for d in documents] == [f"book.txt:{n}" for n in range(len(documents))]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".py"])
def test_an_endless_line_is_one_counted_fault_and_never_in_memory(tmp_path, suffix):
    path = tmp_path / f"endless{suffix}.zst"
    with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
        for _ in range(64):
            file.write(b"a" * (1 << 20))
        file.write(b"\n" + (json.dumps({"text": prose(1)}) if suffix == ".jsonl" else prose(1)).encode())
    tracemalloc.start()
    documents, faults = split(read(path, SMALL))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum("over" in f.reason for f in faults) == 1 and faults[0].bytes >= 64 << 20
    assert len(documents) == (0 if suffix == ".py" else 1)
    assert peak < 24 << 20


def test_broken_lines_are_counted_and_the_rest_goes_on(tmp_path):
    rows = [
        json.dumps({"text": "one"}).encode(),
        b'{"text": "cut',
        b"\xff\xfe broken",
        b"[1, 2]",
        b'{"body": "no text"}',
        b'{"text": 7}',
        b'{"text": "\\ud800"}',
        b'{"text": "nul \\u0000 inside"}',
        b'{"text": "  "}',
        b"[" * 100_000,
        b'{"text": "two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    documents, faults = split(read(tmp_path / "a.jsonl", ReaderConfig()))
    assert [d.text for d in documents] == ["one", "two"]
    expected = {"broken JSON": 2, "invalid UTF-8": 2, "no text field": 3, "binary content": 1, "empty text": 1}
    assert Counter(f.reason for f in faults) == expected
    assert len({i.id for i in [*documents, *faults]}) == len(rows)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_gives_what_comes_before_and_one_fault(tmp_path, compress, damage):
    texts = [prose(seed) for seed in range(2000)]
    raw = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    data = bytearray(compress(raw))
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"a.jsonl.{'gz' if compress is gzip.compress else 'zst'}").write_bytes(data)
    write_jsonl(folder / "b.jsonl", ["after it"])
    documents, faults = split(read(folder, ReaderConfig()))
    assert documents[-1].text == "after it"
    assert next(f.unread for f in faults if f.reason == "damaged compressed file") < len(data)
    assert 0 < len(documents) < len(texts)


def test_a_zstd_frame_that_never_ends_is_not_taken_for_a_whole_file(tmp_path):
    compressor = zstandard.ZstdCompressor().compressobj()
    open_frame = compressor.compress(b'{"text": "one"}\n') + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(open_frame)
    documents, faults = split(read(tmp_path / "a.jsonl.zst", ReaderConfig()))
    assert [d.text for d in documents] == ["one"]
    assert [f.reason for f in faults] == ["damaged compressed file"]


def test_concatenated_frames_are_one_file(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"first ") + zstandard.compress(b"second"))
    with open_bytes(tmp_path / "a.txt.zst") as (stream, _):
        assert stream.read() == b"first second"


@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=12), st.integers(1, 30))
def test_lines_lose_no_byte_and_flag_exactly_the_long_ones(rows, limit):
    data = b"\n".join(rows)
    found = list(lines(io.BufferedReader(io.BytesIO(data)), limit))
    assert sum(length for _, length in found) == len(data)
    for (line, length), row in zip(found, data.splitlines(keepends=True) if b"\r" not in data else []):
        assert (line is None) == (length > limit + 1 or (length > limit and not row.endswith(b"\n"))) or line == row


def test_bad_parquet_and_parquet_without_text_are_faults(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [prose(n) for n in range(500)]}), tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "d.parquet")
    documents, faults = split(read(tmp_path, ReaderConfig()))
    assert [d.text for d in documents] == ["good"]
    assert Counter(f.reason for f in faults) == {"no text field": 1, "damaged Parquet file": 2}


def test_nothing_to_read_is_a_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_bytes(b"x")
    for path in (tmp_path / "empty", tmp_path / "missing", tmp_path / "a.docx"):
        with pytest.raises(DataError) as error:
            list(read(path, ReaderConfig()))
        assert error.value.hint


def record(kind: str, url: str, block: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
    head += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(block)}\r\n\r\n"
    return gzip.compress(head.encode() + block + b"\r\n\r\n")


def page(body: bytes, status: str = "200 OK", kind: str = "text/html; charset=iso-8859-1") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


HTML = "<html><body><nav><a href=/>Home</a></nav><main><p>{}</p></main><script>var x</script></body></html>"


def test_pages_of_a_web_archive_are_read_in_their_charset_and_other_responses_counted(tmp_path):
    text = "Caf\u00e9 owners along the river know that the old mill has stood there for three hundred years. " * 4
    body = HTML.format(text).encode("latin-1")
    archive = record("request", "http://a/1", b"GET / HTTP/1.1\r\n\r\n") + record("response", "http://a/1", page(body))
    archive += record("response", "http://a/2", page(body, "404 Not Found"))
    archive += record("response", "http://a/3", page(b"%PDF", kind="application/pdf"))
    (tmp_path / "a.warc.gz").write_bytes(archive)
    documents, faults = split(read(tmp_path / "a.warc.gz", ReaderConfig()))
    assert [d.url for d in documents] == ["http://a/1"] and "Café owners" in documents[0].text
    assert "var x" not in documents[0].text
    assert Counter(f.reason for f in faults) == {"HTTP status is not 200": 1, "page is not HTML": 1}


def test_a_web_archive_that_is_cut_or_none_at_all_is_a_fault(tmp_path):
    body = HTML.format(prose(1)).encode()
    archive = b"".join(record("response", f"http://a/{n}", page(body)) for n in range(20))
    (tmp_path / "cut.warc.gz").write_bytes(archive[: len(archive) // 2])
    (tmp_path / "none.warc.gz").write_bytes(b"no archive")
    documents, faults = split(read(tmp_path, ReaderConfig()))
    assert 5 < len(documents) <= 10
    assert [f.reason for f in faults] == ["damaged WARC file"] * 2


def test_image_texts_are_kept_and_markup_is_not():
    html = f'<html><body><article><h1>Title</h1><p>{prose(1)}</p><img src=x alt="A grey heron"></article></body></html>'
    text = extract(html.encode())
    assert "A grey heron" in text and "<" not in text


def test_the_shared_web_archives_are_read(shared):
    documents, faults = split(read(shared / "data" / "warc", ReaderConfig()))
    assert len(documents) > 20 and all(d.url.startswith("http") for d in documents)
    assert not any("damaged" in f.reason for f in faults)


def test_the_shared_corpus_is_read_as_far_as_it_decodes(shared):
    path = shared / "data" / "corpus" / "docs-programming.jsonl.zst"
    documents, _ = split(read(path, ReaderConfig()))
    assert len(documents) > 500 and all(d.source for d in documents)


def test_damage_is_an_error_of_the_stream_itself(tmp_path):
    (tmp_path / "a.zst").write_bytes(b"not zstd at all")
    with open_bytes(tmp_path / "a.zst") as (stream, _), pytest.raises(Damaged):
        stream.read()
