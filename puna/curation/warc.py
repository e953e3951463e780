"""Web archives: the main content of each page, as plain text without markup.

A WARC file is a sequence of records; the pages are its `response` records. Requests, metadata and the archive's own
description are about pages and are passed over; a response that is not HTTP 200 text/html is counted. fastwarc takes the
end of a cut file for the end of the archive, so it is given the stream that notices (`streams.py`).

Extraction follows the Llama 3 paper's choices where the library allows it: main content only, the text that stands for
an image kept, all markup (and markdown) gone.
The charset is the one that HTTP declares, else the page's `meta`, else a guess from the bytes.
"""

import io
from collections.abc import Iterator
from pathlib import Path

from puna import log
from puna.curation.readers import Fault, Item, ReaderConfig, document
from puna.curation.streams import Damaged, open_bytes
from puna.errors import MissingExtra

HTML = ("text/html", "application/xhtml+xml")


def read_warc(path: Path, name: str, source: str, config: ReaderConfig) -> Iterator[Item]:
    """The pages of a `.warc` or `.warc.gz` file; `MissingExtra` without fastwarc and resiliparse."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise MissingExtra("fastwarc", "curation") from None

    records = responses = 0
    with open_bytes(path) as (stream, raw):
        source_bytes, broken = _Noticing(stream), ""
        try:
            for record in ArchiveIterator(source_bytes, parse_http=True, auto_decode="all"):
                records += 1
                if record.record_type != WarcRecordType.response:
                    continue
                if source_bytes.broken and record.stream_pos + record.content_length > source_bytes.position:
                    break  # the page that the damage cuts
                yield _page(record, f"{name}:{responses}", source, config)
                responses += 1
        except (OSError, ValueError, RuntimeError) as error:
            broken = str(error) or type(error).__name__
        broken = source_bytes.broken or broken or ("" if records else "no WARC record in it")
        if broken:
            log.warn(f"{name} is damaged after {responses:,} pages ({broken}): what comes after is not read")
            yield Fault(name, source, "damaged WARC file", 0, broken[:200], unread=path.stat().st_size - raw.tell())


class _Noticing:
    """A stream with what fastwarc asks of one: `read`, and `tell` though it cannot seek.

    Damage ends the stream, so that what was read before it still comes out, and is kept in `broken`.
    """

    def __init__(self, stream: io.BufferedReader):
        self.stream, self.position, self.broken = stream, 0, ""

    def read(self, size: int = -1) -> bytes:
        try:
            data = self.stream.read1(size)
        except Damaged as error:
            self.broken, data = str(error), b""
        self.position += len(data)
        return data

    def tell(self) -> int:
        return self.position


def _page(record, where: str, source: str, config: ReaderConfig) -> Item:
    url = (record.headers.get("WARC-Target-URI") or "").strip("<>").encode(errors="replace").decode()
    size = max(record.content_length, 0)
    status = record.http_headers.status_code if record.http_headers else None
    if status != 200:
        return Fault(where, source, "HTTP status is not 200", size, str(status), url)
    if record.http_content_type not in HTML:
        return Fault(where, source, "page is not HTML", size, str(record.http_content_type), url)
    data = record.reader.read(config.max_record_bytes + 1)
    if len(data) > config.max_record_bytes:
        return Fault(where, source, f"page over {config.max_record_bytes / 1e6:g} MB", size, "", url)
    text = extract(data, record.http_charset)
    if not text.strip():
        return Fault(where, source, "no main content", len(data), "", url)
    return document(where, text, source, url, config)


def extract(html: bytes, charset: str | None = None) -> str:
    """The main text of a page, paragraphs on lines of their own."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    encoding = map_encoding_to_html5(charset, False) if charset else None
    text = bytes_to_str(html, encoding or detect_encoding(html, from_html_meta=True))
    return extract_plain_text(text, main_content=True, alt_texts=True, list_bullets=False)
