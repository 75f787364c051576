"""What `prepare` found: the photos by class, size and split, the odd ones, copies, labels that look wrong."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fruitray.audit import duplicate_groups, narrow, sizes, summary
from fruitray.index import Index, read_index
from fruitray.report import charts
from fruitray.report.blocks import Block, Chart, Gallery, Picture, Section, Table, Text
from fruitray.report.outputs import SIGNS, Output
from fruitray.report.thumbnails import captioned, thumbnails
from fruitray.rules import REASONS
from fruitray.suspects import FILE as SUSPECTS

CLASSES, EACH, SHOWN, GROUPS, ROWS = 8, 4, 12, 6, 30
"""Classes of which sample photos are shown, and how many of each; photos of other galleries; groups of copies; rows of
charts and tables by class."""


def photos(output: Output) -> Section:
    """The section on the photos."""
    index = read_index(output.storage.uri_of(SIGNS["prepare"]))
    found, suspects = summary(index.table), _suspects(output, index.sha256)
    by_size = sizes(index.table, SHOWN)
    samples, odd, groups = _samples(index), _odd(index.table), _groups(every := duplicate_groups(index.table))
    shown = [*samples, *odd, *(file["uri"] for group in groups for file in group["files"])]
    shown += [row["uri"] for row in suspects[:SHOWN]]
    small = thumbnails(index.images, shown)
    labels = dict(zip(index.table["uri"].to_pylist(), index.table["label"].to_pylist(), strict=True))
    first = f", the first {ROWS} classes by name" if len(found["classes"]) > ROWS else ""
    blocks: list[Block] = [
        Chart(f"photos by class and split{first}", _by_class(found["classes"])),
        Table("photos by class and split", found["classes"][:ROWS], len(found["classes"])),
        Gallery("some of the photos", [captioned(uri, small, [labels[uri] or ""]) for uri in samples]),
        Table("photos by size", [narrow(row, SHOWN) for row in by_size], _size_count(index.table)),
        *(_small_table(title, found[name]) for title, name in _TABLES.items() if found[name]),
        Table(
            "left out, by rule", [narrow(row, SHOWN) | {"why": REASONS[row["excluded"]]} for row in found["excluded"]]
        ),
    ]
    if odd:
        blocks.append(Gallery("unusual photos", [captioned(uri, small, [", ".join(why)]) for uri, why in odd.items()]))
    blocks += [_group(group, small, labels) for group in groups]
    if len(every) > len(groups):
        blocks.append(Text(f"{len(every) - len(groups):,} more groups stand in the index, in the column group."))
    if suspects:
        blocks.append(
            Gallery("labels that look wrong, most suspect first", [_suspect(row, small) for row in suspects[:SHOWN]])
        )
    lead = (
        f"{found['files']:,} files below {index.images}, {found['photos']:,} of them photos, in {len(index.classes)} "
        f"classes. Copies of the same bytes: {found['exact_duplicate_files']:,}; photos that are nearly alike: "
        f"{found['near_duplicate_photos']:,}; left out because a copy lies in another class: "
        f"{found['conflicting_photos']:,}."
    )
    return Section("photos", "Photos", lead, blocks)


_TABLES = {
    "photos by colour mode (L: grey)": "modes",
    "photos by format": "formats",
    "unusual photos, by class": "odd",
    "files that are no photo, by reason": "errors",
}


def _by_class(rows: Sequence[Mapping[str, Any]]) -> Any:
    parts = [name for name in ("train", "val", "test", "excluded", "error") if any(row[name] for row in rows)]
    shown = {str(row["label"]): {part: row[part] for part in parts} for row in rows[:ROWS]}
    said = ", ".join(f"{name} {sum(parts.values()):,}" for name, parts in shown.items())
    return charts.stacked(shown, x="photos", says=f"Bars of photos by class and split: {said}")


def _size_count(table: pa.Table) -> int:
    return int(table.filter(pc.equal(table["status"], "ok")).group_by(["width", "height"]).aggregate([]).num_rows)


def _small_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(title, [narrow(row, SHOWN) for row in rows[:SHOWN]], len(rows))


def _samples(index: Index) -> list[str]:
    """Photos of each class, spread evenly over the index."""
    found: list[str] = []
    for name in index.classes[:CLASSES]:
        uris = index.table.filter(pc.and_(pc.equal(index.table["label"], name), pc.is_valid(index.table["split"])))[
            "uri"
        ]
        count = min(EACH, len(uris))
        found += uris.take([place * len(uris) // count for place in range(count)]).to_pylist()
    return found


def _odd(table: pa.Table) -> dict[str, list[str]]:
    """Unusual photos, as many of each kind as there is room for, and what is unusual."""
    rows = table.filter(pc.is_valid(table["odd"])).select(["uri", "odd"]).to_pylist()
    kinds = Counter[str]()
    chosen: dict[str, list[str]] = {}
    for row in rows:
        if kinds[row["odd"][0]] < SHOWN // 3:
            kinds[row["odd"][0]] += 1
            chosen[row["uri"]] = row["odd"]
    return chosen


def _groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of copies to show: those that lie in several classes first, then the largest."""
    first = sorted(groups, key=lambda group: len(group["labels"]) < 2)[:GROUPS]
    return [group | {"files": group["files"][:EACH]} for group in first]


def _group(group: Mapping[str, Any], small: Mapping[str, str], labels: Mapping[str, str | None]) -> Gallery:
    same = "the same file" if group["kind"] == "exact" else "nearly alike"
    across = ", in several classes" if len(group["labels"]) > 1 else ""
    pictures = [
        captioned(file["uri"], small, [labels.get(file["uri"]) or "", _standing(file["is"])]) for file in group["files"]
    ]
    return Gallery(f"{group['photos']} photos, {same}{across}", pictures)


def _standing(what: str | None) -> str:
    return {"conflict": "left out: conflict", "duplicate": "left out: copy"}.get(what or "", what or "")


def _suspects(output: Output, index: str) -> list[dict[str, Any]]:
    if not output.storage.exists(SUSPECTS):
        return []
    table = output.table(SUSPECTS)
    made: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"fruitray", b"{}"))
    if made.get("index") != index:
        return []  # `prepare` without --probe leaves what an earlier one found
    rows: list[dict[str, Any]] = table.filter(table["likely_wrong"]).sort_by("rank").to_pylist()
    return rows


def _suspect(row: Mapping[str, Any], small: Mapping[str, str]) -> Picture:
    said = [f"filed as {row['label']} ({row['label_confidence']:.0%})"]
    said.append(f"rather {row['suggested']} ({row['suggested_confidence']:.0%})")
    return captioned(row["uri"], small, said)
