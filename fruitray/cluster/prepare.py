"""prepare: list the photos, look at each new one on the cluster, decide who trains, write the index.

The driver passes references on and never holds the rows, so its memory does not grow with them; what needs all rows at
once runs beside it, in a process of its own.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from typing import Any

import pyarrow as pa
import ray
from ray import ObjectRef

from fruitray import status
from fruitray.audit import LINES, audit, hints, narrow, summary
from fruitray.cluster.connection import connect
from fruitray.cluster.placement import seek_room
from fruitray.cluster.preflight import preflight
from fruitray.cluster.runtime import (
    answer_of,
    beside_driver,
    claim,
    open_input,
    open_output,
    require_ours,
    stream_references,
)
from fruitray.config import PrepareConfig
from fruitray.console import SHOWN, progress, say, show_table
from fruitray.errors import NoInputError, UsageError
from fruitray.images import list_images
from fruitray.index import FACTS, FILE, Index, known_facts, read_index, standing_hash, write_index
from fruitray.isolate import Isolated
from fruitray.rules import REASONS
from fruitray.split import decide, require_classes, require_splits
from fruitray.storage import Entry, is_hidden

MIN_CHUNK, MAX_CHUNK = 128, 4096
"""Photos per task: few enough to show progress, enough for the driver, which keeps a record per task, to stay small."""
SHEET_SIDE = 160
"""Pixels of the photos of `augment.png`."""


def run(config: PrepareConfig) -> str:
    """Write `index.parquet` and `audit.json`; show what was found."""
    images = open_input(config.images)
    out = open_output(config.out, images)
    require_ours(out, "prepare", config)
    if all(is_hidden(entry.key) for entry in images.list()):
        raise NoInputError(images.uri, "holds no files to read: it is to hold a folder of photos for each class")
    gpus = int(config.gpu and config.probe is not None)
    if config.dry_run:
        return preflight("prepare", [config.images], config.out, cpus=1, gpus=gpus)
    connect()
    seek_room("prepare", 1, cpus=1, gpus=gpus)
    if config.probe:
        from fruitray.cluster import suspects  # on use: it needs torch

        answer_of(beside_driver(suspects.try_probe).remote(config))
    found = answer_of(beside_driver(_finish).remote(config, *_look(config)))
    _show(found)
    if "refused" in found:
        raise UsageError(found["refused"])
    if config.show_augment:
        sheet = answer_of(beside_driver(_draw_augmentation).remote(config))
        say(f"what --augment {config.augment} makes of {config.show_augment} training photos: {sheet}")
    if config.probe:
        suspects.find_suspects(config)
    return f"prepare: {found['files']:,} photos indexed in {out.uri_of(FILE)}"


def _earlier(config: PrepareConfig) -> Index | None:
    """The index to go on from: the one that stands in --out, else the one that --previous names."""
    out = open_output(config.out)
    if out.exists(FILE):
        return read_index(out.uri)
    return read_index(config.previous) if config.previous else None


def _look(config: PrepareConfig) -> tuple[ObjectRef, list[ObjectRef], dict[str, int]]:
    """References to the earlier index (see `_list`) and to tables of `FACTS`, known or new, about every file in no
    particular order; counts of files."""
    listing = list(beside_driver(_list).remote(config))
    counts = answer_of(listing[:3][-1])  # or, there or earlier, why the listing failed
    status.begin(open_output(config.out))
    earlier, facts, fresh = listing[0], listing[1:2], listing[3:]
    if not fresh:
        return earlier, facts, counts
    with progress("prepare", counts["read"], "photos") as advance:
        for references, rows in stream_references(fresh, _audit_chunk):
            facts += references
            advance(rows)
    return earlier, facts, counts


def _list(config: PrepareConfig) -> Iterator[dict[str, int] | pa.Table | tuple[pa.Table | None, str]]:
    """The earlier index, with the hash of what stands in --out; what is known of files; how many others are to be read,
    and how many hidden; those to read, in chunks."""
    out = open_output(config.out)
    require_ours(out, "prepare", config)
    images, standing, earlier = open_input(config.images), standing_hash(out), _earlier(config)
    entries, skipped = list_images(images)
    require_classes([entry.key for entry in entries])
    known, fresh = known_facts(earlier, images, entries) if earlier else (FACTS.empty_table(), entries)
    yield earlier.table if earlier else None, standing
    yield known
    yield {"read": len(fresh), "skipped_hidden": skipped}
    size = min(max(len(fresh) // 64, MIN_CHUNK), MAX_CHUNK)
    for start in range(0, len(fresh), size):
        yield pa.Table.from_pylist([{"root": images.uri, **asdict(entry)} for entry in fresh[start : start + size]])


def _audit_chunk(chunk: pa.Table) -> pa.Table:
    storage = open_input(chunk["root"][0].as_py())  # a node that cannot see the photos must say so
    entries = [Entry(**row) for row in chunk.drop_columns("root").to_pylist()]
    rows = list(audit(storage, entries, _isolated()))
    if any(row.get("error_code") == "E_SRC_GONE" for row in rows):
        storage.check_again()
    return pa.Table.from_pylist(rows, FACTS)


@cache
def _isolated() -> Isolated:
    """This worker's decoder, which lives as long as the worker does."""
    return Isolated()


