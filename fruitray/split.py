"""Who trains, who validates, who is left out: decided by rules, seed and content; duplicates never on both sides.

A photo's side follows from its content, not from its name or from the order of listing, so it keeps it where a folder
is renamed or listed otherwise, and, with an earlier index, where the folder grows. (scikit-learn's splitters group or
stratify by position, not by content, and reach neither exact counts nor an earlier split.)
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fruitray.audit import odd_ones
from fruitray.config import PrepareConfig
from fruitray.duplicates import Bools, Duplicates, Ints, find_duplicates
from fruitray.errors import UsageError
from fruitray.index import FACTS, SCHEMA, Index, Pool, label_of
from fruitray.rules import Objects, links, spare_copies, wrong_size

MAX_SUMS = 2**31
"""Bits spent on making odd groups fit a quota exactly; where that is not enough, the photos are so many that it matters
little."""


NAMED = 10
"""Classes that an error names at most."""


@dataclass(slots=True)
class Group:
    """Photos that must stand on one side: duplicates of one another, or a single photo."""

    label: str
    size: int
    """Photos of it that are in no rule's way."""
    key: str
    """The least SHA-256 of its photos: what its place is drawn by."""
    split: str | None = None
    """The earlier index's, then the decided one."""
    fold: int | None = None

    @property
    def seat(self) -> str | None:
        """Split, and fold after a slash where there is one: the index's `dealt`."""
        return self.split if self.fold is None else f"{self.split}/{self.fold}"


def decide(facts: pa.Table, config: PrepareConfig, earlier: pa.Table | None = None) -> pa.Table:
    """The index (`index.SCHEMA`, sorted by URI) of files whose `facts` (`index.FACTS`) are known.

    With an `earlier` index each content keeps its split and fold, and new ones are placed so that the fractions hold.
    Whether every class came into every split is `require_splits`'s to say.

    Raises:
        UsageError: a class has too few photos for the folds; with the count.
    """
    earlier = earlier if earlier is not None else SCHEMA.empty_table()
    facts = _remembered(facts.sort_by("uri"), earlier)
    was = _seats(facts, earlier, config.folds)
    (usable,) = np.nonzero(pc.and_(pc.equal(facts["status"], "ok"), pc.is_valid(facts["label"])).to_numpy())
    decided = _decide_photos(facts.take(usable), config, earlier, was[usable])
    nothing = np.full(facts.num_rows, None, dtype=object)
    columns = {name: _spread(values, usable, nothing) for name, values in decided.items()}
    columns["dealt"] = _spread(decided["dealt"], usable, was)  # the others keep theirs: they may be photos again
    unlabelled = pc.and_(pc.equal(facts["status"], "ok"), pc.is_null(facts["label"])).to_numpy()
    columns["excluded"][unlabelled] = "no_label"
    columns["excluded"][_leaked(facts, earlier)] = "leak"  # for good, whatever else may hold
    table = facts.append_column("odd", odd_ones(facts))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, SCHEMA.field(name).type))
    return table.select(SCHEMA.names).cast(SCHEMA)


def _spread(values: Objects, places: Ints, others: Objects) -> Objects:
    """`others`, with `values` at their `places`."""
    result = others.copy()
    result[places] = values
    return result


def _remembered(facts: pa.Table, earlier: pa.Table) -> pa.Table:
    """`facts`, where a file that cannot be read now has the hash that an `earlier` index knows of it."""
    hashes = earlier["sha256"].take(pc.index_in(facts["uri"], earlier["uri"]))
    return facts.set_column(
        facts.column_names.index("sha256"), FACTS.field("sha256"), pc.coalesce(facts["sha256"], hashes)
    )


