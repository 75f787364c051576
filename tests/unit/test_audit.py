"""Behaviour of the audit: one row per file whatever is in it, exact counts, and what is odd among the others."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fruitray.audit import audit, crosstab, hints, majority_size, odd_ones, sizes, summary
from fruitray.cluster.prepare import _audit_chunk
from fruitray.config import PrepareConfig
from fruitray.errors import NotFoundError
from fruitray.images import list_images
from fruitray.index import FACTS, label_of
from fruitray.isolate import Isolated
from fruitray.rules import REASONS
from fruitray.split import decide
from fruitray.storage import Entry, LocalStorage
from tests.tables import Row, broken, facts, index_of, photo, shuffled, singles

# ---- files -> facts


def picture(number: int, size: tuple[int, int] = (16, 12), mode: str = "RGB", file_format: str = "PNG") -> bytes:
    """A photo unlike that of any other number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, file_format)
    return sink.getvalue()


MIXED = {
    "apple/1.png": picture(1),
    "apple/2.png": picture(2),
    "apple/2 again.png": picture(2),
    "apple/3.png": picture(3, (12, 16)),
    "apple/grey.png": picture(4, mode="L"),
    "pear/5.png": picture(5),
    "pear/6.jpg": picture(6, file_format="JPEG"),
    "pear/7.png": picture(7, (12, 16)),
    "pear/both.png": picture(8),
    "apple/both.png": picture(8),
    "pear/cut.png": picture(9)[:-4],
    "pear/note.txt": b"ripe on Monday",
    "unlabelled.png": picture(10),
}


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    for key, data in MIXED.items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    return LocalStorage(str(tmp_path))


def test_each_file_gets_one_row_of_facts_in_order(storage: LocalStorage, isolated: Isolated) -> None:
    entries, _ = list_images(storage)
    rows = list(audit(storage, entries, isolated))
    assert [row["uri"] for row in rows] == [f"{storage.uri}/{key}" for key in sorted(MIXED)]
    assert [row["bytes"] for row in rows] == [len(MIXED[key]) for key in sorted(MIXED)]
    assert [row["etag"] for row in rows] == [entry.etag for entry in entries]
    by_key = {row["uri"].removeprefix(f"{storage.uri}/"): row for row in rows}
    grey = by_key["apple/grey.png"]
    assert (grey["width"], grey["height"], grey["mode"], grey["label"], grey["status"]) == (16, 12, "L", "apple", "ok")
    assert by_key["apple/2.png"]["sha256"] == by_key["apple/2 again.png"]["sha256"] != by_key["apple/1.png"]["sha256"]
    cut = by_key["pear/cut.png"]
    assert (cut["status"], cut["error_code"], cut.get("width")) == ("error", "E_TRUNCATED", None)
    assert "ends before" in cut["error"]
    assert by_key["unlabelled.png"]["label"] is None
    assert pa.Table.from_pylist(rows, FACTS).num_rows == len(MIXED)


def test_a_file_that_cannot_be_had_gets_its_row_too(storage: LocalStorage, isolated: Isolated) -> None:
    entries = [Entry("apple/gone.png", 7, "1"), Entry("apple/link.png", 7, "1", "symlink"), list_images(storage)[0][0]]
    rows = list(audit(storage, entries, isolated))
    assert [row.get("error_code") for row in rows] == ["E_SRC_GONE", "E_SYMLINK", None]
    assert [row["bytes"] for row in rows[:2]] == [7, 7]


def test_where_the_photos_are_not_mounted_they_are_not_called_gone(storage: LocalStorage, tmp_path: Path) -> None:
    gone = Entry("apple/gone.png", 7, "1")

    def look(root: str) -> list[str]:
        codes: list[str] = _audit_chunk(pa.Table.from_pylist([{"root": root, **asdict(gone)}]))[
            "error_code"
        ].to_pylist()
        return codes

    assert look(storage.uri) == ["E_SRC_GONE"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="is it not mounted"):
        look(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("apple/1.jpg", "apple"),
        ("apple/old/1.jpg", "apple"),
        ("1.jpg", None),
        (" a b/1.jpg", " a b"),
        ("/1.jpg", None),
    ],
)
def test_the_first_folder_is_the_label(key: str, label: str | None) -> None:
    assert label_of(key) == label


# ---- what is odd


