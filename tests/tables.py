"""Facts about photos that nobody drew, so that tests of thousands take a moment; and which of them are duplicates, told
by comparing every pair."""

import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from fruitray.config import PrepareConfig
from fruitray.index import FACTS
from fruitray.split import decide, require_splits

Row = dict[str, Any]


def photo(
    label: str | None, look: int, change: int = 0, *, uri: str = "", size: tuple[int, int] = (300, 300), length: int = 1
) -> Row:
    """The facts of one photo. Two of the same `look` have the same thumbnail, and hashes that differ in the bits that
    their `change` differs in; two of the same change, too, are the same file. Other looks are nothing alike."""
    draw = random.Random(look)
    thumbnail, phash = draw.randbytes(108), draw.getrandbits(64)
    return {
        "uri": f"/p/{uri or f'{label}/{look}-{change}.jpg'}",
        "label": label,
        "status": "ok",
        "format": "JPEG",
        "mode": "RGB",
        "width": size[0],
        "height": size[1],
        "frames": 1,
        "orientation": 1,
        "sharpness": 100.0,
        "brightness": 0.5,
        "color": "#c02010",
        "phash": f"{phash ^ change:016x}",
        "thumbnail": thumbnail,
        "bytes": length,
        "sha256": hashlib.sha256(f"{look} {change}".encode()).hexdigest(),
        "etag": "1",
    }


def broken(label: str | None, name: str, code: str = "E_TRUNCATED") -> Row:
    """The facts of one file that is no photo."""
    uri = f"/p/{label}/{name}" if label else f"/p/{name}"
    told = {"status": "error", "error_code": code, "error": "no photo", "bytes": 1, "etag": "1"}
    return {"uri": uri, "label": label} | told


def singles(label: str, count: int, start: int = 0) -> list[Row]:
    """`count` photos of one class, each unlike all others; another class's are other photos, too."""
    first = int.from_bytes(label.encode()) * 10**6 + start
    return [photo(label, look) for look in range(first, first + count)]


def facts(rows: Iterable[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), FACTS)


def index_of(rows: Iterable[Row], earlier: pa.Table | None = None, **options: Any) -> pa.Table:
    """What `prepare`, told `options`, decides about `rows`."""
    config = PrepareConfig(images="/p", out="/o", **options)
    table = decide(facts(rows), config, earlier)
    require_splits(table, config, earlier=earlier is not None)
    return table


def shuffled(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    return random.Random(seed).sample(list(rows), len(rows))


def duplicate_pairs(rows: Sequence[Row], bits: int = 8) -> list[tuple[int, int]]:
    """All pairs of positions of photos that are one file, or have the same look and hashes at most `bits` apart."""
    hashes = [int(row["phash"], 16) for row in rows]
    return [
        (one, other)
        for one, other in itertools.combinations(range(len(rows)), 2)
        if rows[one]["sha256"] == rows[other]["sha256"]
        or (rows[one]["thumbnail"] == rows[other]["thumbnail"] and (hashes[one] ^ hashes[other]).bit_count() <= bits)
    ]


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` things the least of those that `pairs` lead to from it, through others too."""
    least = list(range(count))
    pairs = list(pairs)
    changed = True
    while changed:
        changed = False
        for one, other in pairs:
            low = min(least[one], least[other])
            changed |= least[one] != low or least[other] != low
            least[one] = least[other] = low
    return least
