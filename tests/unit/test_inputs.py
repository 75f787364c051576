"""Behaviour of listing what is to be scored: folders, lists and indexes, each photo once, in a fixed order."""

import io
import os
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from fruitray import inputs
from fruitray.errors import CredentialsError, ImageError, NotFoundError, UsageError
from fruitray.images import fetch
from fruitray.index import read_index
from fruitray.inputs import INPUTS, entries, list_inputs, uris
from fruitray.storage import LocalStorage
from tests.unit.runs import TRAIN, VAL, write_photos_and_index


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for key in ("raw/b/2.jpg", "raw/a/1.jpg", "raw/a/.DS_Store", "raw/loose.jpg", "more/c/3.jpg"):
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    return tmp_path


def write_list(path: Path, **columns: Any) -> str:
    sink = io.BytesIO()
    (pq.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv)(pa.table(columns), sink)
    path.write_bytes(sink.getvalue())
    return str(path)


def named(*places: str) -> list[str]:
    return uris(list_inputs(places)[0]).to_pylist()


def test_a_folder_is_listed_sorted_with_labels_and_versions(photos: Path) -> None:
    table, skipped = list_inputs([str(photos / "raw")])
    assert (table.schema, skipped) == (INPUTS, 1)
    assert uris(table).to_pylist() == [f"{photos}/raw/{key}" for key in ("a/1.jpg", "b/2.jpg", "loose.jpg")]
    assert table["label"].to_pylist() == ["a", "b", None]
    listed = {entry.key: entry for entry in LocalStorage(str(photos / "raw")).list()}
    assert [entry for _, entry in entries(table)] == [listed[key] for key in table["key"].to_pylist()]


def test_places_that_overlap_give_each_photo_once(photos: Path) -> None:
    assert named(str(photos), str(photos / "raw" / "a"), str(photos / "more")) == named(str(photos))
    assert len(named(str(photos / "raw"), str(photos / "more"))) == 4


def test_more_names_than_arrow_can_count_are_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = list_inputs([str(photos)])
    room = sum(len(uri.encode()) for uri in uris(table).to_pylist())
    monkeypatch.setattr(inputs, "MAX_NAMES", room)
    list_inputs([str(photos)])
    monkeypatch.setattr(inputs, "MAX_NAMES", room - 1)
    with pytest.raises(UsageError, match="too many"):
        list_inputs([str(photos)])


def test_an_empty_folder_is_an_empty_table(tmp_path: Path) -> None:
    table, skipped = list_inputs([str(tmp_path)])
    assert (table.num_rows, table.schema, skipped) == (0, INPUTS, 0)


@pytest.mark.parametrize("name", ["some.parquet", "some.csv"])
def test_a_list_names_photos_anywhere(photos: Path, name: str) -> None:
    wanted = [
        "raw/b/2.jpg",
        str(photos / "more/c/3.jpg"),
        f"file://{photos}/raw/a/1.jpg",
        "raw/b/2.jpg",
        "raw/gone.jpg",
    ]
    table, _ = list_inputs([write_list(photos / name, uri=wanted, label=["x", "y", "z", "x", "w"])])
    found = dict(zip(uris(table).to_pylist(), table["label"].to_pylist(), strict=True))
    keys = {"more/c/3.jpg": "y", "raw/a/1.jpg": "z", "raw/b/2.jpg": "x", "raw/gone.jpg": "w"}
    assert found == {f"{photos}/{key}": label for key, label in keys.items()}
    sizes = {entry.key: entry.size for _, entry in entries(table)}
    assert sizes == {"3.jpg": 12, "1.jpg": 11, "2.jpg": 11, "gone.jpg": 0}


def test_a_photo_that_is_gone_already_is_of_no_version_that_was_seen(photos: Path) -> None:
    """Else a worker that misses it, too, would think its folder not mounted there."""
    path = write_list(photos / "some.parquet", uri=["gone/1.jpg", "raw/loose.jpg"], etag=["x", "y"], bytes=[1, 2])
    assert {entry.key: entry.etag for _, entry in entries(list_inputs([path])[0])} == {"1.jpg": "", "loose.jpg": "y"}