def odd(rows: list[Row]) -> list[list[str] | None]:
    found: list[list[str] | None] = odd_ones(facts(rows)).to_pylist()
    return found


def sized(*shapes: tuple[int, int]) -> list[Row]:
    return [photo("apple", look, size=size) for look, size in enumerate(shapes)]


def test_the_size_that_most_have_makes_others_odd() -> None:
    assert odd(sized((300, 300), (300, 299), (300, 300), (300, 300), (299, 300))) == [
        None,
        ["size"],
        None,
        None,
        ["size"],
    ]


def test_half_of_the_photos_are_no_majority() -> None:
    assert majority_size(facts(sized(*[(300, 300)] * 2, (200, 200), (100, 100)))) is None
    assert majority_size(facts(sized(*[(300, 300)] * 3, (200, 200), (100, 100)))) == (300, 300)
    assert majority_size(facts([])) is None


def test_where_sizes_are_many_a_far_one_is_odd() -> None:
    many = sized(*[(side, side) for side in range(300, 340)], (20, 20), (3000, 3000))
    assert odd(many) == [None] * 40 + [["size"], ["size"]]


def test_a_far_aspect_is_odd_and_a_near_one_is_not() -> None:
    square = [(side, side) for side in range(300, 340)]
    assert odd(sized(*square, (400, 280), (480, 210), (210, 480))) == [None] * 41 + [["aspect"], ["aspect"]]


@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_an_aspect_is_as_odd_lying_as_standing(size: tuple[int, int]) -> None:
    assert odd(sized(*[(300, 300)] * 9, size))[-1] == ["size", "aspect"]


def test_a_blurry_photo_is_odd_among_sharp_ones() -> None:
    rows = [photo("apple", look) | {"sharpness": 500.0 + look} for look in range(20)]
    assert odd([*rows, photo("apple", 20) | {"sharpness": 3.0}]) == [None] * 20 + [["blurry"]]
    assert odd([*rows, photo("apple", 20) | {"sharpness": 5000.0}]) == [None] * 21


def test_a_photo_can_be_odd_in_several_ways() -> None:
    rows = [photo("apple", look) | {"sharpness": 500.0 + look} for look in range(20)]
    odd_one = photo("apple", 20, size=(100, 900)) | {"sharpness": 3.0}
    assert odd([*rows, odd_one])[-1] == ["size", "aspect", "blurry"]


def test_what_is_odd_stands_in_its_own_row_beside_unreadable_files() -> None:
    rows = sized((300, 300), (300, 300), (20, 20), (300, 300))
    assert odd([broken("apple", "a"), *rows[:2], broken("apple", "b"), *rows[2:], broken("apple", "c")]) == [
        *[None] * 4,
        ["size"],
        None,
        None,
    ]
    assert odd([broken("apple", "a")]) == [None]
    assert odd([]) == []
    assert odd(rows[:1]) == [None]


# ---- tables


def test_a_crosstab_goes_from_the_commonest_to_the_rarest_then_by_name() -> None:
    pairs = [("b", "x"), ("a", "x"), ("c", "y"), ("c", "x"), ("c", "y"), (None, "x"), ("a", None), ("b", "y")]
    table = pa.table({"kind": [kind for kind, _ in pairs], "label": [label for _, label in pairs]})
    assert crosstab(table, "kind", "label") == [
        {"kind": "c", "": 0, "x": 1, "y": 2, "all": 3},
        {"kind": "a", "": 1, "x": 1, "y": 0, "all": 2},
        {"kind": "b", "": 0, "x": 1, "y": 1, "all": 2},
        {"kind": "(none)", "": 0, "x": 1, "y": 0, "all": 1},
    ]
    assert [list(line) for line in crosstab(table, "kind", "label")] == [["kind", "", "x", "y", "all"]] * 4
    assert crosstab(table.slice(0, 0), "kind", "label") == []
    assert crosstab(table, "kind", "label", 2) == crosstab(table, "kind", "label")[:2]


def test_a_class_may_be_named_as_a_crosstabs_own_columns_are() -> None:
    table = pa.table({"size": ["1x1", "1x1", "2x2"], "label": ["all", "size", "all"]})
    lines = crosstab(table, "size", "label")
    assert [(line["size"], line["all"]) for line in lines] == [("1x1", 2), ("2x2", 1)]
    assert [sorted(map(str, line.values())) for line in lines] == [["1", "1", "1x1", "2"], ["0", "1", "1", "2x2"]]


