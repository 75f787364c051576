"""Behaviour of the split and its rules: exact counts, no photo on two sides, the same whatever the names or the order;
and a folder that grows moves nothing."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fruitray.audit import audit, summary
from fruitray.config import PrepareConfig
from fruitray.errors import UsageError
from fruitray.images import list_images
from fruitray.index import FACTS, SCHEMA, Index, check_leaks
from fruitray.isolate import Isolated
from fruitray.rules import REASONS
from fruitray.split import cross_validation, decide, fill, quotas, require_classes, require_folds
from fruitray.storage import LocalStorage
from tests.tables import Row, broken, components, duplicate_pairs, facts, index_of, photo, shuffled, singles

QUICK = settings(deadline=None, max_examples=60)


def rows_of(index: pa.Table) -> dict[str, Row]:
    return {row["uri"]: row for row in index.to_pylist()}


def counts(index: pa.Table, column: str = "split") -> dict[str, dict[Any, int]]:
    """How many photos of each class have which value of `column`; excluded ones not counted."""
    found: dict[str, dict[Any, int]] = defaultdict(dict)
    pairs = zip(index["label"].to_pylist(), index[column].to_pylist(), strict=True)
    for (label, value), count in Counter(pairs).items():
        if value is not None:
            found[label][value] = count
    return dict(found)


def total(index: pa.Table) -> dict[Any, int]:
    return dict(Counter(index["split"].drop_null().to_pylist()))


def places(index: pa.Table) -> dict[str, tuple[str, int | None]]:
    """Split and fold of each content that has a split."""
    return {row["sha256"]: (row["split"], row["fold"]) for row in index.to_pylist() if row["split"]}


def assert_sound(index: pa.Table, bits: int = 8) -> None:
    """What holds of every index: told by comparing every pair of photos, and by nothing that made it."""
    for row in index.to_pylist():
        leaked = row["excluded"] == "leak" and row["status"] == "error"
        assert (row["status"] == "error") + (row["excluded"] is not None) + (row["split"] is not None) == 1 + leaked
        assert row["excluded"] is None or row["excluded"] in REASONS
        assert row["fold"] is None or row["split"] in ("train", "val")
    used = [row for row in index.to_pylist() if row["split"]]
    for one, other in duplicate_pairs(used, bits):
        for same in ("label", "split", "fold", "group"):
            assert used[one][same] == used[other][same]
    check_leaks(index, "/o")


# ---- exact counts


@pytest.mark.parametrize(
    ("per_class", "val_fraction", "val"), [(10, 0.2, 2), (1500, 0.2, 300), (2, 0.01, 1), (3, 0.99, 2), (10, 0.1, 1)]
)
def test_every_class_is_held_out_by_the_same_share(per_class: int, val_fraction: float, val: int) -> None:
    index = index_of([*singles("apple", per_class), *singles("pear", per_class)], val_fraction=val_fraction)
    assert counts(index) == {label: {"train": per_class - val, "val": val} for label in ("apple", "pear")}


@pytest.mark.parametrize("sizes", [(1380, 1380, 1381), (4000, 71, 70), (3001, 1137, 3)])
def test_the_reports_4141_photos_are_3312_and_829(sizes: tuple[int, ...]) -> None:
    index = index_of(row for name, size in zip("abc", sizes, strict=True) for row in singles(name, size))
    assert total(index) == {"train": 3312, "val": 829}
    for name, size in zip("abc", sizes, strict=True):
        assert abs(counts(index)[name]["val"] - 829 * size / 4141) < 1


SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=12)


@settings(deadline=None, max_examples=300)
@given(SIZES, st.floats(0.01, 0.99))
def test_quotas_are_the_exact_shares_to_less_than_one(sizes: list[int], fraction: float) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    found, wanted, least = quotas(named, fraction), math.ceil(round(fraction * sum(sizes), 6)), 0
    for name, size in named.items():
        share = wanted * size / sum(sizes)
        least += max(1, min(int(share + 1e-9), size - 1))
        assert found[name] >= min(int(share + 1e-9), size - 1), "small classes take nothing from large ones"
        if min(sizes) > 1 / fraction + 1 and min(sizes) > 1 / (1 - fraction) + 1:  # else others make up for the small
            assert abs(found[name] - share) < 1
        assert 1 <= found[name] <= max(1, size - 1)
    assert sum(found.values()) == max(least, min(wanted, sum(max(1, size - 1) for size in sizes)))


def test_a_remainder_goes_to_the_class_with_the_largest() -> None:
    assert quotas({"a": 11, "b": 12, "c": 17}, 0.25) == {"a": 3, "b": 3, "c": 4}  # shares 2.75, 3, 4.25
    assert quotas({"a": 10, "b": 10, "c": 10}, 0.15) == {"a": 2, "b": 2, "c": 1}  # in a draw, who is named first
    assert quotas({"a": 10, "b": 10}, 0.0) == {"a": 0, "b": 0}
    assert quotas({"a": 5, "b": 5}, 0.1 + 0.2) == {"a": 2, "b": 1}  # 3 photos, for all that 0.1 + 0.2 is above 0.3
    many = quotas({"a": 100, **{str(number): 3 for number in range(60)}}, 0.1)
    assert (many.pop("a"), set(many.values())) == (10, {1})


def test_a_test_share_is_held_out_beside_the_val_share() -> None:
    index = index_of([*singles("apple", 50), *singles("pear", 31)], val_fraction=0.2, test_fraction=0.1)
    assert total(index) == {"train": 55, "val": 17, "test": 9}
    assert counts(index) == {
        "apple": {"train": 34, "val": 10, "test": 6},
        "pear": {"train": 21, "val": 7, "test": 3},
    }


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 60))
def test_groups_fill_a_quota_as_far_as_any_choice_of_them_can(sizes: list[int], wanted: int) -> None:
    sums = {0}
    for size in sizes:
        sums |= {reached + size for reached in sums}
    chosen = fill(sizes, wanted)
    assert len(set(chosen)) == len(chosen)
    assert sum(sizes[place] for place in chosen) == max(reached for reached in sums if reached <= wanted)


def test_a_quota_that_is_filled_already_takes_nothing() -> None:
    assert fill([1, 2, 3], 0) == []
    assert fill([1, 2, 3], -2) == []
    assert fill([1, 1, 1], 2) == [0, 1]


def test_large_groups_do_not_upset_the_share() -> None:
    rows = [photo("apple", 1, uri=f"apple/copy{number}.jpg") for number in range(30)]
    near = [photo("apple", 2, 1 << bit) for bit in range(13)]
    index = index_of([*rows, *near, *singles("apple", 57), *singles("pear", 50)], duplicates="keep-all")
    assert counts(index) == {"apple": {"train": 80, "val": 20}, "pear": {"train": 40, "val": 10}}
    assert_sound(index)


def test_a_class_of_large_groups_stands_on_both_sides_all_the_same() -> None:
    rows = [photo("kiwi", look, 1 << bit) for look in (1, 2) for bit in range(8)]
    index = index_of([*rows, *singles("pear", 50)])
    assert counts(index)["kiwi"] == {"train": 8, "val": 8}
    assert_sound(index)


# ---- folds


def test_folds_are_even_in_every_class_and_in_all() -> None:
    index = index_of([*singles("apple", 33), *singles("pear", 21), *singles("kiwi", 13)], folds=5)
    by_class = counts(index, "fold")
    assert {label: sorted(folds.values()) for label, folds in by_class.items()} == {
        "apple": [6, 6, 7, 7, 7],
        "pear": [4, 4, 4, 4, 5],
        "kiwi": [2, 2, 3, 3, 3],
    }
    assert sorted(Counter(index["fold"].to_pylist()).items(), key=str) == [(0, 14), (1, 14), (2, 13), (3, 13), (4, 13)]
    assert_sound(index)


def test_folds_are_as_even_as_groups_allow() -> None:
    group = [photo("apple", 1, 1 << bit) for bit in range(6)]
    index = index_of([*group, *singles("apple", 6), *singles("pear", 12)], folds=2)
    assert counts(index, "fold") == {label: {0: 6, 1: 6} for label in ("apple", "pear")}
    assert_sound(index)


def test_a_test_photo_has_no_fold() -> None:
    index = index_of([*singles("apple", 30), *singles("pear", 30)], folds=3, test_fraction=0.2)
    assert {row["fold"] for row in index.to_pylist() if row["split"] == "test"} == {None}
    assert {row["fold"] for row in index.to_pylist() if row["split"] != "test"} == {0, 1, 2}


def test_without_folds_none_are_numbered() -> None:
    assert index_of([*singles("apple", 5), *singles("pear", 5)])["fold"].null_count == 10


# ---- duplicates

FILES = st.lists(
    st.builds(
        photo,
        st.sampled_from(["apple", "apple", "apple", "pear"]),
        st.integers(0, 12),
        st.sampled_from([0, 0, 1, 0xFF, 0xFFFF, 0xFFFF00]),
        size=st.sampled_from([(300, 300), (300, 300), (200, 300)]),
        length=st.integers(1, 3),
    ),
    max_size=40,
)
OPTIONS = st.fixed_dictionaries(
    {
        "duplicates": st.sampled_from(["keep-distinct", "keep-first", "keep-all"]),
        "size": st.sampled_from(["any", "majority", "300x300"]),
        "near_duplicates": st.sampled_from([-1, 0, 4, 8]),
        "folds": st.sampled_from([0, 2, 5]),
        "test_fraction": st.sampled_from([0.0, 0.15]),
        "seed": st.integers(0, 3),
    }
)
BASE = [*singles("apple", 12), *singles("pear", 12)]
"""Enough of each class for every split and fold."""


def named(rows: Sequence[Row], folder: str = "") -> list[Row]:
    """`rows` as files of their own."""
    return [row | {"uri": f"/p/{row['label']}/{folder}{number}.jpg"} for number, row in enumerate(rows)]


@QUICK
@given(FILES, OPTIONS)
def test_no_photo_and_no_near_duplicate_stands_on_two_sides(files: list[Row], options: dict[str, Any]) -> None:
    index = index_of([*BASE, *named(files)], **options)
    assert_sound(index, options["near_duplicates"])
    assert set(total(index)) == {"train", "val", *(["test"] if options["test_fraction"] else [])}
    if options["folds"]:
        assert set(index["fold"].drop_null().to_pylist()) == set(range(options["folds"]))


@QUICK
@given(FILES, st.sampled_from([-1, 0, 8]))
def test_what_has_a_duplicate_in_another_class_is_used_in_none(files: list[Row], bits: int) -> None:
    rows = [*BASE, *named(files)]
    wanted = {
        rows[place]["uri"]
        for pair in duplicate_pairs(rows, bits)
        for place in pair
        if rows[pair[0]]["label"] != rows[pair[1]]["label"]
    }
    index = index_of(rows, near_duplicates=bits).to_pylist()
    assert {row["uri"] for row in index if row["excluded"] == "conflict"} == wanted


@QUICK
@given(FILES)
def test_a_group_is_a_chain_of_duplicates_within_a_class_named_by_its_least_hash(files: list[Row]) -> None:
    rows = [row for row in index_of([*BASE, *named(files)]).to_pylist() if row["excluded"] != "conflict"]
    members = defaultdict(list)
    for place, least in enumerate(components(len(rows), duplicate_pairs(rows))):
        members[least].append(rows[place])
    for group in members.values():
        name = min(row["sha256"] for row in group)[:16] if len(group) > 1 else None
        assert {row["group"] for row in group} == {name}
        assert len({row["label"] for row in group}) == 1


def test_near_duplicates_in_two_classes_are_left_out_and_share_a_group() -> None:
    pairs = [[photo("apple", look), photo("pear", look, 0b1)] for look in range(3)]
    index = rows_of(index_of([*BASE, *(row for pair in pairs for row in pair)]))
    for pair in pairs:
        assert [index[row["uri"]]["excluded"] for row in pair] == ["conflict", "conflict"]
        assert {index[row["uri"]]["group"] for row in pair} == {min(row["sha256"] for row in pair)[:16]}


def kept(rows: list[Row], **options: Any) -> list[str]:
    """What becomes of `rows`, in their order: `used`, or the reason why not."""
    index = rows_of(index_of([*BASE, *rows], **options))
    return [index[row["uri"]]["excluded"] or "used" for row in rows]


COPIES = [
    photo("apple", 1, 0, uri="apple/small.jpg", size=(300, 300), length=10),
    photo("apple", 1, 0, uri="apple/small again.jpg", size=(300, 300), length=10),
    photo("apple", 1, 0b1, uri="apple/large.jpg", size=(600, 600), length=20),
    photo("apple", 1, 0b11, uri="apple/large and fine.jpg", size=(600, 600), length=30),
]


@pytest.mark.parametrize(
    ("rule", "became"),
    [
        ("keep-all", ["used", "used", "used", "used"]),
        ("keep-distinct", ["duplicate", "used", "used", "used"]),
        ("keep-first", ["duplicate", "duplicate", "duplicate", "used"]),
    ],
)
def test_the_rule_for_duplicates_says_which_are_kept(rule: str, became: list[str]) -> None:
    assert kept(COPIES, duplicates=rule) == became


def test_a_copy_that_is_left_out_for_its_size_stands_for_no_other() -> None:
    assert kept(COPIES, duplicates="keep-first", size="300x300") == ["duplicate", "used", "size", "size"]


def test_near_duplicates_are_nothing_to_a_search_for_exact_ones() -> None:
    assert kept(COPIES, duplicates="keep-first", near_duplicates=-1) == ["duplicate", "used", "used", "used"]


# ---- the other rules

SHAPES = [photo("apple", look, size=size) for look, size in enumerate([(300, 300), (300, 200), (200, 300)])]


@pytest.mark.parametrize(
    ("size", "became"),
    [
        ("any", ["used", "used", "used"]),
        ("majority", ["used", "size", "size"]),
        ("300x300", ["used", "size", "size"]),
    ],
)
def test_the_rule_for_sizes_says_which_are_left_out(size: str, became: list[str]) -> None:
    assert kept(SHAPES, size=size) == became


def test_of_several_reasons_the_first_in_the_list_is_given() -> None:
    assert list(REASONS) == ["no_label", "size", "conflict", "leak", "duplicate"]
    both = [photo("apple", 1, size=(20, 20)), photo("pear", 1)]
    copies = [photo("apple", 2, uri=f"apple/{copy}", size=(20, 20)) for copy in range(2)]
    assert kept([*both, *copies], size="300x300") == ["size", "conflict", "size", "size"]


def test_a_size_is_width_times_height() -> None:
    rows = [row | {"width": 300, "height": 200} for row in BASE]
    index = rows_of(index_of([*rows, *SHAPES], size="300x200"))
    assert [index[row["uri"]]["excluded"] for row in SHAPES] == ["size", None, "size"]


def test_without_a_majority_no_size_is_left_out() -> None:
    rows = [row | {"width": 300 + number} for number, row in enumerate(BASE)]
    assert index_of(rows, size="majority")["excluded"].null_count == len(rows)


def test_unreadable_and_unlabelled_files_are_used_nowhere() -> None:
    index = rows_of(index_of([*BASE, broken("apple", "bad.jpg"), photo(None, 1), broken(None, "loose.txt")]))
    for uri, excluded in {"/p/apple/bad.jpg": None, "/p/None/1-0.jpg": "no_label", "/p/loose.txt": None}.items():
        assert (index[uri]["excluded"], index[uri]["split"], index[uri]["group"]) == (excluded, None, None)
    assert sum(row["split"] is not None for row in index.values()) == len(BASE)


def test_facts_pass_through_as_they_are() -> None:
    rows = [*BASE, broken("apple", "bad.jpg"), photo(None, 1)]
    index = index_of(shuffled(rows))
    assert index.schema == SCHEMA
    assert index.select(FACTS.names).to_pylist() == facts(sorted(rows, key=lambda row: row["uri"])).to_pylist()


# ---- determinism


def test_the_seed_decides_who_validates() -> None:
    rows = [*singles("apple", 50), *singles("pear", 50)]
    assert index_of(rows, seed=1, folds=4) == index_of(rows, seed=1, folds=4)
    assert places(index_of(rows, seed=1)) != places(index_of(rows, seed=2))
    folds = [
        {content: fold for content, (_, fold) in places(index_of(rows, seed=seed, folds=4)).items()} for seed in (1, 2)
    ]
    assert folds[0] != folds[1]


@QUICK
@given(FILES, OPTIONS, st.integers(0, 9))
def test_neither_the_order_of_files_nor_their_tables_change_anything(
    files: list[Row], options: dict[str, Any], order: int
) -> None:
    rows = [*BASE, *named(files), broken("pear", "bad.jpg")]
    mixed = shuffled(rows, order)
    cut = order * len(rows) // 10
    config = PrepareConfig(images="/p", out="/o", **options)
    assert decide(pa.concat_tables([facts(mixed[:cut]), facts(mixed[cut:])]), config) == index_of(rows, **options)


@QUICK
@given(FILES, OPTIONS)
def test_neither_names_of_files_nor_of_classes_move_a_content(files: list[Row], options: dict[str, Any]) -> None:
    rows = [*BASE, *singles("kiwi", 13), *named(files)]
    names = {"apple": "zucchini", "pear": "blackberry", "kiwi": "melon"}
    renamed = [
        row | {"label": names[row["label"]], "uri": f"s3://elsewhere/{number}.jpg"}
        for number, row in enumerate(shuffled(rows))
    ]
    assert places(index_of(renamed, **options)) == places(index_of(rows, **options))


def test_the_names_of_near_duplicates_do_not_move_their_group() -> None:
    rows = [photo(label, look, change) for look, label in enumerate(["apple", "pear"] * 20) for change in (0, 1, 2)]
    renamed = [row | {"uri": f"/p/{len(rows) - number:04}.jpg"} for number, row in enumerate(rows)]
    assert places(index_of(renamed, folds=3)) == places(index_of(rows, folds=3))


# ---- a folder that grows


def moved(earlier: pa.Table, later: pa.Table) -> list[str]:
    """Files in both that are used in both, and stand elsewhere."""
    before, after = rows_of(earlier), rows_of(later)
    return [
        uri
        for uri in before.keys() & after.keys()
        if before[uri]["split"] and after[uri]["split"] and before[uri]["sha256"] == after[uri]["sha256"]
        if (before[uri]["split"], before[uri]["fold"]) != (after[uri]["split"], after[uri]["fold"])
    ]


@pytest.mark.parametrize("more", [1, 10, 100])
def test_a_grown_folder_moves_nothing_and_keeps_the_fractions(more: int) -> None:
    old = [*singles("apple", 100), *singles("pear", 60)]
    new = [*singles("apple", more, start=100), *singles("pear", more, start=60)]
    options = {"test_fraction": 0.1, "folds": 5}
    earlier = index_of(old, **options)
    later = index_of(shuffled([*old, *new]), earlier, **options)
    assert moved(earlier, later) == []
    if more > 1:  # one photo of a class cannot stand in val and in test
        assert total(later) == total(index_of([*old, *new], **options))
    assert counts(later) == {
        label: {"train": size - quota[0] - quota[1], "test": quota[0], "val": quota[1]}
        for label, size in {"apple": 100 + more, "pear": 60 + more}.items()
        if (quota := (counts(later)[label]["test"], counts(later)[label]["val"]))
        and abs(quota[0] - 0.1 * size) <= 1
        and abs(quota[1] - 0.2 * size) <= 1
    }
    for folds in counts(later, "fold").values():
        assert max(folds.values()) - min(folds.values()) <= 1
    assert_sound(later)


def test_deleted_photos_are_made_up_for_by_new_ones() -> None:
    old = [*singles("apple", 100), *singles("pear", 60)]
    earlier = index_of(old)
    left = shuffled(old)[:110]
    later = index_of([*left, *singles("apple", 60, start=100), *singles("pear", 60, start=60)], earlier)
    assert moved(earlier, later) == []
    assert total(later) == {"train": 184, "val": 46}
    assert moved(earlier, index_of(left, earlier)) == []


@QUICK
@given(FILES, FILES, OPTIONS, st.integers(0, 9))
def test_however_a_folder_changes_no_photo_moves(
    first: list[Row], second: list[Row], options: dict[str, Any], deleted: int
) -> None:
    old, new = [*BASE, *named(first)], named(second, "new ")
    earlier = index_of(old, **options)
    later = index_of([*old[: 24 + deleted], *old[24 + 2 * deleted :], *new], earlier, **options)
    assert moved(earlier, later) == []
    assert_sound(later, options["near_duplicates"])
    again = decide(later.select(FACTS.names), PrepareConfig(images="/p", out="/o", **options), later)
    assert again == later


def test_what_was_left_out_for_a_while_goes_back_to_its_split() -> None:
    """A wrong copy in another class comes, and is deleted again, while the folder grows."""
    first = index_of([*singles("apple", 60), *singles("pear", 60)], folds=3)
    wrong = [row | {"label": "pear", "uri": f"{row['uri']} too"} for row in singles("apple", 20)]
    second = index_of([*singles("apple", 70), *singles("pear", 70), *wrong], first, folds=3)
    assert second["excluded"].to_pylist().count("conflict") == 40
    third = index_of([*singles("apple", 80), *singles("pear", 80)], second, folds=3)
    assert None not in third["split"].to_pylist()
    assert moved(first, third) == []


def test_a_near_copy_takes_the_place_of_the_deleted_photo_that_stood_for_it() -> None:
    pairs = [photo("apple", look, change, length=2 - change) for look in range(40) for change in (0, 1)]
    first = index_of([*pairs, *singles("pear", 40)], duplicates="keep-first")
    second = index_of([*pairs[1::2], *singles("pear", 40)], first, duplicates="keep-first")
    by_look = {row["thumbnail"]: row["split"] for row in _used(first)}
    assert len(_used(second)) == len(_used(first)) == 80
    assert all(by_look[row["thumbnail"]] == row["split"] for row in _used(second))


def _used(table: pa.Table) -> list[Row]:
    return [row for row in table.to_pylist() if row["split"]]


def test_the_majority_stays_what_it_was() -> None:
    old = [*singles("apple", 20), *singles("pear", 20)]
    new = [row | {"width": 500} for row in (*singles("apple", 50, start=20), *singles("pear", 50, start=20))]
    first = index_of(old, size="majority")
    second = index_of([*old, *new], first, size="majority")
    assert moved(first, second) == []
    assert second["excluded"].to_pylist().count("size") == 100


def test_a_class_of_three_groups_stands_in_three_splits() -> None:
    kiwis = [photo("kiwi", 1), photo("kiwi", 2), *(photo("kiwi", 3, 1 << bit) for bit in range(6))]
    index = index_of([*BASE, *kiwis], test_fraction=0.2)
    assert sorted(counts(index)["kiwi"]) == ["test", "train", "val"]


def test_a_folder_that_did_not_change_has_the_same_index() -> None:
    rows = [*BASE, *COPIES, photo("apple", 3), photo("pear", 3), photo(None, 4), broken("pear", "bad.jpg")]
    earlier = index_of(rows, folds=3)
    assert index_of(rows, earlier, folds=3) == earlier


@pytest.mark.parametrize("seed", range(4))
def test_content_keeps_its_split_under_another_name_and_in_another_class(seed: int) -> None:
    rows = [*singles("apple", 40), *singles("pear", 40)]
    earlier = index_of(rows, folds=3, seed=seed)
    relabelled = [row | {"label": "kiwi", "uri": f"/p/kiwi/{number}.jpg"} for number, row in enumerate(rows[20:60])]
    later = index_of([*rows[:20], *relabelled, *rows[60:]], earlier, folds=3, seed=seed)
    assert places(later) == places(earlier)


def test_a_new_near_duplicate_joins_its_groups_side() -> None:
    rows = [*singles("apple", 30), *singles("pear", 30)]
    earlier = index_of(rows, folds=3)
    twins = [row | {"uri": f"{row['uri']} twin", "sha256": f"{number:064x}"} for number, row in enumerate(rows)]
    later = rows_of(index_of([*rows, *twins], earlier, folds=3))
    for row in rows:
        one, other = later[row["uri"]], later[f"{row['uri']} twin"]
        assert (one["split"], one["fold"], one["group"]) == (other["split"], other["fold"], other["group"])
        assert one["split"] == rows_of(earlier)[row["uri"]]["split"]


def linked_pair(column: str, folds: int = 0) -> tuple[list[Row], pa.Table, Row]:
    """Photos, their index, and a new photo that links two of them which differ in `column`."""
    ends = [[photo("apple", look, 0), photo("apple", look, 0xFFFF)] for look in range(20)]
    rows = [*BASE, *(row for pair in ends for row in pair)]
    index = index_of(rows, folds=folds)
    by_uri = rows_of(index)
    for look, (one, other) in enumerate(ends):
        split, fold = ({by_uri[row["uri"]][name] for row in (one, other)} for name in ("split", "fold"))
        if len({"split": split, "fold": fold}[column]) == 2 and (column == "split" or len(split) == 1):
            return rows, index, photo("apple", look, 0xFF)
    raise AssertionError("no such pair")


def test_a_new_photo_that_links_two_sides_is_left_out() -> None:
    rows, earlier, link = linked_pair("split")
    later = index_of([*rows, link], earlier)
    assert rows_of(later)[link["uri"]]["excluded"] == "leak"
    assert places(later) == places(earlier)
    assert_sound(later)
    assert index_of([*rows, link], later) == later


def test_of_a_chain_only_the_photo_between_two_sides_is_left_out() -> None:
    rows, earlier, link = linked_pair("split")
    end = next(row for row in rows if row["thumbnail"] == link["thumbnail"])
    look = int(end["phash"], 16)
    near_one_end = [
        end | {"uri": f"{end['uri']} {bit}", "sha256": f"{bit:064x}", "phash": f"{look ^ 15 << bit:016x}"}
        for bit in range(20, 50)
    ]
    later = rows_of(index_of([*rows, *near_one_end, link], earlier))
    assert later[link["uri"]]["excluded"] == "leak"
    side = rows_of(earlier)[end["uri"]]["split"]
    assert [later[row["uri"]]["split"] for row in near_one_end] == [side] * len(near_one_end)


def test_a_photo_that_comes_back_between_two_sides_is_left_out_alone() -> None:
    away = photo("apple", 1, 0x7F0000)
    burst, meanwhile = [photo("apple", 1, 1 << bit) for bit in range(13)], photo("apple", 1, 0x7F0000 | 0x7F << 40)
    unread = broken("apple", away["uri"].rpartition("/")[2], "E_TIMEOUT")
    for seed in range(60):
        first = index_of([*BASE, *burst, away], seed=seed)
        second = index_of([*BASE, *burst, unread, meanwhile, *singles("apple", 40, 40)], first, seed=seed)
        sides = {rows_of(second)[row["uri"]]["split"] for row in (burst[0], meanwhile)}
        if len(sides) == 2:
            third = index_of([*BASE, *burst, away, meanwhile, *singles("apple", 40, 40)], second, seed=seed)
            assert [row["uri"] for row in third.to_pylist() if row["excluded"] == "leak"] == [away["uri"]]
            return
    raise AssertionError("the two always came to lie on one side")


def test_the_same_command_after_folds_came_changes_nothing() -> None:
    one, copy, near = (
        photo("apple", 1, bits, uri=f"apple/{name}.jpg") for name, bits in [("a", 0), ("b", 0), ("c", 1)]
    )
    earlier = index_of([*BASE, one, copy, near])
    files = [*BASE, broken("apple", "a.jpg", "E_TIMEOUT"), copy, near]
    folded = index_of(files, earlier, folds=5)
    again = index_of(files, folded, folds=5)
    assert again.drop_columns("dealt") == folded.drop_columns("dealt")
    assert index_of(files, again, folds=5) == again


def test_what_was_left_out_for_a_leak_stays_so_whatever_happens_meanwhile() -> None:
    rows, earlier, link = linked_pair("split")
    leaked = index_of([*rows, link], earlier)
    unread = broken("apple", link["uri"].rpartition("/")[2], "E_TIMEOUT")
    one_end = [row for row in rows if row["thumbnail"] != link["thumbnail"]]
    one_end += [row for row in rows if row["thumbnail"] == link["thumbnail"]][:1]
    for spell in (unread, link | {"label": None}, link | {"label": "pear"}):
        meanwhile = index_of([*one_end, spell], leaked)
        assert_sound(meanwhile)
        assert rows_of(index_of([*one_end, link], meanwhile))[link["uri"]]["excluded"] == "leak"


def test_a_new_photo_that_links_two_folds_is_left_out() -> None:
    rows, earlier, link = linked_pair("fold", folds=3)
    later = index_of([*rows, link], earlier, folds=3)
    assert moved(earlier, later) == []
    assert rows_of(later)[link["uri"]]["excluded"] == "leak"
    assert_sound(later)


def test_photos_of_two_sides_that_are_found_to_be_duplicates_are_left_out() -> None:
    pairs = [[photo("apple", look, 0), photo("apple", look, 0xFF)] for look in range(20)]
    rows = [*BASE, *(row for pair in pairs for row in pair)]
    earlier = index_of(rows, near_duplicates=4)
    later = index_of(rows, earlier, near_duplicates=8)
    before, after = rows_of(earlier), rows_of(later)
    torn = [pair for pair in pairs if len({before[row["uri"]]["split"] for row in pair}) == 2]
    assert torn
    for pair in pairs:
        for row in pair:
            assert after[row["uri"]]["excluded"] == ("leak" if pair in torn else None)
    assert moved(earlier, later) == []
    assert_sound(later)
    assert index_of(rows, later, near_duplicates=8) == later


@pytest.mark.parametrize("rule", ["keep-distinct", "keep-first"])
def test_a_new_copy_never_replaces_a_kept_photo(rule: str) -> None:
    old = [*BASE, *(photo("apple", look, length=5) for look in range(10))]
    earlier = index_of(old, duplicates=rule)
    copies = [photo("apple", look, uri=f"aaa/{look}.jpg", length=9) for look in range(10)]
    larger = [photo("apple", look, 1, uri=f"aaa/large {look}.jpg", size=(999, 999)) for look in range(10)]
    later = index_of([*old, *copies, *larger], earlier, duplicates=rule)
    before, after = rows_of(earlier), rows_of(later)
    for uri in before:
        assert after[uri]["split"] == before[uri]["split"]
    assert {after[row["uri"]]["excluded"] for row in copies} == {"duplicate"}
    assert {after[row["uri"]]["excluded"] for row in larger} == ({"duplicate"} if rule == "keep-first" else {None})


def test_a_file_that_became_a_copy_of_a_kept_photo_does_not_replace_it() -> None:
    old = [*BASE, photo("apple", 1, uri="apple/b.jpg"), photo("apple", 2, uri="apple/z.jpg")]
    earlier = index_of(old)
    later = rows_of(index_of([*old[:-2], photo("apple", 2, uri="apple/b.jpg"), old[-1]], earlier))
    assert later["/p/apple/b.jpg"]["excluded"] == "duplicate"
    assert later["/p/apple/z.jpg"]["split"] == rows_of(earlier)["/p/apple/z.jpg"]["split"]


def test_a_photo_that_could_not_be_read_or_had_no_folder_for_a_while_goes_back_to_its_side() -> None:
    old = [*singles("apple", 60), *singles("pear", 60)]
    first = index_of(old, val_fraction=0.3, test_fraction=0.1, folds=3)
    bad = [
        broken("apple", row["uri"].rpartition("/")[2], code)
        for row, code in zip(old[:30], ["E_TIMEOUT"] * 15 + ["E_SRC_GONE"] * 15, strict=True)
    ]
    homeless = [row | {"label": None} for row in old[30:60]]
    second = index_of(
        [*bad, *homeless, *singles("apple", 60, 60), *old[60:]], first, val_fraction=0.3, test_fraction=0.1, folds=3
    )
    assert len(places(second)) == 120
    third = index_of([*old, *singles("apple", 60, 60)], second, val_fraction=0.3, test_fraction=0.1, folds=3)
    assert places(third).items() >= places(first).items()


@pytest.mark.parametrize(("before", "after"), [(5, 3), (3, 5), (5, 0), (0, 4)])
def test_another_number_of_folds_is_dealt_evenly(before: int, after: int) -> None:
    rows = [*singles("apple", 60), *singles("pear", 45)]
    earlier = index_of(rows, folds=before)
    later = index_of(rows, earlier, folds=after)
    assert [split for split, _ in places(later).values()] == [split for split, _ in places(earlier).values()]
    assert set(later["fold"].drop_null().to_pylist()) == set(range(after))
    for folds in counts(later, "fold").values():
        assert len(folds) == after
        assert max(folds.values()) - min(folds.values()) <= 1


# ---- too few photos


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        pytest.param([], {}, ["two classes", "found none"], id="nothing"),
        pytest.param([photo(None, 1), photo(None, 2)], {}, ["two classes", "found none"], id="no folders"),
        pytest.param(singles("apple", 9), {}, ["two classes", "apple: 7 train + 2 val"], id="one class"),
        pytest.param([*BASE, photo("kiwi", 1)], {}, ["kiwi: 1 train + 0 val, 0 not usable"], id="a single photo"),
        pytest.param(
            [*BASE, broken("kiwi", "1.jpg")],
            {},
            ["kiwi: 0 train + 0 val, 1 not usable"],
            id="a class of unreadable files",
        ),
        pytest.param(
            [*BASE, *(photo("kiwi", 1, uri=f"kiwi/{copy}.jpg") for copy in range(4))],
            {"duplicates": "keep-all"},
            ["kiwi: 4 train + 0 val, 0 not usable, 1 but for duplicates"],
            id="copies of one photo",
        ),
        pytest.param(
            [*BASE, *(photo("kiwi", 1, 1 << bit) for bit in range(5))],
            {},
            ["kiwi: 5 train + 0 val, 0 not usable, 1 but for duplicates", "--near-duplicates"],
            id="a burst",
        ),
        pytest.param(
            [*BASE, *(row | {"label": "kiwi", "uri": f"{row['uri']} too"} for row in BASE[:12])],
            {},
            ["apple: 0 train + 0 val, 12 not usable", "kiwi: 0 train + 0 val, 12 not usable"],
            id="two names for one class",
        ),
        pytest.param(
            [*BASE, photo("kiwi", 1), photo("kiwi", 2)],
            {"test_fraction": 0.2},
            ["train, val and test", "kiwi: 1 train + 1 val + 0 test"],
            id="too few for a test, too",
        ),
        pytest.param(
            [*BASE, *singles("kiwi", 4)],
            {"folds": 5},
            ["--folds 5", "kiwi has 4 distinct photos"],
            id="too few to fold",
        ),
        pytest.param(
            [*BASE, *singles("kiwi", 2), *(photo("kiwi", 1, 1 << bit) for bit in range(5))],
            {"folds": 4},
            ["--folds 4", "kiwi has 3 distinct photos"],
            id="too few groups to fold",
        ),
    ],
)
def test_too_few_photos_are_refused_with_the_counts(rows: list[Row], options: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        index_of(rows, **options)
    assert [words for words in said if words not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["1.jpg", "2.jpg"], "none"),
        (["apple/1.jpg", "apple/red/2.jpg", "3.jpg"], "apple"),
        (
            ["train/pear/1.jpg", "train/apple/2.jpg"],
            "train with the folders apple, pear: if those are the classes, .* it",
        ),
    ],
)
def test_folders_that_are_no_classes_are_refused_before_a_photo_is_read(keys: list[str], found: str) -> None:
    with pytest.raises(UsageError, match=f"two classes, one folder each; found {found}$"):
        require_classes(keys)
    require_classes([*keys, "kiwi/1.jpg", "apple/1.jpg"])


def test_folds_of_an_index_without_any_are_stratified_and_too_few_photos_told() -> None:
    table = index_of([*singles("apple", 20), *singles("pear", 10), *(photo("pear", 1, 1 << bit) for bit in range(5))])
    index = Index(table, "/p", "")
    pool = index.pool()
    require_folds(index, 5)
    held_out = cross_validation(pool, 5, -1)
    for label, most in ((0, 4), (1, 7)):  # the five that are nearly one stay together
        found = Counter(fold for fold, own in zip(held_out, pool.labels, strict=True) if own == label)
        assert set(found) == set(range(5))
        assert max(found.values()) <= most
    [_] = {fold for fold, group in zip(held_out, pool.groups, strict=True) if len(group) == 16}
    with pytest.raises(UsageError, match="--folds 12: class pear has 11 distinct photos"):
        require_folds(index, 12)


# ---- real photos


def _look_at(root: str, first: int, last: int) -> list[tuple[Row, bytes]]:
    """Facts of some photos below `root`, and what this test sees of each: 16 x 16 grey pixels."""
    storage = LocalStorage(root)
    entries = list_images(storage)[0][first:last]
    seen = []
    for entry in entries:
        with Image.open(f"{root}/{entry.key}") as image:
            image.draft("L", (64, 64))
            seen.append(image.convert("L").resize((16, 16), Image.Resampling.BOX).tobytes())
    with Isolated() as isolated:
        return list(zip(audit(storage, entries, isolated), seen, strict=True))


@pytest.fixture(scope="module")
def seen(shared_data: Path) -> dict[str, tuple[Row, bytes]]:
    """Each real photo as `_look_at` sees it, by URI."""
    root, step = str(shared_data / "vuw-fruit"), 500
    starts = range(0, 5000, step)
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(_look_at, [root] * len(starts), starts, [start + step for start in starts])
        return {row["uri"]: (row, grey) for part in parts for row, grey in part}


def test_the_real_photos_are_known(seen: dict[str, tuple[Row, bytes]]) -> None:
    """The numbers that the photos' README gives."""
    found = summary(index_of((row for row, _ in seen.values()), size="300x300"))
    names = ("cherry", "strawberry", "tomato")
    assert (found["files"], found["photos"]) == (4500, 4500)
    assert found["sizes"][0] == {"size": "300x300", **dict.fromkeys(names, 1480), "all": 4440}
    (size,) = (line for line in found["odd"] if line["odd"] == "size")
    assert size == {"odd": "size", **dict.fromkeys(names, 20), "all": 60}
    (grey,) = (line for line in found["modes"] if line["mode"] == "L")
    assert grey["all"] == 1
    (left_out,) = (line for line in found["excluded"] if line["excluded"] == "size")
    assert left_out["all"] == 60
    used = sum(line["train"] + line["val"] for line in found["classes"])
    assert used == 4440 - sum(line["all"] for line in found["excluded"] if line["excluded"] != "size")


