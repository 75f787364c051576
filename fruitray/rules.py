"""Which photos are left out, and why. The rules are options of `prepare`; what they leave out stays in the index."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fruitray.audit import majority_size
from fruitray.config import parse_size
from fruitray.duplicates import Bools, Duplicates, Ints

REASONS = {
    "no_label": "it lies in no class folder",
    "size": "its size is not the one that --size asks for",
    "conflict": "it, or a near duplicate of it, lies in another class too",
    "leak": "it is a near duplicate of photos that an earlier index put into different splits or folds",
    "duplicate": "it is a copy of a photo that is kept; which copies count, --duplicates says",
}
"""Every value of the index's column `excluded`, and what it means; the first that holds is given."""


def wrong_size(photos: pa.Table, rule: str, used: pa.Table) -> Bools:
    """(N,) whether the rule `any`, `majority` or `WIDTHxHEIGHT` leaves a photo out.

    Where an earlier index `used` photos, the majority is theirs: a grown folder does not change it.
    """
    wanted = majority_size(used if used.num_rows else photos) if rule == "majority" else parse_size(rule)
    if wanted is None:
        return np.zeros(photos.num_rows, dtype=bool)
    width, height = wanted
    fits = pc.and_(pc.equal(photos["width"], width), pc.equal(photos["height"], height))
    return ~np.asarray(fits)


def spare_copies(
    photos: pa.Table, duplicates: Duplicates, groups: Ints, free: Bools, earlier: Bools, rule: str
) -> Bools:
    """(N,) which of the `free` photos another one stands for.

    `keep-distinct` keeps one of each content, `keep-first` one of each group: the largest, in pixels, then in bytes.
    Whichever an `earlier` index used goes first, so that a grown folder replaces none.
    """
    same = {"keep-all": np.arange(photos.num_rows), "keep-distinct": duplicates.content, "keep-first": groups}[rule]
    columns = {name: photos[name].to_numpy() for name in ("width", "height", "bytes")}
    keys: list[NDArray[Any]] = [
        np.arange(photos.num_rows),
        pc.rank(photos["sha256"], tiebreaker="dense").to_numpy(),
        -columns["bytes"],
        -columns["width"].astype(np.int64) * columns["height"],
        ~earlier,
        ~free,
        same,
    ]
    order = np.lexsort(keys)
    follows = np.zeros(photos.num_rows, dtype=bool)
    follows[order[1:]] = same[order[1:]] == same[order[:-1]]
    return follows & free