def _finish(
    config: PrepareConfig, before: tuple[pa.Table | None, str], facts: list[ObjectRef], counts: dict[str, int]
) -> dict[str, Any]:
    """Decide, write, and answer what is to be shown; `refused` says why there is only `audit.json` and no index."""
    images, out, (earlier, standing) = open_input(config.images), open_output(config.out), before
    table = decide(pa.concat_tables(ray.get(facts)), config, earlier)
    found = summary(table) | counts | {"hints": hints(table, images.uri)}
    try:
        require_splits(table, config, earlier=earlier is not None)
        claim(out, "prepare", config)
        write_index(out, table, images.uri, instead_of=standing)
    except UsageError as error:
        found["refused"] = error.message
    out.write("audit.json", json.dumps(found, indent=2).encode())
    return found


def _draw_augmentation(config: PrepareConfig) -> str:
    """The URI of the sheet."""
    from fruitray.sheet import FILE, write_sheet  # on use: prepare does without torch otherwise

    out, count = open_output(config.out), config.show_augment
    write_sheet(out, read_index(config.out), config.augment, config.seed, photos=count, side=SHEET_SIDE)
    return out.uri_of(FILE)


def _show(found: dict[str, Any]) -> None:
    say(f"{found['files']:,} files, {found['read']:,} read now; hidden files skipped: {found['skipped_hidden']}")
    show_table("photos by class and split", found["classes"], at_most=LINES)
    for hint in found["hints"]:
        say(f"look again: {hint}")
    for title, name in {
        "photos by size": "sizes",
        "photos by mode (L: grey)": "modes",
        "unusual photos": "odd",
        "unreadable files": "errors",
    }.items():
        show_table(title, [narrow(line, SHOWN) for line in found[name]], at_most=SHOWN)
    excluded = [narrow(line, SHOWN) | {"why": REASONS[line["excluded"]]} for line in found["excluded"]]
    show_table("left out, by rule", excluded)
    say(
        f"duplicates: {found['exact_duplicate_files']} copies in {found['exact_duplicate_groups']} groups of the same "
        f"bytes; {found['near_duplicate_photos']} photos in {found['near_duplicate_groups']} groups that nearly are; "
        f"{found['conflicting_photos']} left out as they lie in two classes"
    )
    lines = [
        {"kind": group["kind"], "photos": group["photos"], "files": "  ".join(_names(group["files"]))}
        for group in found["duplicate_groups"]
    ]
    show_table("groups of duplicates", lines, at_most=SHOWN)


def _names(files: list[dict[str, str]]) -> list[str]:
    """The last two parts of each URI: class and name."""
    return ["/".join(file["uri"].split("/")[-2:]) for file in files[:4]] + (["..."] if len(files) > 4 else [])
