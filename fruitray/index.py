"""The dataset index: one row per file, as Parquet. What later jobs know of the photos, they know from here."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fruitray.errors import NoInputError, OutputConflictError
from fruitray.storage import Entry, Storage, open_file, open_storage

FILE = "index.parquet"

SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("label", pa.string()),  # the first folder below the images' root
        ("width", pa.int32()),  # pixels, after EXIF rotation
        ("height", pa.int32()),
        ("mode", pa.string()),  # Pillow's mode in the file: RGB, L, CMYK, ...
        ("frames", pa.int32()),  # more than 1 where it is animated; the first is used
        ("bytes", pa.int64()),
        ("sha256", pa.string()),  # of the file's bytes
        ("status", pa.string()),  # ok | error
        ("error_code", pa.string()),  # see fruitray.images.CODES
        ("error", pa.string()),
        ("split", pa.string()),  # train | val, null where neither may use it
        ("etag", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Index:
    """A read index. `images` is the root its photos were listed below, `sha256` the hash of the index file."""

    table: pa.Table
    images: str
    sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that are trained on, sorted: position is class number."""
        return tuple(sorted(set(self.table.filter(pc.is_valid(self.table["split"]))["label"].to_pylist())))

    def rows(self, split: str) -> tuple[list[Entry], list[int]]:
        """The photos of `split`, in index order: where to read them, and their class numbers."""
        table = self.table.filter(pc.equal(self.table["split"], split))
        number = {label: position for position, label in enumerate(self.classes)}
        entries = [
            Entry(row["uri"][len(self.images) + 1 :], row["bytes"], row["etag"])
            for row in table.select(["uri", "bytes", "etag"]).to_pylist()
        ]
        return entries, [number[label] for label in table["label"].to_pylist()]


def write_index(storage: Storage, rows: Sequence[dict[str, Any]], images: str) -> None:
    """Write `index.parquet` into `storage`; the same rows give the same bytes."""
    schema = SCHEMA.with_metadata({"fruitray": json.dumps({"images": images})})
    ordered = sorted(rows, key=lambda row: row["uri"])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ordered, schema), sink, compression="zstd")
    storage.write(FILE, sink.getvalue().to_pybytes())


def index_place(uri: str) -> tuple[Storage, str]:
    """The storage beside an index, and the index's key in it; `uri` names the folder or the file."""
    return open_file(uri) if uri.endswith(".parquet") else (open_storage(uri), FILE)


def read_index(uri: str) -> Index:
    """Read the index that `prepare` wrote to `uri`, its folder or the file itself."""
    storage, key = index_place(uri)
    data = storage.read(key)
    try:
        table = pq.read_table(pa.BufferReader(data))
        images = json.loads(table.schema.metadata[b"fruitray"])["images"]
        table = table.select(SCHEMA.names)
        table.validate(full=True)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise OutputConflictError(storage.uri_of(key), "is no index that prepare wrote, or a damaged one") from error
    if not table.num_rows:
        raise NoInputError(storage.uri_of(key))
    return Index(table, images, hashlib.sha256(data).hexdigest())
