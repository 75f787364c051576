"""Facts about each file, and what they say about the set. Nothing is decided here; `rules.py` and `split.py` decide."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fruitray.errors import ImageError
from fruitray.images import fetch
from fruitray.index import label_of
from fruitray.isolate import Isolated
from fruitray.storage import Entry, Storage

LISTED, LINES = 1000, 100
"""At most so many of a kind are listed in `audit.json`, and lines of a table by class; the index has all."""
ODD_ASPECT = 1.5
"""How many times the usual aspect, at least, is odd."""


def audit(storage: Storage, entries: Sequence[Entry], isolated: Isolated) -> Iterator[dict[str, Any]]:
    """One row of facts (`index.FACTS`) per entry, in order; the photos are decoded in the process of `isolated`."""
    for entry, facts in zip(entries, isolated.map(fetch(storage, entries)), strict=True):
        row = {"uri": storage.uri_of(entry.key), "label": label_of(entry.key), "bytes": entry.size, "etag": entry.etag}
        if isinstance(facts, ImageError):
            yield row | {"status": "error", "error_code": facts.code, "error": facts.detail}
        else:
            yield row | facts | {"status": "ok", "thumbnail": bytes.fromhex(facts["thumbnail"])}


# ---- what is odd


def odd_ones(facts: pa.Table) -> pa.Array:
    """(N,) what is odd about each photo among all of them, null for none: `size` where most have another; `aspect`
    and `blurry` beyond Tukey's fences (1977): one and a half interquartile ranges from the quartiles, of the logarithm.
    """
    ok = pc.equal(facts["status"], "ok").to_numpy()
    photos = facts.filter(ok)
    if not photos.num_rows:
        return pa.nulls(facts.num_rows, pa.list_(pa.string()))
    width, height = (photos[side].to_numpy().astype(np.float64) for side in ("width", "height"))
    aspect = np.log(width / height)
    far = np.abs(aspect - np.median(aspect)) > np.log(ODD_ASPECT) - 1e-9  # 2:3 and 3:2 are as far from 1:1
    odd = {
        "size": _odd_size(photos, width * height),
        "aspect": far & (_below(aspect) | _below(-aspect)),
        "blurry": _below(np.log(photos["sharpness"].to_numpy() + 1)),
    }
    words = [[name for name, flags in odd.items() if flags[place]] or None for place in range(photos.num_rows)]
    found = iter(words)
    return pa.array([next(found) if fine else None for fine in ok], pa.list_(pa.string()))


def _odd_size(photos: pa.Table, area: NDArray[np.float64]) -> NDArray[np.bool_]:
    common = majority_size(photos)
    if common is None:
        return _below(np.log(area)) | _below(-np.log(area))
    width, height = photos["width"].to_numpy(), photos["height"].to_numpy()
    return np.asarray((width != common[0]) | (height != common[1]))


def _below(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) which values lie below Tukey's lower fence."""
    low, high = np.quantile(values, [0.25, 0.75])
    return np.asarray(values < low - 1.5 * (high - low))


def majority_size(photos: pa.Table) -> tuple[int, int] | None:
    """(width, height) that more than half of the photos have, if there is one."""
    sizes = photos.select(["width", "height"]).group_by(["width", "height"]).aggregate([([], "count_all")])
    top = sizes.sort_by([("count_all", "descending")]).slice(0, 1).to_pylist()
    return (top[0]["width"], top[0]["height"]) if top and 2 * top[0]["count_all"] > photos.num_rows else None


# ---- the set in tables


def crosstab(table: pa.Table, row: str, column: str, lines: int | None = None) -> list[dict[str, Any]]:
    """Counts of each value of `row` (a line each, the commonest first, `lines` at most) by value of `column` (sorted),
    and of `all`."""
    counts = table.select([row, column]).group_by([row, column]).aggregate([([], "count_all")]).to_pylist()
    names = {
        value: f"{value} " if value in (row, "all") else value or "" for value in {line[column] for line in counts}
    }
    columns = sorted(names.values())
    totals: Counter[str] = Counter()
    for line in counts:
        totals[line[row] or "(none)"] += line["count_all"]
    order = sorted(totals, key=lambda name: (-totals[name], name))[:lines]
    found = {name: {row: name, **dict.fromkeys(columns, 0), "all": totals[name]} for name in order}
    for line in counts:
        if cells := found.get(line[row] or "(none)"):
            cells[names[line[column]]] += line["count_all"]
    return list(found.values())


def narrow(line: Mapping[str, Any], most: int) -> dict[str, Any]:
    """A line of a `crosstab` by class, without the classes where that makes more than `most` columns."""
    return dict(line) if len(line) <= most else {name: line[name] for name in (next(iter(line)), "all")}


def sizes(table: pa.Table, lines: int | None = None) -> list[dict[str, Any]]:
    """How many photos of each class have each size, the commonest size first: the report's Figure 2."""
    photos = table.filter(pc.equal(table["status"], "ok"))
    sides = [pc.cast(photos[side], pa.string()) for side in ("width", "height")]
    return crosstab(photos.append_column("size", pc.binary_join_element_wise(*sides, "x")), "size", "label", lines)


