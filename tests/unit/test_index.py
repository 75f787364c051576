"""Behaviour of audit, index and split: exact counts, a repeatable split without leaks, one file for the same rows."""

import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fruitray.audit import audit, label_of, size_table, summary
from fruitray.errors import NoInputError, NotFoundError, OutputConflictError, UsageError
from fruitray.images import list_images
from fruitray.index import FILE, SCHEMA, index_place, read_index, write_index
from fruitray.split import assign_splits
from fruitray.storage import LocalStorage

Rows = list[dict[str, Any]]


def photo(number: int, size: tuple[int, int] = (16, 12), mode: str = "RGB", file_format: str = "PNG") -> bytes:
    """A photo unlike that of any other number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, file_format)
    return sink.getvalue()


def photos(root: Path, files: dict[str, bytes]) -> LocalStorage:
    for key, data in files.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    return LocalStorage(str(root))


def audited(storage: LocalStorage) -> Rows:
    return list(audit(storage, list_images(storage)[0]))


def row(label: str | None, content: str | int, name: str = "", status: str = "ok") -> dict[str, Any]:
    return {"uri": f"/p/{label}/{content}{name}", "label": label, "sha256": f"sha-{content}", "status": status}


def two_classes(per_class: int) -> Rows:
    return [row(label, f"{label}{number}") for label in ("apple", "pear") for number in range(per_class)]


def sides(rows: Sequence[dict[str, Any]], *, seed: int = 0, val_fraction: float = 0.2) -> dict[str, set[Any]]:
    """The splits in which each content lies."""
    found: dict[str, set[Any]] = {}
    for split in assign_splits(rows, val_fraction=val_fraction, seed=seed):
        found.setdefault(split["sha256"], set()).add(split["split"])
    return found


MIXED = {
    "apple/1.png": photo(1),
    "apple/2.png": photo(2),
    "apple/2 again.png": photo(2),
    "apple/3.png": photo(3, (12, 16)),
    "apple/grey.png": photo(4, mode="L"),
    "pear/5.png": photo(5),
    "pear/6.jpg": photo(6, file_format="JPEG"),
    "pear/7.png": photo(7, (12, 16)),
    "pear/both.png": photo(8),
    "apple/both.png": photo(8),
    "pear/cut.png": photo(9)[:-4],
    "pear/note.txt": b"ripe on Monday",
    "unlabelled.png": photo(10),
}


# ---- audit


def test_each_file_gets_one_row_of_facts_in_order(tmp_path: Path) -> None:
    storage = photos(tmp_path, MIXED)
    entries, _ = list_images(storage)
    rows = list(audit(storage, entries))
    assert [fact["uri"] for fact in rows] == [f"{tmp_path}/{key}" for key in sorted(MIXED)]
    assert [fact["bytes"] for fact in rows] == [len(MIXED[key]) for key in sorted(MIXED)]
    assert [fact["etag"] for fact in rows] == [entry.etag for entry in entries]
    by_key = {fact["uri"].removeprefix(f"{tmp_path}/"): fact for fact in rows}
    grey = by_key["apple/grey.png"]
    assert (grey["width"], grey["height"], grey["mode"], grey["label"], grey["status"]) == (16, 12, "L", "apple", "ok")
    assert by_key["apple/2.png"]["sha256"] == by_key["apple/2 again.png"]["sha256"] != by_key["apple/1.png"]["sha256"]
    cut = by_key["pear/cut.png"]
    assert (cut["status"], cut["error_code"], cut.get("width")) == ("error", "E_TRUNCATED", None)


def test_an_animation_is_noted(tmp_path: Path) -> None:
    sink = io.BytesIO()
    still, moved = Image.open(io.BytesIO(photo(1))), Image.open(io.BytesIO(photo(2)))
    still.save(sink, "WEBP", save_all=True, append_images=[moved])
    rows = audited(photos(tmp_path, {"apple/still.png": photo(1), "pear/moving.webp": sink.getvalue()}))
    assert [fact["frames"] for fact in rows] == [1, 2]


@pytest.mark.parametrize(
    ("key", "label"), [("apple/1.jpg", "apple"), ("apple/old/1.jpg", "apple"), ("1.jpg", None), (" a b/1.jpg", " a b")]
)
def test_the_first_folder_is_the_label(key: str, label: str | None) -> None:
    assert label_of(key) == label


def test_the_summary_counts_exactly(tmp_path: Path) -> None:
    rows = assign_splits(audited(photos(tmp_path, MIXED)), val_fraction=0.3, seed=0)
    found = summary(rows)
    assert found["files"] == 13
    assert found["by_status"] == {"error": 2, "ok": 11}
    assert found["by_error_code"] == {"E_NOT_IMAGE": 1, "E_TRUNCATED": 1}
    assert found["by_mode"] == {"L": 1, "RGB": 10}
    assert (found["exact_duplicate_groups"], found["exact_duplicate_files"]) == (2, 2)
    assert found["sizes"] == [
        {"size": "16x12", "": 1, "apple": 5, "pear": 3, "all": 9},
        {"size": "12x16", "": 0, "apple": 1, "pear": 1, "all": 2},
    ]
    split = {line.pop("label"): line for line in found["by_split"]}
    assert split["(none)"] == {"train": 0, "val": 0, "excluded": 1, "error": 0}
    assert (split["apple"]["excluded"], split["pear"]["excluded"], split["pear"]["error"]) == (1, 1, 2)
    assert split["apple"]["train"] + split["apple"]["val"] == 5
    assert split["pear"]["train"] + split["pear"]["val"] == 3


def test_the_summary_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = assign_splits(audited(photos(tmp_path, MIXED)), val_fraction=0.3, seed=0)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert json.dumps(summary(shuffled)) == json.dumps(summary(rows))


def test_sizes_are_listed_from_the_commonest() -> None:
    sizes = [(300, 300)] * 3 + [(20, 10)] + [(10, 20)] * 2
    rows = [{"label": "a", "status": "ok", "width": width, "height": height} for width, height in sizes]
    assert [(line["size"], line["all"]) for line in size_table(rows)] == [("300x300", 3), ("10x20", 2), ("20x10", 1)]


# ---- split


@pytest.mark.parametrize(
    ("per_class", "val_fraction", "val"), [(10, 0.2, 2), (1500, 0.2, 300), (7, 0.2, 1), (2, 0.01, 1), (3, 0.99, 2)]
)
def test_every_class_is_held_out_by_the_same_share(per_class: int, val_fraction: float, val: int) -> None:
    split = assign_splits(two_classes(per_class), val_fraction=val_fraction, seed=0)
    counts = Counter((fact["label"], fact["split"]) for fact in split)
    for label in ("apple", "pear"):
        assert (counts[label, "val"], counts[label, "train"]) == (val, per_class - val)


@given(
    st.lists(st.tuples(st.sampled_from(["apple", "pear"]), st.integers(0, 40)), min_size=20, max_size=80),
    st.integers(0, 3),
    st.floats(0.1, 0.9),
)
def test_copies_never_lie_on_both_sides(contents: list[tuple[str, int]], seed: int, val_fraction: float) -> None:
    rows = [row(label, f"{label}{content}", str(copy)) for copy, (label, content) in enumerate(contents)]
    try:
        found = sides(rows, seed=seed, val_fraction=val_fraction)
    except UsageError:  # so few contents that a class cannot stand on both sides
        return
    assert {frozenset(split) for split in found.values()} == {frozenset({"train"}), frozenset({"val"})}


def test_a_large_group_of_copies_does_not_upset_the_share() -> None:
    rows = [row("apple", "same", f"copy{number}") for number in range(30)] + two_classes(70)
    counts = Counter(
        fact["split"] for fact in assign_splits(rows, val_fraction=0.2, seed=0) if fact["label"] == "apple"
    )
    assert counts == {"val": 20, "train": 80}


@pytest.mark.parametrize("seed", range(5))
def test_a_content_in_two_classes_is_used_in_neither(seed: int) -> None:
    rows = [*two_classes(10), row("apple", "both"), row("pear", "both"), row("pear", "both", "copy")]
    split = assign_splits(rows, val_fraction=0.2, seed=seed)
    assert {fact["split"] for fact in split if fact["sha256"] == "sha-both"} == {None}
    assert sum(fact["split"] is None for fact in split) == 3


def test_unreadable_and_unlabelled_files_are_used_nowhere() -> None:
    unusable = [row("apple", "bad", status="error"), row(None, "loose"), {**row("pear", "gone", status="error")}]
    del unusable[-1]["sha256"]  # never read
    split = assign_splits([*two_classes(5), *unusable], val_fraction=0.2, seed=0)
    assert [fact["split"] for fact in split[-3:]] == [None, None, None]
    assert None not in [fact["split"] for fact in split[:-3]]


def test_rows_keep_their_order_and_facts() -> None:
    rows = two_classes(5)
    split = assign_splits(rows, val_fraction=0.2, seed=0)
    assert [{key: value for key, value in fact.items() if key != "split"} for fact in split] == rows


def test_the_seed_alone_decides_for_the_same_contents() -> None:
    rows = two_classes(50)
    assert sides(rows, seed=1) == sides(rows, seed=1)
    assert sides(rows, seed=1) != sides(rows, seed=2)


def test_neither_names_nor_order_move_a_photo_to_the_other_side() -> None:
    rows = [*two_classes(50), *(row("apple", f"apple{number}", "copy") for number in range(5))]
    renamed = [{**fact, "uri": f"s3://elsewhere/{number}.jpg"} for number, fact in enumerate(rows)]
    assert sides(random.Random(1).sample(renamed, len(renamed))) == sides(rows)


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        pytest.param([], ["two classes", "found none"], id="nothing"),
        pytest.param([row(None, 1), row(None, 2)], ["two classes", "found none"], id="no folders"),
        pytest.param(two_classes(9)[:9], ["two classes", "apple: 7 train + 2 val"], id="one class"),
        pytest.param(
            [*two_classes(5), row("kiwi", 1)], ["kiwi: 0 train + 1 val", "apple: 4 train + 1 val"], id="single"
        ),
        pytest.param(
            [*two_classes(5), row("kiwi", 1, status="error")], ["kiwi: 0 train + 0 val"], id="unreadable class"
        ),
        pytest.param(
            [*two_classes(5), *(row("kiwi", "same", str(copy)) for copy in range(4))],
            ["kiwi: 4 train + 0 val"],
            id="copies of one photo",
        ),
        pytest.param(
            [*two_classes(5), *(row("kiwi", f"apple{number}") for number in range(5))],
            ["apple: 0 train + 0 val", "kiwi: 0 train + 0 val", "pear: 4 train + 1 val"],
            id="two names for one class",
        ),
    ],
)
def test_too_few_photos_are_refused_with_the_counts(rows: Rows, counts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        assign_splits(rows, val_fraction=0.2, seed=0)
    assert [count for count in counts if count not in str(caught.value)] == []


# ---- index


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return assign_splits(audited(photos(tmp_path / "photos", MIXED)), val_fraction=0.3, seed=0)


def written(folder: Path, rows: Rows, images: str) -> bytes:
    write_index(LocalStorage(str(folder)), rows, images)
    return (folder / FILE).read_bytes()


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path, rows: Rows) -> None:
    images = str(tmp_path / "photos")
    data = written(tmp_path / "1", rows, images)
    assert written(tmp_path / "2", random.Random(0).sample(rows, len(rows)), images) == data
    assert written(tmp_path / "3", rows[1:], images) != data


@pytest.mark.parametrize("named", ["", "/", f"/{FILE}"])
def test_an_index_is_read_back_as_written(tmp_path: Path, rows: Rows, named: str) -> None:
    images = str(tmp_path / "photos")
    written(tmp_path / "out", rows, images)
    index = read_index(f"{tmp_path}/out{named}")
    assert index.images == images
    assert index.table.schema.names == SCHEMA.names
    assert [fact["uri"] for fact in index.table.to_pylist()] == sorted(fact["uri"] for fact in rows)
    for found, wanted in zip(index.table.to_pylist(), sorted(rows, key=lambda fact: fact["uri"]), strict=True):
        assert {key: value for key, value in found.items() if value is not None} == {
            key: value for key, value in wanted.items() if value is not None
        }
    storage, key = index_place(f"{tmp_path}/out{named}")
    assert storage.uri_of(key) == f"{tmp_path}/out/{FILE}"


def test_an_index_leads_to_the_photos_of_each_split(tmp_path: Path, rows: Rows) -> None:
    storage = LocalStorage(str(tmp_path / "photos"))
    written(tmp_path / "out", rows, storage.uri)
    index = read_index(str(tmp_path / "out"))
    assert index.classes == ("apple", "pear")
    seen = Counter[str]()
    for split in ("train", "val"):
        entries, classes = index.rows(split)
        for entry, number in zip(entries, classes, strict=True):
            assert storage.read(entry.key, entry.etag) == MIXED[entry.key]
            assert entry.key.startswith(f"{index.classes[number]}/")
            assert entry.size == len(MIXED[entry.key])
            seen[entry.key] += 1
    unused = {"apple/both.png", "pear/both.png", "pear/cut.png", "pear/note.txt", "unlabelled.png"}
    assert seen == dict.fromkeys(set(MIXED) - unused, 1)


def test_a_class_that_neither_side_uses_is_no_class(tmp_path: Path) -> None:
    split = [
        *assign_splits(two_classes(5), val_fraction=0.2, seed=0),
        {**row("kiwi", 1, status="error"), "split": None},
    ]
    written(tmp_path, split, "/p")
    assert read_index(str(tmp_path)).classes == ("apple", "pear")


def test_the_hash_of_an_index_follows_its_content(tmp_path: Path, rows: Rows) -> None:
    for folder, part in {"1": rows, "2": rows, "3": rows[:-1]}.items():
        written(tmp_path / folder, part, "/p")
    hashes = [read_index(str(tmp_path / folder)).sha256 for folder in "123"]
    assert hashes[0] == hashes[1] != hashes[2]


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


OURS = {"fruitray": json.dumps({"images": "/p"})}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"uri,label\n", id="CSV"),
        pytest.param(parquet(pa.table({"uri": ["a"], "label": ["b"]})), id="another table"),
        pytest.param(parquet(SCHEMA.empty_table()), id="our columns without our mark"),
        pytest.param(parquet(pa.table({"uri": ["a"]}).replace_schema_metadata(OURS)), id="our mark on other columns"),
        pytest.param(parquet(SCHEMA.empty_table().replace_schema_metadata({"fruitray": "[]"})), id="another mark"),
        pytest.param(parquet(SCHEMA.empty_table().replace_schema_metadata({"fruitray": "{"})), id="half a mark"),
    ],
)
def test_what_prepare_did_not_write_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(OutputConflictError, match="no index") as caught:
        read_index(str(tmp_path))
    assert f"{tmp_path}/{FILE}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_refused_or_read_but_never_a_crash(tmp_path: Path, rows: Rows) -> None:
    data = written(tmp_path, rows, "/p")
    choice = random.Random(3)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data[: choice.choice([len(data), choice.randrange(len(data))])])
        for position in [choice.randrange(len(damaged)) for _ in range(5)] if damaged else []:
            damaged[position] = choice.randrange(256)
        (tmp_path / FILE).write_bytes(damaged)
        try:
            read_index(str(tmp_path)).rows("train")
        except OutputConflictError:
            refused += 1
    assert refused > 100


def test_an_index_without_rows_is_no_input(tmp_path: Path) -> None:
    written(tmp_path, [], "/p")
    with pytest.raises(NoInputError):
        read_index(str(tmp_path))


def test_a_missing_index_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=FILE):
        read_index(str(tmp_path))
