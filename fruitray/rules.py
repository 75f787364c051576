"""Which photos are left out, and why. The rules are options of `prepare`; what they leave out stays in the index."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fruitray.audit import majority_size
from fruitray.config import parse_size
from fruitray.duplicates import Bools, Duplicates, Ints

Objects = NDArray[np.object_]

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


def links(duplicates: Duplicates, out: Bools, was: Objects, stood: Bools) -> Bools:
    """(N,) new photos, not of those `out`, that would join groups which an earlier index put into different splits or
    folds, as it `was`, and of which as few as will do; and all of a group that is torn without them. Those that `stood`
    were in use there."""
    old = np.array([seat is not None for seat in was], dtype=bool)
    leak = np.zeros(len(out), dtype=bool)
    if not old.any():
        return leak
    splits, folds = ([seat and seat.partition("/")[part] for seat in was] for part in (0, 2))
    fewest_first: Sequence[Callable[[Bools], Bools]] = (
        lambda torn: ~old & (_between(duplicates, torn, splits) | _between(duplicates, torn, folds)),
        lambda _: ~old,
        lambda _: ~stood,
        lambda torn: torn,
    )
    for some in fewest_first:
        groups = duplicates.groups(~out & ~leak)
        seats: dict[int, set[str | None]] = defaultdict(set)
        for place in np.flatnonzero(old & (groups >= 0)).tolist():
            seats[int(groups[place])].add(was[place])
        torn = np.isin(groups, [group for group, found in seats.items() if _differ(found)])
        if not torn.any():
            break
        leak |= torn & some(torn)
    return leak


def _between(duplicates: Duplicates, among: Bools, was: Sequence[str | None]) -> Bools:
    """(N,) photos never dealt, with near duplicates, `among` (N,) these, that were dealt to several places."""
    names: dict[str | None, int] = {seat: number for number, seat in enumerate(sorted({*filter(None, was)}))}
    there, side, first = (np.full(len(duplicates.hashes), value) for value in (False, -1, -1))
    there[duplicates.content[among]] = True
    side[duplicates.content] = [names.get(seat, -1) for seat in was]
    found = np.zeros(len(side), dtype=bool)

    def worth(pairs: Ints) -> Bools:
        dealt = side[pairs] >= 0
        return np.asarray(there[pairs].all(axis=1) & dealt.any(axis=1) & ~dealt.all(axis=1))

    def some(contents: Ints) -> bool:
        dealt = side[contents[there[contents]]] >= 0
        return bool(dealt.any() and not dealt.all())

    for pairs in duplicates.near(worth, some):
        for one, other in (pairs.T, pairs.T[::-1]):
            one, place = one[side[other] >= 0], side[other[side[other] >= 0]]
            fresh = first[one] < 0
            first[one[fresh]] = place[fresh]
            found[one[first[one] != place]] = True
    return np.asarray(found[duplicates.content])


def _differ(seats: set[str | None]) -> bool:
    """Whether they are of two splits or folds; one that was dealt before there were folds goes with any."""
    places = [seat.partition("/")[::2] for seat in seats if seat]
    return len({split for split, _ in places}) > 1 or len({fold for _, fold in places if fold}) > 1


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