def test_folders_that_may_not_be_the_classes_are_hinted_at() -> None:
    def said(*keys: str) -> list[str]:
        rows = [photo(label_of(key), look, uri=key) for look, key in enumerate(keys)]
        return hints(facts([*rows, broken(None, "notes.txt")]), "/p")

    assert said("apple/1.jpg", "pear/2.jpg", "pear/far/down/3.jpg") == []
    assert said("red/2019/1.jpg", "red/2020/2.jpg", "green/2020/3.jpg") == []
    [hint] = said(*(f"{split}/{label}/{split}.jpg" for split in ("train", "test") for label in ("apple", "pear")))
    assert "test, train" in hint
    assert "apple, pear" in hint
    nested = ["train/apple/1.jpg", "train/pear/2.jpg", "valid/apple/3.jpg", "valid/pear/4.jpg"]
    [hint] = said(*nested, "train/_annotations.csv", "test/5.jpg")
    assert "(train, valid), and these hold the same folders (apple, pear)" in hint
    assert said(*nested, "apple/6.jpg", "pear/7.jpg") == [], "half of them is no rule"
    one, other, another = "cr\u00e8me", "cre\u0300me", "Creme"
    alike = said(*(f"{label}/{number}.jpg" for number, label in enumerate([one, other, another, "creme ", "apple"])))
    assert [[ascii(label) in hint for label in (one, other, another, "creme ")] for hint in alike] == [
        [True, True, False, False],
        [False, False, True, True],
    ]


def test_the_size_table_is_the_reports_figure_2() -> None:
    rows = [photo(label, look, size=size) for look, (label, size) in enumerate(SIZES)]
    assert sizes(facts([*rows, broken("pear", "x")])) == [
        {"size": "300x300", "apple": 2, "pear": 1, "all": 3},
        {"size": "10x20", "apple": 0, "pear": 2, "all": 2},
        {"size": "20x10", "apple": 1, "pear": 0, "all": 1},
    ]


SIZES = [
    ("apple", (300, 300)),
    ("pear", (10, 20)),
    ("apple", (20, 10)),
    ("pear", (300, 300)),
    ("pear", (10, 20)),
    ("apple", (300, 300)),
]


# ---- the summary


def files() -> list[Row]:
    """25 files: see `test_the_summary_counts_exactly`."""
    return [
        *singles("apple", 8),
        *singles("pear", 5),
        photo("apple", 1),
        photo("apple", 1, uri="apple/1 again.jpg"),  # a copy
        photo("apple", 1, uri="apple/1 thrice.jpg"),
        photo("pear", 2),
        photo("pear", 2, change=0b11, size=(250, 300)),  # a near duplicate of another size
        photo("apple", 3),
        photo("pear", 3, uri="pear/3 too.jpg"),  # a copy in another class
        photo("pear", 4) | {"mode": "L", "sharpness": 0.0},
        photo(None, 5),
        broken("pear", "cut.jpg"),
        broken("apple", "note.txt", "E_NOT_IMAGE"),
        broken("apple", "other.txt", "E_NOT_IMAGE"),
    ]


