"""prepare: list the photos, look at each one on the cluster, split, write the index."""

import json
from dataclasses import asdict

import pyarrow as pa

from fruitray.audit import audit, summary
from fruitray.cluster.runtime import claim, connect, open_input, open_output, require_ours, stream
from fruitray.config import PrepareConfig
from fruitray.console import progress, say, show_table
from fruitray.errors import NoInputError
from fruitray.images import list_images
from fruitray.index import FILE, SCHEMA, write_index
from fruitray.split import assign_splits
from fruitray.storage import Entry

CHUNK = 128


def run(config: PrepareConfig) -> str:
    """Write `index.parquet` and `audit.json`; show counts and the size table."""
    images = open_input(config.images)
    out = open_output(config.out, images)
    require_ours(out, "prepare", config)
    entries, skipped = list_images(images)
    if not entries:
        raise NoInputError(images.uri)
    connect()
    rows = []
    with progress("prepare", len(entries), "photos") as advance:
        for facts in stream(_chunks(images.uri, entries), _audit_chunk):
            rows += facts.to_pylist()
            advance(facts.num_rows)
    rows = assign_splits(rows, val_fraction=config.val_fraction, seed=config.seed)
    claim(out, "prepare", config)
    write_index(out, rows, images.uri)
    found = summary(rows) | {"skipped_hidden": skipped}
    out.write("audit.json", json.dumps(found, indent=2).encode())
    show_table("photos by split", found["by_split"])
    show_table("photos by size", found["sizes"])
    copies = f"{found['exact_duplicate_files']} exact duplicates in {found['exact_duplicate_groups']} groups"
    bad = ", ".join(f"{code} {count}" for code, count in found["by_error_code"].items()) or "none"
    say(f"{copies}; unreadable files: {bad}; hidden files skipped: {skipped}")
    return f"prepare: {len(rows):,} photos indexed in {out.uri_of(FILE)}"


def _chunks(root: str, entries: list[Entry]) -> list[pa.Table]:
    rows = [{"root": root, **asdict(entry)} for entry in entries]
    return [pa.Table.from_pylist(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]


def _audit_chunk(chunk: pa.Table) -> pa.Table:
    storage = open_input(chunk["root"][0].as_py())  # a node that cannot see the photos must say so, not call them gone
    entries = [Entry(**row) for row in chunk.drop_columns("root").to_pylist()]
    return pa.Table.from_pylist(list(audit(storage, entries)), SCHEMA)