def test_a_list_is_read_in_pieces(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_list(photos / "some.csv", uri=[f"raw/{number}.jpg" for number in range(25)])
    whole, _ = list_inputs([path])
    monkeypatch.setattr(inputs, "_CHUNK", 10)
    assert list_inputs([path])[0] == whole
    assert whole.num_rows == 25


def test_a_name_that_no_file_can_have_is_that_photos_own_error(photos: Path) -> None:
    table, _ = list_inputs([write_list(photos / "some.parquet", uri=["raw/loose.jpg", "raw/a\0b.jpg"])])
    [none, _] = list(fetch(LocalStorage(table["root"][0].as_py()), [entry for _, entry in entries(table)]))
    assert isinstance(none, ImageError)


def test_a_csv_is_read_word_for_word(photos: Path) -> None:
    (photos / "some.csv").write_text('uri,label,bytes\n001,007,\n"1.0",,3\n')
    table, _ = list_inputs([str(photos / "some.csv")])
    assert (table["key"].to_pylist(), table["label"].to_pylist()) == (["001", "1.0"], ["007", None])


def test_a_version_is_the_same_in_quotes_and_a_blank_one_is_looked_up(photos: Path) -> None:
    path = photos / "raw" / "a" / "1.jpg"
    (photos / "some.csv").write_text(f'uri,etag,bytes\n{path},"""v1""",3\n{photos}/raw/b/2.jpg,,3\n')
    [first, second] = [entry for _, entry in entries(list_inputs([str(photos / "some.csv")])[0])]
    assert first.etag == "v1"
    assert second == LocalStorage(str(photos / "raw" / "b")).stat("2.jpg")


def test_wrong_keys_end_the_planning(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LocalStorage, key: str) -> NoReturn:
        raise CredentialsError(self.uri_of(key), "the secret key is wrong")

    monkeypatch.setattr(LocalStorage, "stat", refuse)
    with pytest.raises(CredentialsError):
        list_inputs([write_list(photos / "some.csv", uri=[str(photos / "raw" / "a" / "1.jpg")])])


def test_a_list_does_not_make_a_symlink_a_file(photos: Path) -> None:
    os.symlink(photos / "raw" / "loose.jpg", photos / "link.jpg")
    path = write_list(photos / "some.parquet", uri=["link.jpg"], bytes=[13], etag=["x"])
    assert [entry.kind for _, entry in entries(list_inputs([path])[0])] == ["symlink"]


def test_the_version_that_a_list_names_is_the_one_to_score(photos: Path) -> None:
    path = write_list(photos / "some.parquet", uri=["raw/loose.jpg"], etag=["an-older-one"])
    assert [entry.etag for _, entry in entries(list_inputs([path])[0])] == ["an-older-one"]


def test_an_index_is_a_list_whether_its_folder_or_its_file_is_named(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    table = list_inputs([index])[0]
    assert table.num_rows == 18
    assert table == list_inputs([f"{index}/index.parquet"])[0]
    assert set(table["label"].to_pylist()) == {"cherry", "strawberry", "tomato"}
    assert uris(table).to_pylist() == uris(list_inputs([str(tmp_path / "photos")])[0]).to_pylist()


def test_of_an_index_one_split_is_listed_alone(tmp_path: Path) -> None:
    index = write_photos_and_index(tmp_path)
    splits = {split: uris(list_inputs([index], split)[0]).to_pylist() for split in ("train", "val", "test")}
    assert [len(those) for those in splits.values()] == [TRAIN, VAL, 0]
    assert splits["val"] == sorted(read_index(index).table.filter(pc.field("split") == "val")["uri"].to_pylist())
    with pytest.raises(UsageError, match=r"--split val: .*photos is no index"):
        list_inputs([str(tmp_path / "photos")], "val")
    with pytest.raises(UsageError, match="says of no photo which split has it"):
        list_inputs([write_list(tmp_path / "some.csv", uri=["a.jpg"])], "val")
    ours = pa.table({"uri": ["a.jpg"], "Split": ["b"], "split": [[1]]})
    pq.write_table(ours, tmp_path / "ours.parquet")
    assert list_inputs([str(tmp_path / "ours.parquet")])[0].num_rows == 1, "nobody asked for one"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"file": ["a.jpg"]}, "column `uri`; it has file"),
        ({"uri": ["a.jpg", None]}, "`uri` is empty in 1 rows"),
        ({"uri": ["a.jpg", ""]}, "`uri` is empty in 1 rows"),
        ({"uri": ["a.jpg"], " Label": ["apple"]}, "the column ' Label' would not be read; name it 'label'"),
        ({"uri": [[1]]}, "is no list"),
    ],
)
def test_a_list_that_is_none_is_refused_in_a_sentence(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list_inputs([write_list(tmp_path / "bad.parquet", **columns)])


@pytest.mark.parametrize("name", ["bad.parquet", "bad.csv"])
def test_a_damaged_list_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\x00PAR1")
    with pytest.raises(UsageError, match=name):
        list_inputs([str(tmp_path / name)])


def test_a_place_that_is_not_there_is_named(tmp_path: Path) -> None:
    for place in ("nowhere", "nowhere.csv"):
        with pytest.raises(NotFoundError, match=place):
            list_inputs([str(tmp_path / place)])


def test_a_name_with_a_newline_is_one_name_wherever_a_block_ends(tmp_path: Path) -> None:
    others = "".join(f"/{'x' * 250}{number:04d}.jpg\n" for number in range(4000))
    short = 2**20 - len(f'uri\n{others}/.jpg\n"one\n')  # of the mebibyte that Arrow reads at a time
    for more in range(short - 12, short + 12, 3):
        (tmp_path / "some.csv").write_text(f'uri\n{others}/{"y" * more}.jpg\n"one\ntwo.jpg"\nlast.jpg\n')
        table, _ = list_inputs([str(tmp_path / "some.csv")])
        assert table["key"].to_pylist()[-2:] == ["last.jpg", "one\ntwo.jpg"], more
