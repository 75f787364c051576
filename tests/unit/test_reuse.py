"""Behaviour of taking rows over from an earlier output: what has not changed, and nothing else."""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fruitray.commit import commit, part_key, read_shards, write_plan
from fruitray.errors import NotFoundError, OutputConflictError, UsageError
from fruitray.reuse import Earlier
from fruitray.storage import Entry, LocalStorage
from tests.unit.test_commit import SETTINGS, commit_shard, drive, inputs, listed, rows_of, table

ERRORS = {"apple/0.jpg", "apple/5.jpg"}  # whose sizes are multiples of five: see `predictions`


@pytest.fixture
def earlier(tmp_path: Path) -> Earlier:
    drive(LocalStorage(str(tmp_path)))
    return Earlier(str(tmp_path))


def known(earlier: Earlier, entries: list[Entry], *, retry_errors: bool = False) -> list[str]:
    marked = earlier.mark(table(entries), retry_errors=retry_errors)
    return [entry.key for entry in listed(marked.filter(pc.is_valid(marked["known_part"])))]


def test_what_is_the_same_version_is_known(earlier: Earlier) -> None:
    before = [entry.key for entry in inputs()]
    assert known(earlier, inputs()) == before
    assert known(earlier, inputs(9)) == before, "two are new"
    changed = [replace(entry, etag="newer") if entry.key == "apple/2.jpg" else entry for entry in inputs()]
    assert known(earlier, changed) == [key for key in before if key != "apple/2.jpg"]
    assert known(earlier, [Entry("pear/0.jpg", 100, "v0")]) == [], "the same version of another photo"


def test_a_version_that_nobody_knows_is_not_the_same(tmp_path: Path) -> None:
    blank = [replace(entry, etag="") for entry in inputs()]
    drive(LocalStorage(str(tmp_path)), entries=blank)
    assert known(Earlier(str(tmp_path)), blank) == []


def test_errors_are_tried_again_where_that_is_wanted(earlier: Earlier) -> None:
    assert known(earlier, inputs(), retry_errors=True) == [e.key for e in inputs() if e.key not in ERRORS]


def test_known_rows_are_those_that_stand_there(earlier: Earlier, tmp_path: Path) -> None:
    marked = earlier.mark(table(inputs()[::-1]), retry_errors=False)
    assert earlier.rows(marked).to_pylist() == rows_of(LocalStorage(str(tmp_path)))[::-1]


def test_an_output_that_is_not_finished_has_rows_to_take(tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path))
    plan = write_plan(out, SETTINGS, table(inputs()), 3)
    earlier = Earlier(str(tmp_path))
    assert known(earlier, inputs()) == []
    commit_shard(out, plan, 1, [*read_shards(out, plan).values()][1])
    assert known(earlier, inputs()) == ["apple/3.jpg", "apple/4.jpg", "apple/5.jpg"]


@pytest.mark.parametrize("other", [{"model_id": "model-b"}, {"top_k": 5}, {"embeddings": True}])
def test_rows_that_would_not_fit_are_refused_by_naming_what_differs(earlier: Earlier, other: dict[str, Any]) -> None:
    earlier.require(SETTINGS | {"engine": "eager", "shard_rows": 9})
    with pytest.raises(UsageError, match=f"--previous .*{next(iter(other))}"):
        earlier.require(SETTINGS | other)


def test_an_output_made_anew_since_it_was_planned_with_gives_no_rows(earlier: Earlier, tmp_path: Path) -> None:
    marked = earlier.mark(table(inputs()), retry_errors=False)
    for others in (inputs(9)[1:], inputs()[:1], [replace(entry, etag="newer") for entry in inputs()]):
        place = tmp_path / secrets.token_hex(4)
        drive(LocalStorage(str(place)), entries=others)
        with pytest.raises(OutputConflictError, match=r"part-0.*was replaced since"):
            Earlier(str(place)).rows(marked)


def test_a_place_without_an_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=str(tmp_path)):
        Earlier(str(tmp_path)).require(SETTINGS)


def test_rows_taken_over_are_committed_as_any_others(earlier: Earlier, tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path / "again"))
    plan = write_plan(out, SETTINGS, earlier.mark(table(inputs()), retry_errors=False), 7)
    [(key, shard)] = read_shards(out, plan).items()
    assert key == part_key(0)
    commit(out, plan, key, shard, earlier.rows(shard))
    assert rows_of(out) == rows_of(LocalStorage(str(tmp_path)))


@pytest.mark.parametrize("code", ["E_SRC_GONE", "E_TIMEOUT", "E_DECODE_CRASH", "E_TRUNCATED"])
def test_errors_that_may_pass_are_always_tried_again(tmp_path: Path, code: str) -> None:
    drive(LocalStorage(str(tmp_path)))
    [part] = [path for path in sorted((tmp_path / "data").iterdir()) if "000000" in path.name]
    table = pq.read_table(part)
    codes = [code if found else None for found in table["error_code"].to_pylist()]
    place = table.schema.get_field_index("error_code")
    pq.write_table(table.set_column(place, table.schema.field(place), [codes]), part)
    left = [entry.key for entry in inputs() if entry.key not in known(Earlier(str(tmp_path)), inputs())]
    assert left == ([] if code == "E_TRUNCATED" else ["apple/0.jpg"])


def test_a_file_among_the_parts_that_is_none_is_named(tmp_path: Path) -> None:
    drive(LocalStorage(str(tmp_path)))
    (tmp_path / "data" / "._part-000000.parquet").write_bytes(b"a Mac leaves such")
    assert len(known(Earlier(str(tmp_path)), inputs())) == len(inputs())
    (tmp_path / "data" / "other.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(OutputConflictError, match=r"other\.parquet"):
        known(Earlier(str(tmp_path)), inputs())


def test_no_part_with_a_byte_flipped_gives_other_rows(tmp_path: Path) -> None:
    drive(LocalStorage(str(tmp_path)))
    part = min((tmp_path / "data").iterdir())
    whole, told = part.read_bytes(), 0
    marked = Earlier(str(tmp_path)).mark(table(inputs()[:3]), retry_errors=False)
    rows = Earlier(str(tmp_path)).rows(marked)
    for place in range(0, len(whole), 11):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        earlier = Earlier(str(tmp_path))
        try:
            earlier.mark(table(inputs()[:3]), retry_errors=False)
            assert earlier.rows(marked).equals(rows), place
        except OutputConflictError:
            told += 1
    assert told > len(whole) / 22
