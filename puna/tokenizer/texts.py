"""Reading the texts of a documents artifact, a bounded number at a time.

The tokenizer needs four columns of `documents.parquet` (id, text, source, split) and nothing else of curation.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROWS = 256  # read together: bounds memory, since a document may be megabytes


class Text(NamedTuple):
    """A document as the tokenizer sees it."""

    id: str
    text: str
    source: str


def read_texts(path: Path, split: str, groups: list[int] | None = None) -> Iterator[Text]:
    """The documents of one `split` in file order; of the given row groups alone, if any are given."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, row_groups=groups, columns=[*Text._fields, "split"]):
            kept = batch.filter(compute.equal(batch.column("split"), split))
            yield from map(Text, *(kept.column(name).to_pylist() for name in Text._fields))


def text_bytes(path: Path, split: str) -> int:
    """UTF-8 bytes of all texts of one `split`."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    total = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=["text", "split"]):
            kept = batch.filter(compute.equal(batch.column("split"), split)).column("text")
            total += compute.sum(compute.binary_length(kept)).as_py() or 0
    return total


def text_count(path: Path) -> int:
    """The number of documents of all splits."""
    import pyarrow.parquet as parquet

    return parquet.read_metadata(path).num_rows


def sources(path: Path) -> list[str]:
    """The names of all sources, sorted."""
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    return sorted(compute.unique(parquet.read_table(path, columns=["source"]).column("source")).to_pylist())


def group_bytes(path: Path) -> list[int]:
    """The uncompressed size of each row group, as the file's footer gives it."""
    import pyarrow.parquet as parquet

    metadata = parquet.read_metadata(path)
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