def test_the_summary_counts_exactly() -> None:
    found = summary(index_of(files(), size="300x300"))
    assert (found["files"], found["photos"]) == (25, 22)
    classes = {line["label"]: {name: line[name] for name in ("excluded", "error", "all")} for line in found["classes"]}
    assert classes == {
        "(none)": {"excluded": 1, "error": 0, "all": 1},
        "apple": {"excluded": 3, "error": 2, "all": 14},
        "pear": {"excluded": 2, "error": 1, "all": 10},
    }
    used = {line["label"]: (line["train"], line["val"], line["test"]) for line in found["classes"]}
    assert used == {"(none)": (0, 0, 0), "apple": (7, 2, 0), "pear": (5, 2, 0)}
    assert found["sizes"] == [
        {"size": "300x300", "": 1, "apple": 12, "pear": 8, "all": 21},
        {"size": "250x300", "": 0, "apple": 0, "pear": 1, "all": 1},
    ]
    assert found["modes"] == [
        {"mode": "RGB", "": 1, "apple": 12, "pear": 8, "all": 21},
        {"mode": "L", "": 0, "apple": 0, "pear": 1, "all": 1},
    ]
    assert found["formats"] == [{"format": "JPEG", "": 1, "apple": 12, "pear": 9, "all": 22}]
    assert found["odd"] == [
        {"odd": "blurry", "pear": 1, "all": 1},
        {"odd": "size", "pear": 1, "all": 1},
    ]
    assert found["errors"] == [
        {"error_code": "E_NOT_IMAGE", "apple": 2, "pear": 0, "all": 2},
        {"error_code": "E_TRUNCATED", "apple": 0, "pear": 1, "all": 1},
    ]
    assert found["excluded"] == [
        {"excluded": "conflict", "": 0, "apple": 1, "pear": 1, "all": 2},
        {"excluded": "duplicate", "": 0, "apple": 2, "pear": 0, "all": 2},
        {"excluded": "no_label", "": 1, "apple": 0, "pear": 0, "all": 1},
        {"excluded": "size", "": 0, "apple": 0, "pear": 1, "all": 1},
    ]
    assert {line["excluded"] for line in found["excluded"]} <= REASONS.keys()
    assert (found["exact_duplicate_groups"], found["exact_duplicate_files"]) == (2, 3)
    assert (found["near_duplicate_groups"], found["near_duplicate_photos"]) == (1, 2)
    assert [row["uri"] for row in found["conflicts"]] == ["/p/apple/3-0.jpg", "/p/pear/3 too.jpg"]
    assert [(row["uri"], row["odd"]) for row in found["odd_files"]] == [
        ("/p/pear/2-3.jpg", ["size"]),
        ("/p/pear/4-0.jpg", ["blurry"]),
    ]
    assert [row["error_code"] for row in found["error_files"]] == ["E_NOT_IMAGE", "E_NOT_IMAGE", "E_TRUNCATED"]


def test_a_large_group_is_counted_whole_and_listed_in_part() -> None:
    copies = [photo("apple", 1, 0, uri=f"/p/apple/{number}.jpg") for number in range(150)]
    [group] = summary(index_of([*copies, *singles("apple", 9), *singles("pear", 9)]))["duplicate_groups"]
    assert (group["photos"], len(group["files"])) == (150, 100)


def test_the_summary_lists_each_group_of_duplicates_and_what_became_of_its_files() -> None:
    groups = summary(index_of(files(), size="300x300"))["duplicate_groups"]
    assert (groups[0]["kind"], groups[0]["photos"], groups[0]["labels"]) == ("exact", 3, ["apple"])
    assert sorted((group["kind"], group["photos"], tuple(group["labels"])) for group in groups[1:]) == [
        ("exact", 2, ("apple", "pear")),
        ("near", 2, ("pear",)),
    ]
    became = {file["uri"]: file["is"] for group in groups for file in group["files"]}
    assert became.pop("/p/pear/2-0.jpg") in ("train", "val")
    assert became.pop("/p/apple/1 again.jpg") in ("train", "val")
    assert became == {
        "/p/apple/1-0.jpg": "duplicate",
        "/p/apple/1 thrice.jpg": "duplicate",
        "/p/pear/2-3.jpg": "size",
        "/p/apple/3-0.jpg": "conflict",
        "/p/pear/3 too.jpg": "conflict",
    }


def test_the_summary_is_json_and_does_not_depend_on_the_order_of_files() -> None:
    found = json.dumps(summary(index_of(files())))
    assert json.dumps(summary(index_of(shuffled(files())))) == found
    index = index_of(files())
    order = np.random.default_rng(0).permutation(index.num_rows)
    assert json.dumps(summary(index.take(order))) == found


def test_files_on_disk_end_in_the_summary(storage: LocalStorage, isolated: Isolated) -> None:
    table = pa.Table.from_pylist(list(audit(storage, list_images(storage)[0], isolated)), FACTS)
    found: dict[str, Any] = summary(decide(table, PrepareConfig(images="/p", out="/o", val_fraction=0.3)))
    assert (found["files"], found["photos"]) == (13, 11)
    assert [line["all"] for line in found["sizes"]] == [9, 2]
    assert (found["exact_duplicate_groups"], found["exact_duplicate_files"]) == (2, 2)
    assert len(found["conflicts"]) == 2
    assert [row["uri"].removeprefix(f"{storage.uri}/") for row in found["error_files"]] == [
        "pear/cut.png",
        "pear/note.txt",
    ]
