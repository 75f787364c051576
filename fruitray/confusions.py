"""Which classes are taken for which, as rows that a person can read."""

from collections.abc import Sequence
from typing import Any

LARGEST_MATRIX = 25
"""Classes of a confusion matrix that still can be read."""
COMMONEST = 30


def confusion_table(
    names: Sequence[str], counts: Sequence[Sequence[int]], recalls: Sequence[float | None]
) -> tuple[str, list[dict[str, Any]]]:
    """A title, and a row per true class: its name, its counts by predicted class, and the share that was found. Of more
    classes than can be read so, the commonest confusions."""
    if len(names) > LARGEST_MATRIX:
        return "the commonest confusions", commonest(names, counts)
    columns = [f"{name} " if name == "recall" else name for name in names]
    rows = [
        {"": name, **dict(zip(columns, row, strict=True)), "recall": recall}
        for name, row, recall in zip(names, counts, recalls, strict=True)
    ]
    return "confusion: true classes down, predicted across", rows


def commonest(names: Sequence[str], counts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A row per pair of classes that was confused, the commonest first."""
    pairs: list[dict[str, Any]] = [
        {"is": names[row], "taken for": names[column], "photos": count, "of": sum(counts[row])}
        for row in range(len(names))
        for column, count in enumerate(counts[row])
        if row != column and count
    ]
    return sorted(pairs, key=lambda pair: -pair["photos"])[:COMMONEST]
