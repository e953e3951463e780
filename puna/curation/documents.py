"""The document: what curation makes and what tokenisation eats, in one Parquet file.

`documents.parquet` has the columns id, text, source, url, lang, split (all strings). `source` is what a mix gives
weights to; `split` is `train` or `heldout`, chosen by hashes of text or family (`curate.py`), not by the order of reading.
"""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from puna.artifacts import Artifact, replacing

FILE = "documents.parquet"
SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "source", "url", "lang", "split")])
ROWS_PER_GROUP = 1024

Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `lang` is an ISO 639 code, `und` where nobody could tell, or the name of a programming language."""

    id: str
    text: str
    source: str
    url: str = ""
    lang: str = ""
    split: Split = "train"


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write `documents` to the Parquet file `path`, streaming, and return how many there were."""
    remaining, count = iter(documents), 0
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        while rows := [astuple(d) for d in islice(remaining, ROWS_PER_GROUP)]:
            writer.write_table(pa.table(list(map(list, zip(*rows))), schema=SCHEMA))
            count += len(rows)
    return count


def read_documents(artifact: Artifact, split: Split | None = None) -> Iterator[Document]:
    """The documents of an artifact of kind `documents` in their order; of one split only, if given."""
    with pq.ParquetFile(artifact.file(FILE)) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP, columns=SCHEMA.names):
            for row in zip(*(column.to_pylist() for column in batch.columns)):
                document = Document(*row)
                if split is None or document.split == split:
                    yield document