def odd_table(table: pa.Table) -> list[dict[str, Any]]:
    """How many photos of each class are odd in which way."""
    photos = table.filter(pc.is_valid(table["odd"]))
    flat = pa.table(
        {"label": photos["label"].take(pc.list_parent_indices(photos["odd"])), "odd": pc.list_flatten(photos["odd"])}
    )
    return crosstab(flat, "odd", "label")


def classes(table: pa.Table) -> list[dict[str, Any]]:
    """Photos of each class by split; `excluded` are readable ones that no split has."""
    standing = pc.coalesce(table["split"], pc.if_else(pc.equal(table["status"], "ok"), "excluded", "error"))
    names = ["train", "val", "test", "excluded", "error"]
    lines = crosstab(table.append_column("standing", standing), "label", "standing")
    return [
        {"label": line["label"], **{name: line.get(name, 0) for name in names}, "all": line["all"]}
        for line in sorted(lines, key=lambda line: line["label"])
    ]


def duplicate_groups(table: pa.Table) -> list[dict[str, Any]]:
    """The groups of duplicates, the largest first: whether all are the same file, what became of each."""
    rows = table.filter(pc.is_valid(table["group"])).select(["group", "uri", "label", "sha256", "split", "excluded"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        groups.setdefault(row.pop("group"), []).append(row)
    return [
        {
            "group": name,
            "kind": "exact" if len({row["sha256"] for row in files}) == 1 else "near",
            "photos": len(files),
            "labels": sorted({row["label"] for row in files}),
            "files": [{"uri": row["uri"], "is": row["split"] or row["excluded"]} for row in files],
        }
        for name, files in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def hints(table: pa.Table, root: str) -> list[str]:
    """What looks wrong in how the folders below `root` lie, a sentence each."""
    alike, inner = defaultdict(set), defaultdict(set)
    labelled = table.filter(pc.is_valid(table["label"]))
    for uri, label in zip(labelled["uri"].to_pylist(), labelled["label"].to_pylist(), strict=True):
        alike[unicodedata.normalize("NFC", label).casefold().strip()].add(label)
        folder, below, _ = uri[len(root) + len(label) + 2 :].partition("/")
        inner[label].add(folder if below else "")
    said = [
        f"classes with nearly the same name: {', '.join(map(ascii, sorted(some)))}"
        for some in alike.values()
        if len(some) > 1
    ]
    nested = {label: folders for label, found in inner.items() if (folders := found - {""})}  # "": files lie there, too
    same = set.intersection(*nested.values()) if len(nested) > max(1, len(inner) / 2) else set()
    if len(same) > 1:
        classes, within = (", ".join(sorted(names)[:3]) for names in (nested, same))
        said.append(
            f"the classes are the first folders ({classes}), and these hold the same folders ({within}): if those are "
            "the classes, let --images name one of the first"
        )
    return said


def summary(table: pa.Table) -> dict[str, Any]:
    """What `audit.json` says of an index (`index.SCHEMA`), in whatever order its rows are."""
    table = table.sort_by("uri")
    ok, labelled = pc.equal(table["status"], "ok"), table.filter(pc.is_valid(table["excluded"]))
    copies = pc.value_counts(table.filter(ok)["sha256"]).field("counts").to_numpy()
    groups = duplicate_groups(table)
    near = [group for group in groups if group["kind"] == "near"]
    return {
        "files": table.num_rows,
        "photos": pc.sum(ok).as_py(),
        "classes": classes(table),
        "sizes": sizes(table, LINES),
        "modes": crosstab(table.filter(ok), "mode", "label"),
        "formats": crosstab(table.filter(ok), "format", "label"),
        "odd": odd_table(table),
        "errors": crosstab(table.filter(pc.invert(ok)), "error_code", "label"),
        "excluded": crosstab(labelled, "excluded", "label"),
        "exact_duplicate_groups": int((copies > 1).sum()),
        "exact_duplicate_files": int((copies[copies > 1] - 1).sum()),
        "near_duplicate_groups": len(near),
        "near_duplicate_photos": sum(group["photos"] for group in near),
        "conflicting_photos": pc.sum(pc.equal(table["excluded"], "conflict")).as_py() or 0,
        "duplicate_groups": [group | {"files": group["files"][:LINES]} for group in groups[:LISTED]],
        "conflicts": _listed(table, pc.equal(table["excluded"], "conflict"), ["uri", "label", "group"]),
        "odd_files": _listed(table, pc.is_valid(table["odd"]), ["uri", "odd", "width", "height", "sharpness"]),
        "error_files": _listed(table, pc.invert(ok), ["uri", "error_code", "error"]),
    }


def _listed(table: pa.Table, which: pa.ChunkedArray, columns: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select(columns).filter(which).slice(0, LISTED).to_pylist()
    return rows