def test_no_real_photo_has_a_duplicate_on_another_side(seen: dict[str, tuple[Row, bytes]]) -> None:
    index = index_of((row for row, _ in seen.values()), folds=5).filter(pc.field("split").is_valid())
    assert index.num_rows > 4400
    grey = np.stack([np.frombuffer(seen[uri][1], np.uint8) for uri in index["uri"].to_pylist()]).astype(np.float32)
    grey = (grey - grey.mean(axis=1, keepdims=True)) / grey.std(axis=1, keepdims=True)
    hashes = np.array([int(phash, 16) for phash in index["phash"].to_pylist()], dtype=np.uint64)
    places = list(zip(index["split"].to_pylist(), index["fold"].to_pylist(), strict=True))
    close = 0
    for one in range(len(hashes)):
        apart = np.bitwise_count(hashes[one + 1 :] ^ hashes[one])
        for other in (one + 1 + np.flatnonzero(apart <= 8)).tolist():
            if apart[other - one - 1] <= 4 or float(grey[one] @ grey[other]) / 256 > 0.93:
                close += 1
                assert places[one] == places[other], (index["uri"][one], index["uri"][other])
    assert close >= 20
    assert_same_bytes_on_one_side(index)


def assert_same_bytes_on_one_side(index: pa.Table) -> None:
    sides = defaultdict(set)
    for sha256, split in zip(index["sha256"].to_pylist(), index["split"].to_pylist(), strict=True):
        sides[sha256].add(split)
    assert {len(where) for where in sides.values()} == {1}
