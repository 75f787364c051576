"""Parquet as every file of ours is written: columns that may say what they mean, rows that give the same bytes."""

import pyarrow as pa
import pyarrow.parquet as pq


def field(name: str, kind: pa.DataType, description: str) -> pa.Field:
    """A column whose `description` stands in the file's schema."""
    return pa.field(name, kind, metadata={"description": description})


def parquet(table: pa.Table, **options: bool) -> bytes:
    """`table` as a Parquet file; `options` are those of `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    data: bytes = sink.getvalue().to_pybytes()
    return data
