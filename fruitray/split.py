"""Which photos train and which validate: stratified, deterministic in seed and content, copies never on both sides."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from fruitray.errors import UsageError

Row = dict[str, Any]


def assign_splits(rows: Sequence[Row], *, val_fraction: float, seed: int) -> list[Row]:
    """Each row with its `split`: `val` for `val_fraction` of every class (rounded, never none or all), else `train`.

    Byte-identical files go to one side together. Unreadable and unlabelled files, and identical files that lie in two
    classes, get None.

    Raises:
        UsageError: fewer than two classes, or a class that cannot stand on both sides; with the counts.
    """
    usable = _copies_by_class(rows)
    side: dict[tuple[str | None, str | None], str] = {}
    for label, copies in usable.items():
        held_out = _hold_out(copies, val_fraction, seed)
        side |= {(label, sha256): "val" if sha256 in held_out else "train" for sha256 in copies}
    result = [{**row, "split": side.get((row["label"], row.get("sha256")))} for row in rows]
    _require_both_sides(result)
    return result


def _copies_by_class(rows: Sequence[Row]) -> dict[str, Counter[str]]:
    """For each class, how many byte-identical files there are of each content that lies in this class alone."""
    readable = [row for row in rows if row["status"] == "ok" and row["label"]]
    classes: dict[str, set[str]] = defaultdict(set)
    for row in readable:
        classes[row["sha256"]].add(row["label"])
    usable: dict[str, Counter[str]] = {row["label"]: Counter() for row in readable}
    for row in readable:
        if len(classes[row["sha256"]]) == 1:
            usable[row["label"]][row["sha256"]] += 1
    return usable


def _hold_out(copies: Counter[str], val_fraction: float, seed: int) -> set[str]:
    """Contents whose files, copies included, number `val_fraction` of all as exactly as groups allow."""
    wanted = max(1, min(round(val_fraction * copies.total()), copies.total() - 1))
    held_out: set[str] = set()
    count = 0
    for sha256 in sorted(copies, key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).digest()):
        if count + copies[sha256] <= wanted:
            held_out.add(sha256)
            count += copies[sha256]
    return held_out


def _require_both_sides(rows: Sequence[Row]) -> None:
    counts = Counter((row["label"], row["split"]) for row in rows if row["label"])
    labels = sorted({label for label, _ in counts})
    said = ", ".join(f"{label}: {counts[label, 'train']} train + {counts[label, 'val']} val" for label in labels)
    if len(labels) < 2:
        raise UsageError(f"--images must hold at least two classes, one folder each; found {said or 'none'}")
    if any(not counts[label, side] for label in labels for side in ("train", "val")):
        raise UsageError(f"every class needs readable photos for both train and val; found {said}")
