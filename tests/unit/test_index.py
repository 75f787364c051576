"""Behaviour of the index: one file for the same rows, read back or refused, and a leak in it is an error."""

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.errors import LeakError, NoInputError, NotFoundError, OutputConflictError
from fruitray.facts import VERSION
from fruitray.images import CODES
from fruitray.index import (
    DECIDED,
    FACTS,
    FILE,
    SCHEMA,
    Index,
    check_leaks,
    index_place,
    known_facts,
    read_index,
    write_index,
)
from fruitray.storage import Entry, LocalStorage
from tests.tables import Row, broken, facts, index_of, photo, shuffled, singles

ROWS = [
    *singles("apple", 12),
    *singles("pear", 8),
    photo("apple", 1),
    photo("apple", 1, uri="apple/1 again.jpg"),
    photo("pear", 2),
    photo("pear", 2, 0b1),
    photo("apple", 3),
    photo("pear", 3),
    photo(None, 4, uri="loose.jpg"),
    broken("pear", "cut.jpg"),
]


def written(folder: Path, table: pa.Table, images: str = "/p") -> bytes:
    write_index(LocalStorage(str(folder)), table, images)
    return (folder / FILE).read_bytes()


# ---- writing


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    table = index_of(ROWS, folds=3)
    data = written(tmp_path / "1", table)
    mixed = table.take(np.random.default_rng(0).permutation(table.num_rows))
    assert written(tmp_path / "2", mixed) == data
    assert written(tmp_path / "3", index_of(shuffled(ROWS), folds=3)) == data
    assert written(tmp_path / "4", table.slice(1)) != data
    assert written(tmp_path / "5", table, "/elsewhere") != data


def test_the_same_rows_give_the_same_bytes_in_any_pieces(tmp_path: Path) -> None:
    table = index_of([*singles("apple", 3000), *singles("pear", 3000)])
    data = written(tmp_path / "1", table)
    for folder, cuts in {"2": [0, 1, 7, 900, 6000], "3": [0, 3000, 6000]}.items():
        pieces = [table.slice(start, end - start) for start, end in itertools.pairwise(cuts)]
        random.Random(0).shuffle(pieces)
        assert written(tmp_path / folder, pa.concat_tables(pieces)) == data


def test_every_column_says_in_the_file_what_it_holds(tmp_path: Path) -> None:
    written(tmp_path, index_of(ROWS))
    fields = list(pq.read_schema(tmp_path / FILE))
    assert [field.name for field in fields] == SCHEMA.names
    for field in fields:
        assert len(field.metadata[b"description"]) > 10, field.name
    assert FACTS.names == [name for name in SCHEMA.names if name not in DECIDED]


# ---- reading


@pytest.mark.parametrize("place", ["", "/", f"/{FILE}"])
def test_an_index_is_read_back_as_written(tmp_path: Path, place: str) -> None:
    table = index_of(ROWS, folds=3)
    data = written(tmp_path / "out", table)
    index = read_index(f"{tmp_path}/out{place}")
    assert index.images == "/p"
    assert index.table == table
    assert index.sha256 == hashlib.sha256(data).hexdigest()
    storage, key = index_place(f"{tmp_path}/out{place}")
    assert storage.uri_of(key) == f"{tmp_path}/out/{FILE}"


def test_an_index_leads_to_the_photos_of_each_split(tmp_path: Path) -> None:
    written(tmp_path, index_of(ROWS))
    index = read_index(str(tmp_path))
    assert index.classes == ("apple", "pear")
    by_key = {row["uri"].removeprefix("/p/"): row for row in index.table.to_pylist()}
    seen = Counter[str]()
    for split in ("train", "val"):
        entries, classes = index.rows(split)
        for entry, number in zip(entries, classes, strict=True):
            row = by_key[entry.key]
            assert (row["split"], row["label"]) == (split, index.classes[number])
            assert (row["bytes"], row["etag"]) == (entry.size, entry.etag)
            seen[entry.key] += 1
    unused = {"apple/1-0.jpg", "apple/3-0.jpg", "pear/3-0.jpg", "loose.jpg", "pear/cut.jpg"}
    assert seen == dict.fromkeys(by_key.keys() - unused, 1)
    assert index.rows("test") == ([], [])


def test_the_pool_is_train_and_val_in_index_order() -> None:
    index = Index(index_of(ROWS, folds=3, test_fraction=0.2), "/p", "")
    used = [row for row in index.table.to_pylist() if row["split"] in ("train", "val")]
    pool = index.pool()
    assert [entry.key for entry in pool.entries] == [row["uri"].removeprefix("/p/") for row in used]
    assert [(entry.size, entry.etag) for entry in pool.entries] == [(row["bytes"], row["etag"]) for row in used]
    assert [index.classes[number] for number in pool.labels] == [row["label"] for row in used]
    assert (pool.splits, pool.folds) == ([row["split"] for row in used], [row["fold"] for row in used])
    assert set(pool.folds) == {0, 1, 2}
    assert len(set(pool.groups)) == len({row["group"] or row["sha256"] for row in used})
    assert index.rows("test")[0]
    for split in ("train", "val"):
        assert [entry for entry, its in zip(pool.entries, pool.splits, strict=True) if its == split] == index.rows(
            split
        )[0]