def _decide_photos(photos: pa.Table, config: PrepareConfig, earlier: pa.Table, was: Objects) -> dict[str, Objects]:
    """The columns excluded, group, split, fold and dealt of readable, labelled photos."""
    duplicates = find_duplicates(photos, config.near_duplicates)
    excluded, groups = _leave_out(photos, config, earlier, duplicates, was)
    free = ~excluded.astype(bool)
    drawn = _groups(photos, groups, free, was)
    _draw_splits(drawn.values(), config)
    if config.folds:
        _draw_folds(drawn.values(), config)
    shown = np.where(groups < 0, duplicates.groups(np.ones(len(groups), dtype=bool)) + len(groups), groups)
    there = [drawn.get(group) for group in groups.tolist()]
    placed = [group if ok else None for group, ok in zip(there, free.tolist(), strict=True)]
    return {
        "excluded": excluded,
        "group": _group_names(photos["sha256"], shown),
        "split": _objects(group.split if group else None for group in placed),
        "fold": _objects(group.fold if group else None for group in placed),
        "dealt": _objects(group.seat if group else seat for group, seat in zip(there, was, strict=True)),
    }


def _leave_out(
    photos: pa.Table, config: PrepareConfig, earlier: pa.Table, duplicates: Duplicates, was: Objects
) -> tuple[Objects, Ints]:
    """(N,) why a photo is in no split, None for others; (N,) its group, -1 where it conflicts or leaks."""
    labels = photos["label"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    conflict = duplicates.conflicts(labels)
    leak = _leaked(photos, earlier)
    used = earlier.filter(pc.is_valid(earlier["split"]))
    stood = pc.is_in(photos["sha256"], used["sha256"]).to_numpy(zero_copy_only=False)
    leak = leak | links(duplicates, conflict | leak, was, stood)
    groups = duplicates.groups(~conflict & ~leak)
    wrong = wrong_size(photos, config.size, used)
    known = pc.is_in(_file(photos), _file(used)).to_numpy(zero_copy_only=False)
    spare = spare_copies(photos, duplicates, groups, ~conflict & ~leak & ~wrong, known, config.duplicates)
    excluded = np.full(photos.num_rows, None, dtype=object)
    for reason, holds in {"duplicate": spare, "leak": leak, "conflict": conflict, "size": wrong}.items():
        excluded[holds] = reason
    return excluded, groups


def _leaked(photos: pa.Table, earlier: pa.Table) -> Bools:
    """(N,) which contents an `earlier` index left out for a leak: left out once, left out for good."""
    leaks = earlier.filter(pc.equal(earlier["excluded"], "leak"))["sha256"]
    found: Bools = pc.is_in(photos["sha256"], leaks).to_numpy(zero_copy_only=False)
    return found


def _objects(values: Iterable[Any]) -> Objects:
    return np.array([*values, None], dtype=object)[:-1]  # never an array of strings


def _file(table: pa.Table) -> pa.ChunkedArray:
    """(N,) which content lies where."""
    return pc.binary_join_element_wise(table["sha256"], table["uri"], " ")


def _seats(photos: pa.Table, earlier: pa.Table, folds: int) -> Objects:
    """(N,) the split that each content was dealt before, and the fold after a slash; without it if the `earlier` index
    had not so many: another number of folds is dealt anew."""
    dealt = earlier.filter(pc.is_valid(earlier["dealt"])).sort_by([("dealt", "descending")])  # with a fold first
    seats = dealt["dealt"]
    if pc.max(dealt["fold"]).as_py() != folds - 1:
        seats = pc.replace_substring_regex(seats, "/.*", "")
    return _objects(seats.take(pc.index_in(photos["sha256"], dealt["sha256"])).to_pylist())


def _groups(photos: pa.Table, groups: Ints, free: Bools, was: Objects) -> dict[int, Group]:
    """Each group that has photos to place, by its number, where an earlier index put it."""
    found: dict[int, Group] = {}
    columns = (photos["label"].to_pylist(), photos["sha256"].to_pylist(), was)
    for number, ok, label, sha256, seat in zip(groups.tolist(), free.tolist(), *columns, strict=True):
        group = found.setdefault(number, Group(label, 0, sha256))
        group.size += ok
        group.key = min(group.key, sha256)
        if seat:
            group.split, _, fold = seat.partition("/")
            group.fold = int(fold) if fold else group.fold
    return {number: group for number, group in found.items() if group.size}


def _group_names(sha256: pa.ChunkedArray, groups: Ints) -> Objects:
    """The name of each photo's group, None for one alone."""
    _, number, count = np.unique(groups, return_inverse=True, return_counts=True)
    names: dict[int, str] = {}
    shared = count[number] > 1
    hashes = sha256.to_pylist()
    for place in np.flatnonzero(shared).tolist():
        names[number[place]] = min(names.get(number[place], "g"), hashes[place][:16])
    return np.array([names.get(group) for group in number.tolist()], dtype=object)


def _draw_splits(groups: Iterable[Group], config: PrepareConfig) -> None:
    """Give each group a split: in every class, the photos of val and test number what `quotas` says."""
    classes = _by_class(groups, config.seed, "split")
    counts = {label: sum(group.size for group in members) for label, members in classes.items()}
    for split, fraction in {"test": config.test_fraction, "val": config.val_fraction}.items():
        later = {"train", "val"} - {split}
        for label, quota in quotas(counts, fraction).items():
            there = sum(group.size for group in classes[label] if group.split == split)
            free = [group for group in classes[label] if group.split is None]
            spare = max(0, len(free) - len(later - {group.split for group in classes[label]}))
            places = fill([group.size for group in free], quota - there)[:spare]
            if quota and not there and not places and spare:  # all are larger: too many rather than none
                places = [min(range(len(free)), key=lambda place: free[place].size)]
            for place in places:
                free[place].split = split
    for group in (group for members in classes.values() for group in members if group.split is None):
        group.split = "train"


def _by_class(groups: Iterable[Group], seed: int, what: str) -> dict[str, list[Group]]:
    """The groups of each class, and the classes, in an order drawn from seed and content."""
    classes: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        classes[group.label].append(group)
    for members in classes.values():
        members.sort(key=lambda group: hashlib.sha256(f"{what}:{seed}:{group.key}".encode()).digest())
    return dict(sorted(classes.items(), key=lambda item: item[1][0].key))


def quotas(counts: dict[str, int], fraction: float) -> dict[str, int]:
    """How many photos of each class make up `fraction` of all: rounded up in total, as scikit-learn does, and shared
    out by largest remainder, in a draw to the class named first. Never none nor all of a class that has two: others
    make up for what it cannot give, but none gives less for what it must.
    """
    photos = sum(counts.values())
    total = math.ceil(fraction * photos - 1e-9)
    if not total:
        return dict.fromkeys(counts, 0)
    shares = {label: total * count / photos for label, count in counts.items()}
    given = {label: max(1, min(int(shares[label] + 1e-9), count - 1)) for label, count in counts.items()}
    while (missing := total - sum(given.values())) > 0:
        able = [label for label, count in counts.items() if given[label] + 1 <= count - 1]
        if not able:
            break
        able.sort(key=lambda label: given[label] - shares[label])
        given.update((label, given[label] + 1) for label in able[:missing])
    return given


def fill(sizes: Sequence[int], wanted: int) -> list[int]:
    """Positions, the first ones rather, of `sizes` that add up to `wanted`, or to as much less as must be."""
    chosen, left = [], wanted
    for place, size in enumerate(sizes):
        if size <= left:
            chosen.append(place)
            left -= size
    small = len(sizes) * wanted <= MAX_SUMS
    return _fill_exactly(sizes, wanted) if left > 0 and small else chosen


def _fill_exactly(sizes: Sequence[int], wanted: int) -> list[int]:
    """As `fill`, by way of all sums: bit n of `reached[i]` says whether some of the first i sizes make n."""
    mask = (1 << (wanted + 1)) - 1
    reached = [1]
    for size in sizes:
        reached.append((reached[-1] | reached[-1] << size) & mask)
    left, chosen = reached[-1].bit_length() - 1, []
    for place in range(len(sizes) - 1, -1, -1):
        if not reached[place] >> left & 1:
            chosen.append(place)
            left -= sizes[place]
    return chosen


def _draw_folds(groups: Iterable[Group], config: PrepareConfig) -> None:
    """Give each group of train and val a fold, so that a class's photos are spread as evenly as groups allow."""
    totals: Counter[int] = Counter()
    for label, members in _by_class((g for g in groups if g.split != "test"), config.seed, "fold").items():
        _require_enough(label, len(members), config.folds)
        counts = Counter(dict.fromkeys(range(config.folds), 0))
        for group in sorted(members, key=lambda group: (group.fold is None, -group.size)):
            if group.fold is None:
                group.fold = min(counts, key=lambda fold: (counts[fold], totals[fold], fold))
            counts[group.fold] += group.size
            totals[group.fold] += group.size


def require_classes(keys: Sequence[str]) -> None:
    """Raise `UsageError` unless `keys` lie in two folders at least, which is known before any photo is read."""
    labels = {label for key in keys if (label := label_of(key))}
    if len(labels) < 2:
        [found] = labels or ["none"]
        inner = sorted({key.split("/")[1] for key in keys if key.count("/") > 1})[:NAMED]
        meant = (
            f" with the folders {', '.join(inner)}: if those are the classes, let --images name it" if inner[1:] else ""
        )
        raise UsageError(f"--images must hold at least two classes, one folder each; found {found}{meant}")


def require_splits(table: pa.Table, config: PrepareConfig, *, earlier: bool = False) -> None:
    """Raise `UsageError`, with the counts, unless there are two classes at least and every class is in every split."""
    splits = ["train", "val", *(["test"] if config.test_fraction else [])]
    labelled = table.filter(pc.is_valid(table["label"]))
    count = Counter(zip(labelled["label"].to_pylist(), labelled["split"].to_pylist(), strict=True))
    labels = sorted({label for label, _ in count})
    said = [
        f"{label}: {' + '.join(f'{count[label, split]} {split}' for split in splits)}, {count[label, None]} not usable"
        + _said_of_duplicates(labelled.filter(pc.equal(labelled["label"], label)), len(splits))
        for label in labels
        if len(labels) < 2 or not all(count[label, split] for split in splits)
    ]
    found = "; ".join([*said[:NAMED], *([f"and {len(said) - NAMED} more"] if len(said) > NAMED else [])])
    if len(labels) < 2:
        raise UsageError(f"--images must hold at least two classes, one folder each; found {found or 'none'}")
    if said:
        why = "; an earlier index's splits stand: prepare into another --out without it" if earlier else ""
        raise UsageError(f"every class needs photos for {', '.join(splits[:-1])} and {splits[-1]}; found {found}{why}")


def _said_of_duplicates(photos: pa.Table, splits: int) -> str:
    """Where `photos`, of one class, are too few groups for so many splits: that they would not be too few photos."""
    placed = photos.filter(pc.is_valid(photos["split"]))
    groups = len(pc.unique(pc.coalesce(placed["group"], placed["sha256"])))
    if groups >= min(splits, placed.num_rows):
        return ""
    return f", {groups} but for duplicates, which stay together (see --near-duplicates)"


def require_folds(index: Index, folds: int) -> None:
    """Raise `UsageError`, with the count, if a class has too few photos for `cross_validation`."""
    pool = index.pool()
    if _has_folds(pool, folds):
        return
    for number, count in sorted(Counter(number for number, _ in {*zip(pool.labels, pool.groups, strict=True)}).items()):
        _require_enough(index.classes[number], count, folds)


def cross_validation(pool: Pool, folds: int, seed: int) -> list[int]:
    """Of each photo of `pool` the fold that holds it out, from 0: the index's own folds where it has as many, else
    stratified ones that keep duplicates together."""
    if _has_folds(pool, folds):
        return [fold for fold in pool.folds if fold is not None]
    from sklearn.model_selection import StratifiedGroupKFold

    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
    numbers = np.zeros(len(pool.labels), dtype=np.int64)
    for fold, (_, held_out) in enumerate(split.split(pool.labels, pool.labels, pool.groups)):
        numbers[held_out] = fold
    found: list[int] = numbers.tolist()
    return found


def _has_folds(pool: Pool, folds: int) -> bool:
    own = [fold for fold in pool.folds if fold is not None]
    return len(own) == len(pool.folds) and max(own) == folds - 1


def _require_enough(label: str, photos: int, folds: int) -> None:
    if photos < folds:
        raise UsageError(f"--folds {folds}: class {label} has {photos} distinct photos for them")
