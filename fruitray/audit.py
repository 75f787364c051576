"""Facts about each file, and what they say about the set. Nothing is decided here; `split.py` decides."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fruitray.errors import ImageError
from fruitray.images import decode, fetch
from fruitray.storage import Entry, Storage


def audit(storage: Storage, entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """One row of facts per entry, in order: the columns of `index.SCHEMA` that a file alone decides."""
    for entry, data in zip(entries, fetch(storage, entries), strict=True):
        yield _facts(storage.uri_of(entry.key), entry, data)


def label_of(key: str) -> str | None:
    """The class a key says: its first folder. A file in no folder has none."""
    folder, separator, _ = key.partition("/")
    return folder if separator else None


def _facts(uri: str, entry: Entry, data: bytes | ImageError) -> dict[str, Any]:
    row: dict[str, Any] = {"uri": uri, "label": label_of(entry.key), "bytes": entry.size, "etag": entry.etag}
    try:
        if isinstance(data, ImageError):
            raise data
        row["sha256"] = hashlib.sha256(data).hexdigest()
        photo = decode(data)
    except ImageError as error:
        return row | {"status": "error", "error_code": error.code, "error": error.detail}
    size = {"width": photo.width, "height": photo.height}
    return row | size | {"status": "ok", "mode": photo.mode, "frames": photo.frames}


def size_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many photos of each class have each size, the commonest size first: the report's Figure 2."""
    labels = sorted({row["label"] or "" for row in rows})
    counts = Counter((row["width"], row["height"], row["label"] or "") for row in rows if row["status"] == "ok")
    totals = Counter((row["width"], row["height"]) for row in rows if row["status"] == "ok")
    return [
        {"size": f"{width}x{height}", **{label: counts[width, height, label] for label in labels}, "all": total}
        for (width, height), total in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the whole set, as kept in `audit.json`."""
    copies = Counter(row["sha256"] for row in rows if row["status"] == "ok")
    return {
        "files": len(rows),
        "by_status": dict(sorted(Counter(row["status"] for row in rows).items())),
        "by_error_code": dict(sorted(Counter(row["error_code"] for row in rows if row["status"] == "error").items())),
        "by_mode": dict(sorted(Counter(row["mode"] for row in rows if row["status"] == "ok").items())),
        "by_split": _by_split(rows),
        "exact_duplicate_groups": sum(count > 1 for count in copies.values()),
        "exact_duplicate_files": sum(count - 1 for count in copies.values()),
        "sizes": size_table(rows),
    }


def _by_split(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Photos per class in each split; `excluded` are readable files that neither side may use."""
    counts = Counter((row["label"] or "", row["split"] or row["status"]) for row in rows)
    names = {"train": "train", "val": "val", "excluded": "ok", "error": "error"}
    return [
        {"label": label or "(none)", **{name: counts[label, key] for name, key in names.items()}}
        for label in sorted({label for label, _ in counts})
    ]
