"""What is to be scored: folders, prefixes, lists and indexes -> a table with one row per photo, sorted by URI.

A list is a .parquet or .csv file with a column `uri`; an index is one, too. Nothing is opened here but lists.
"""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from fruitray.errors import AccessDeniedError, CredentialsError, EndpointError, StorageError, UsageError
from fruitray.index import FILE, label_of
from fruitray.storage import Entry, LocalStorage, Storage, is_hidden, open_file, open_storage

INPUTS = pa.schema(
    [
        ("root", pa.string()),  # URI of the storage that holds it
        ("key", pa.string()),  # below the root, verbatim
        ("size", pa.int64()),  # bytes
        ("etag", pa.string()),  # of the version that is to be scored; empty: whichever is there
        ("kind", pa.string()),  # as in `Entry`
        ("label", pa.string()),  # what is said of it already: by its first folder, or by the list
        ("known_part", pa.string()),  # where an earlier output has its row, if that is to be taken over
        ("known_row", pa.int32()),
    ]
)
LISTS = (".parquet", ".csv")
"""How the name of a list ends."""
MAX_NAMES = 2**31 - 1
"""Bytes that the URIs of all photos take at most: Arrow counts no further."""
_CHUNK = 10_000


def list_inputs(places: Sequence[str], split: str | None = None) -> tuple[pa.Table, int]:
    """All photos at `places` as `INPUTS`, each URI once; of indexes those of `split` alone, if given. And how many
    hidden files and folder markers were skipped.

    Raises:
        UsageError: a list has no column `uri`, or none of splits where one is asked for, or there are too many photos.
        NotFoundError, AccessDeniedError, EndpointError: a place cannot be listed.
    """
    tables, skipped = [], 0
    for place in places:
        table, hidden = _listed(place, split)
        tables.append(table)
        skipped += hidden
    table = pa.concat_tables(tables)
    lengths = pc.add(pc.binary_length(table["root"]), pc.binary_length(table["key"]))
    if pc.sum(lengths, min_count=0).as_py() + table.num_rows > MAX_NAMES:
        raise UsageError(f"--images: {table.num_rows:,} photos are too many for one output; score them by prefixes")
    table = table.combine_chunks()
    tables.clear()  # and no copy below that need not be: this is the driver's peak of memory
    names = uris(table)
    if not pc.all(pc.less_equal(names[:-1], names[1:]), min_count=0).as_py():
        table = table.take(pc.sort_indices(names))
        names = uris(table)
    fresh = pc.not_equal(names[1:], names[:-1])
    if not pc.all(fresh, min_count=0).as_py():
        table = table.filter(pa.concat_arrays([pa.array([True]), fresh]))
    return table, skipped


def uris(inputs: pa.Table) -> pa.Array:
    """Of each input, verbatim."""
    return pc.binary_join_element_wise(inputs["root"].combine_chunks(), inputs["key"].combine_chunks(), "/")


def entries(inputs: pa.Table) -> list[tuple[str, Entry]]:
    """Each input's root, and what is known of it below that."""
    rows = inputs.select(["root", "key", "size", "etag", "kind"]).to_pylist()
    return [(row.pop("root"), Entry(**row)) for row in rows]


def _listed(place: str, split: str | None) -> tuple[pa.Table, int]:
    if place.endswith(LISTS):
        return _of_list(*open_file(place), split), 0
    storage = open_storage(place)
    storage.check()
    if storage.exists(FILE):
        return _of_list(storage, FILE, split), 0
    if split:
        raise UsageError(f"--split {split}: {place} is no index, which would say what is in it")
    return _of_folder(storage)


def _of_folder(storage: Storage) -> tuple[pa.Table, int]:
    tables, listed, taken = [INPUTS.empty_table()], 0, 0
    for chunk in _chunks(storage.list()):
        kept = [entry for entry in chunk if not is_hidden(entry.key)]
        tables.append(_table((storage.uri, entry, label_of(entry.key)) for entry in kept))
        listed, taken = listed + len(chunk), taken + len(kept)
    return pa.concat_tables(tables), listed - taken


def _chunks(found: Iterable[Entry]) -> Iterator[list[Entry]]:
    rest = iter(found)
    while chunk := list(itertools.islice(rest, _CHUNK)):
        yield chunk


