"""Parquet as every file of ours is written: columns that may say what they mean, rows that give the same bytes; and
read where it may be damaged."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from fruitray.errors import OutputConflictError


def field(name: str, kind: pa.DataType, description: str) -> pa.Field:
    """A column whose `description` stands in the file's schema."""
    return pa.field(name, kind, metadata={"description": description})


def parquet(table: pa.Table, **options: bool) -> bytes:
    """`table` as a Parquet file; `options` are those of `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_parquet(uri: str, data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in the file `data`, which lies at `uri`; all columns, or those that are named and there.

    Raises:
        OutputConflictError: it is damaged, or none.
    """
    try:
        table = pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError, ValueError) as error:  # Arrow's words for damage, and what names it cannot say
        raise OutputConflictError(uri, "is no Parquet file, or a damaged one") from error