def test_a_class_that_no_split_has_is_no_class() -> None:
    table = index_of(ROWS)
    assert Index(table, "/p", "").classes == ("apple", "pear")
    assert Index(
        table.filter(pa.array([label != "pear" for label in table["label"].to_pylist()])), "/p", ""
    ).classes == ("apple",)


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def marked(table: pa.Table, **mark: Any) -> pa.Table:
    return table.replace_schema_metadata({"fruitray": json.dumps(mark)})


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"uri,label\n", id="CSV"),
        pytest.param(parquet(pa.table({"uri": ["a"], "label": ["b"]})), id="another table"),
        pytest.param(parquet(SCHEMA.empty_table()), id="our columns without our mark"),
        pytest.param(
            parquet(marked(pa.table({"uri": ["a"]}), images="/p", version=VERSION)), id="our mark on other columns"
        ),
        pytest.param(parquet(SCHEMA.empty_table().replace_schema_metadata({"fruitray": "[]"})), id="another mark"),
        pytest.param(parquet(SCHEMA.empty_table().replace_schema_metadata({"fruitray": "{"})), id="half a mark"),
        pytest.param(parquet(marked(SCHEMA.empty_table(), images="/p")), id="no version"),
    ],
)
def test_what_prepare_did_not_write_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(OutputConflictError, match="no index") as caught:
        read_index(str(tmp_path))
    assert f"{tmp_path}/{FILE}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, "1"])
@pytest.mark.parametrize("without", [[], ["thumbnail"]])
def test_an_index_of_another_version_is_refused_as_such(tmp_path: Path, version: Any, without: list[str]) -> None:
    table = index_of(ROWS).drop_columns(without)
    (tmp_path / FILE).write_bytes(parquet(marked(table, images="/p", version=version)))
    with pytest.raises(OutputConflictError, match="another version"):
        read_index(str(tmp_path))


def test_a_damaged_index_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    data = written(tmp_path, index_of(ROWS))
    table = read_index(str(tmp_path)).table
    choice = random.Random(3)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data[: choice.choice([len(data), choice.randrange(len(data))])])
        for position in [choice.randrange(len(damaged)) for _ in range(choice.choice([1, 5]))] if damaged else []:
            damaged[position] = choice.randrange(256)
        (tmp_path / FILE).write_bytes(damaged)
        try:
            assert read_index(str(tmp_path)).table == table
        except OutputConflictError:
            refused += 1
    assert 100 < refused < 200


def test_an_index_without_rows_is_no_input(tmp_path: Path) -> None:
    written(tmp_path, SCHEMA.empty_table())
    with pytest.raises(NoInputError):
        read_index(str(tmp_path))


def test_a_missing_index_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=FILE):
        read_index(str(tmp_path))


# ---- leaks


def tampered(table: pa.Table, uri: str, **values: Any) -> pa.Table:
    rows = [row | values if row["uri"] == uri else row for row in table.to_pylist()]
    return pa.Table.from_pylist(rows, SCHEMA)


def test_a_copy_on_another_side_is_a_leak(tmp_path: Path) -> None:
    table = index_of(ROWS)
    kept = next(row for row in table.to_pylist() if row["uri"] == "/p/apple/1 again.jpg")
    other = {"train": "val", "val": "train"}[kept["split"]]
    written(tmp_path, tampered(table, "/p/apple/1-0.jpg", split=other, group=None))
    with pytest.raises(LeakError) as caught:
        read_index(str(tmp_path))
    for said in (f"{tmp_path}/{FILE}", "1 duplicates", "/p/apple/1-0.jpg", "/p/apple/1 again.jpg", "(train)", "(val)"):
        assert said in str(caught.value)
    assert isinstance(caught.value, OutputConflictError)


@pytest.mark.parametrize("side", ["train", "val", "test"])
def test_a_group_on_two_sides_is_a_leak(tmp_path: Path, side: str) -> None:
    table = index_of(ROWS)
    there = {row["split"] for row in table.to_pylist() if row["uri"] in ("/p/pear/2-0.jpg", "/p/pear/2-1.jpg")}
    written(tmp_path, tampered(table, "/p/pear/2-1.jpg", split=side))
    if there == {side}:
        assert read_index(str(tmp_path)).table.num_rows == len(ROWS)
    else:
        with pytest.raises(LeakError, match=r"pear/2-1\.jpg"):
            read_index(str(tmp_path))