def _table(rows: Iterable[tuple[str, Entry, str | None]]) -> pa.Table:
    named = [{"root": root, **asdict(entry), "label": label} for root, entry, label in rows]
    return pa.Table.from_pylist(named, INPUTS)


# ---- Lists


def _of_list(storage: Storage, key: str, split: str | None) -> pa.Table:
    table = _read(storage.uri_of(key), storage.read(key), _WITH_SPLIT if split else _COLUMNS)
    if split:
        if table["split"].null_count == table.num_rows:
            raise UsageError(f"--split {split}: {storage.uri_of(key)} says of no photo which split has it")
        table = table.filter(pc.equal(table["split"], split))
    chunks = [table.slice(start, _CHUNK) for start in range(0, table.num_rows, _CHUNK)]
    storages: dict[str, Storage] = {}
    lacking: set[str] = set()

    def look(place: tuple[str, str], size: int | None, etag: str | None) -> Entry:
        root, key = place
        etag, local = (etag or "").strip('"'), isinstance(storages[root], LocalStorage)
        if size is not None and etag and not local:
            return Entry(key, size, etag)
        try:
            found = storages[root].stat(key)
        except (CredentialsError, EndpointError):
            raise
        except StorageError:
            if local:
                return Entry(key, size or 0, "")  # of a version that was seen, its folder would be thought unmounted
            lacking.add(root)
            return Entry(key, size or 0, etag)  # its row will say
        return Entry(key, found.size, etag or found.etag, found.kind)

    tables = [INPUTS.empty_table()]
    with ThreadPoolExecutor(16) as pool:
        for chunk in chunks:
            names = chunk["uri"].to_pylist()
            places = [_place(name if "://" in name or os.path.isabs(name) else storage.uri_of(name)) for name in names]
            storages |= {root: open_storage(root) for root in {root for root, _ in places} - storages.keys()}
            found = pool.map(look, places, chunk["bytes"].to_pylist(), chunk["etag"].to_pylist())
            roots = [root for root, _ in places]
            tables.append(_table(zip(roots, found, chunk["label"].to_pylist(), strict=True)))
    for root in lacking:
        with suppress(AccessDeniedError):  # some buckets may be read but not listed
            storages[root].check()
    return pa.concat_tables(tables)


def _read(uri: str, data: bytes, columns: pa.Schema) -> pa.Table:
    """The `columns`; all but `uri` may be missing, and are null then."""
    try:
        file = io.BytesIO(data)
        table = pq.read_table(file, page_checksum_verification=True) if uri.endswith(".parquet") else _read_csv(file)
        if table.column_names.count("uri") != 1:
            raise UsageError(f"--images {uri}: a list needs one column `uri`; it has {', '.join(table.column_names)}")
        for name in table.column_names:
            if (meant := name.strip().lower()) in columns.names and meant not in table.column_names:
                raise UsageError(f"--images {uri}: the column {name!r} would not be read; name it {meant!r}")
        for name in columns.names:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows))
        table = table.select(columns.names).cast(columns)
    except (pa.ArrowException, OSError, KeyError) as error:  # Arrow's words for damage, and for a name that comes twice
        raise UsageError(f"--images {uri}: is no list: {error}") from error
    if empty := pc.sum(pc.fill_null(pc.equal(table["uri"], ""), True)).as_py():
        raise UsageError(f"--images {uri}: `uri` is empty in {empty} rows")
    return table


def _read_csv(file: io.BytesIO) -> pa.Table:
    quoted = pyarrow.csv.ParseOptions(newlines_in_values=True)  # else a block may end, and a row begin, within a name
    return pyarrow.csv.read_csv(file, parse_options=quoted, convert_options=_AS_IS)


_COLUMNS = pa.schema([("uri", pa.string()), ("label", pa.string()), ("etag", pa.string()), ("bytes", pa.int64())])
_WITH_SPLIT = _COLUMNS.append(pa.field("split", pa.string()))
_AS_IS = pyarrow.csv.ConvertOptions(column_types=_COLUMNS, strings_can_be_null=True, null_values=[""])
"""Else 001 would be read as 1."""


def _place(uri: str) -> tuple[str, str]:
    """Root and key: a bucket and what is in it, or a folder and a file's name."""
    scheme, _, rest = uri.partition("://")
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        return f"s3://{bucket}", key
    storage, name = open_file(uri)
    return storage.uri, name
