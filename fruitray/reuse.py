"""Rows of an earlier output that need no computing again: same photo, same version, same model."""

from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fruitray.commit import read_plan
from fruitray.errors import OutputConflictError, UsageError
from fruitray.images import PASSING
from fruitray.inputs import INPUTS, uris
from fruitray.scores import EMBEDDING, SCHEMA, schema
from fruitray.storage import is_hidden, open_storage
from fruitray.tables import read_parquet

ALIKE = ("model_id", "top_k", "embeddings", "full_precision")
"""Settings without which rows of two outputs do not belong into one table."""
_HELD = 4


class Earlier:
    """The output at `uri`, finished or not: what is committed there stays as it is. Several threads may ask it."""

    def __init__(self, uri: str) -> None:
        self._storage = open_storage(uri)
        self._held: OrderedDict[str, pa.Table] = OrderedDict()

    def require(self, settings: Mapping[str, Any]) -> None:
        """Raise `UsageError` if its rows do not belong beside those of a plan with `settings`."""
        standing = read_plan(self._storage).settings
        for name in ALIKE:
            if standing.get(name) != settings.get(name):
                reason = f"was scored with {name} {standing.get(name)!r}, not {settings.get(name)!r}"
                raise UsageError(f"--previous {self._storage.uri}: {reason}")

    def mark(self, inputs: pa.Table, *, retry_errors: bool) -> pa.Table:
        """`inputs` (`INPUTS`), with part and row of those that have one here; not of errors that may pass, and with
        `retry_errors` of none.

        Raises:
            OutputConflictError: a file among its parts has other columns, or is damaged.
        """
        listed = (entry.key for entry in self._storage.list("data/"))
        keys = sorted(key for key in listed if key.endswith(".parquet") and not is_hidden(key))
        with ThreadPoolExecutor(8) as pool:
            known = pa.concat_tables([_KNOWN.empty_table(), *pool.map(self._versions, keys)])
        if retry_errors:
            known = known.filter(pc.equal(known["status"], "ok"))
        known = known.filter(pc.invert(pc.match_substring_regex(pc.fill_null(known["error_code"], ""), PASSING)))
        place = pc.index_in(_version(uris(inputs), inputs["etag"].combine_chunks()), known["version"])
        place = pc.if_else(pc.equal(inputs["etag"].combine_chunks(), ""), None, place)  # of a version nobody knows
        for name in ("known_part", "known_row"):
            inputs = inputs.set_column(INPUTS.get_field_index(name), INPUTS.field(name), known[name].take(place))
        return inputs

    def rows(self, inputs: pa.Table) -> pa.Table:
        """The rows of inputs that are all marked, in their order.

        Raises:
            OutputConflictError: a part is another than when they were marked, as where the output was made anew.
        """
        found = []
        for key in inputs["known_part"].unique().to_pylist():
            of_part, part = inputs.filter(pc.equal(inputs["known_part"], key)), self._part(key)
            there = part.take(of_part["known_row"].filter(pc.less(of_part["known_row"], part.num_rows)))
            if not _versions_of(there).equals(_version(uris(of_part), of_part["etag"].combine_chunks())):
                raise OutputConflictError(self._storage.uri_of(key), "was replaced since its rows were planned with")
            found.append(there)
        rows = pa.concat_tables(found)
        return rows.take(pc.index_in(uris(inputs), rows["uri"]))

    def _versions(self, key: str) -> pa.Table:
        uri = self._storage.uri_of(key)
        table = read_parquet(uri, self._storage.read(key), _ASKED)
        _require_columns(uri, table, pa.schema([SCHEMA.field(name) for name in _ASKED]))
        columns = [
            _versions_of(table),
            table["status"],
            table["error_code"],
            [key] * table.num_rows,
            range(table.num_rows),
        ]
        return pa.table(columns, schema=_KNOWN)

    def _part(self, key: str) -> pa.Table:
        part = self._held.get(key)
        if part is None:
            uri = self._storage.uri_of(key)
            part = read_parquet(uri, self._storage.read(key)).replace_schema_metadata(None)
            _require_columns(uri, part, schema(embeddings=EMBEDDING.name in part.column_names))
            self._held[key] = part
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        return part


def _require_columns(uri: str, table: pa.Table, columns: pa.Schema) -> None:
    if not table.schema.equals(columns, check_metadata=False):
        raise OutputConflictError(uri, "is no part that score wrote")


def _versions_of(rows: pa.Table) -> pa.LargeStringArray:
    return _version(rows["uri"].combine_chunks(), rows["etag"].combine_chunks())


def _version(uri: pa.StringArray, etag: pa.StringArray) -> pa.LargeStringArray:
    """What is the same for the same version of a photo; of many photos, more than a string column can count."""
    wide = pa.large_string()
    return pc.binary_join_element_wise(uri.cast(wide), etag.cast(wide), pa.scalar("\n", wide))


_ASKED = ["uri", "etag", "status", "error_code"]
_KNOWN = pa.schema(
    [
        ("version", pa.large_string()),
        *((name, pa.string()) for name in ("status", "error_code", "known_part")),
        ("known_row", pa.int32()),
    ]
)