def test_a_group_in_two_folds_is_a_leak(tmp_path: Path) -> None:
    table = index_of(ROWS, folds=2)
    (fold,) = {row["fold"] for row in table.to_pylist() if row["uri"] in ("/p/pear/2-0.jpg", "/p/pear/2-1.jpg")}
    written(tmp_path, tampered(table, "/p/pear/2-1.jpg", fold=1 - fold))
    with pytest.raises(LeakError, match=r"two folds.*pear/2-1\.jpg"):
        read_index(str(tmp_path))


def test_what_is_left_out_leaks_nothing() -> None:
    table = index_of(ROWS)
    assert {"conflict", "duplicate"} <= set(table["excluded"].to_pylist())
    check_leaks(table, "/o")


def test_a_leak_is_found_in_a_million_rows() -> None:
    number = np.arange(1_000_000)
    columns = {
        "uri": pa.array(number).cast(pa.string()),
        "sha256": pa.array(number // 2).cast(pa.string()),
        "group": pa.array(number // 4, mask=number % 8 >= 4).cast(pa.string()),
        "split": pa.array(np.where(number // 4 % 5 == 0, "val", "train")),
        "fold": pa.nulls(len(number), pa.int32()),
    }
    check_leaks(pa.table(columns), "/o")
    moved = np.where(number // 4 % 5 == 0, "val", "train")
    moved[777_777] = "val"
    with pytest.raises(LeakError, match="777777"):
        check_leaks(pa.table(columns | {"split": pa.array(moved)}), "/o")


# ---- what an earlier index knows

KNOWN = [*singles("apple", 6), *singles("pear", 6)]


def entry(row: Row) -> Entry:
    return Entry(row["uri"].removeprefix("/p/"), row["bytes"], row["etag"])


def known(rows: list[Row], entries: list[Entry]) -> tuple[list[Row], list[Entry]]:
    table, fresh = known_facts(Index(index_of(rows), "/p", ""), LocalStorage("/p"), entries)
    assert table.schema == FACTS
    return table.to_pylist(), fresh


def test_files_that_are_the_same_are_not_read_again() -> None:
    rows = [*KNOWN, photo(None, 1, uri="loose.jpg"), broken("apple", "cut.jpg")]
    found, fresh = known(rows, [entry(row) for row in shuffled(rows)])
    assert fresh == []
    assert found == facts(shuffled(rows)).to_pylist()


def test_new_and_changed_files_are_read_and_deleted_ones_forgotten() -> None:
    same, larger, newer, _deleted = KNOWN[:4]
    entries = [
        Entry("apple/new.jpg", 1, "1"),
        Entry(entry(larger).key, 2, "1"),
        entry(same),
        Entry(entry(newer).key, 1, "2"),
        *(entry(row) for row in KNOWN[4:]),
    ]
    found, fresh = known(KNOWN, entries)
    assert fresh == [entries[0], entries[1], entries[3]]
    assert found == facts([same, *KNOWN[4:]]).to_pylist()


def test_another_root_gives_other_labels() -> None:
    earlier = Index(index_of([row | {"uri": f"/p/more/{row['uri'][3:]}"} for row in KNOWN]), "/p/more", "")
    entries = [Entry(f"more/{row['uri'][3:]}", row["bytes"], row["etag"]) for row in KNOWN]
    known, fresh = known_facts(earlier, LocalStorage("/p"), entries)
    assert not fresh
    assert known["label"].to_pylist() == ["more"] * len(KNOWN)


def test_the_same_key_below_another_root_is_another_file() -> None:
    index = Index(index_of(KNOWN), "/p", "")
    table, fresh = known_facts(index, LocalStorage("/q"), [entry(row) for row in KNOWN])
    assert (table.num_rows, len(fresh)) == (0, len(KNOWN))


PASSING = {code for code in CODES if code.startswith("E_SRC")} | {"E_TIMEOUT", "E_DECODE_CRASH"}
UNTOUCHED = {"E_SYMLINK", "E_NOT_REGULAR"}
"""Never opened, so that nothing is saved by knowing them."""


@pytest.mark.parametrize("code", sorted(CODES.keys() - UNTOUCHED))
def test_a_file_that_may_do_better_now_is_read_again(code: str) -> None:
    bad = broken("apple", "bad.jpg", code)
    found, fresh = known([*KNOWN, bad], [entry(bad), *(entry(row) for row in KNOWN)])
    assert len(found) + len(fresh) == len(KNOWN) + 1
    assert fresh == ([entry(bad)] if code in PASSING else [])


def test_what_is_known_and_what_is_read_make_the_same_index(tmp_path: Path) -> None:
    rows = [*ROWS, *singles("apple", 5, start=12)]
    data = written(tmp_path / "1", index_of(rows, folds=3))
    index = read_index(str(tmp_path / "1"))
    table, fresh = known_facts(index, LocalStorage("/p"), [entry(row) for row in shuffled(rows)])
    assert fresh == []
    assert written(tmp_path / "2", index_of(table.to_pylist(), index.table, folds=3)) == data
