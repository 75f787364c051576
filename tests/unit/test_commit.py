"""Behaviour of the exactly-once protocol: whatever is killed, lost or raced, each input ends in one row, or an error
says what is wrong (design: exactly-once.md)."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fruitray.commit import (
    MANIFEST,
    PLAN,
    SUCCESS,
    Part,
    Plan,
    adopt_plan,
    commit,
    committed,
    finish,
    is_finished,
    part_key,
    read_manifest,
    read_plan,
    read_shards,
    verify,
    write_plan,
)
from fruitray.errors import NotFoundError, OutputConflictError, TryAgainError, UsageError
from fruitray.index import label_of
from fruitray.inputs import INPUTS
from fruitray.inputs import entries as entries_of
from fruitray.predictor import Prediction
from fruitray.scores import EMBEDDING, SCHEMA, score_rows
from fruitray.storage import Entry, LocalStorage, Storage

IMAGES = "s3://fruit/photos"
SETTINGS = {"images": IMAGES, "model_id": "model-a", "top_k": 3}
OTHER_SETTINGS = SETTINGS | {"model_id": "model-b"}
SHARD_ROWS = 3
ODD_KEYS = ["a b.jpg", "ä/果.jpg", "tab\t.jpg", "quote'\".jpg", "a//b.jpg", "../up.jpg", "line\nfeed.jpg"]


def inputs(count: int = 7) -> list[Entry]:
    return [Entry(f"apple/{number}.jpg", 100 + number, f"v{number}") for number in range(count)]


def table(entries: Sequence[Entry]) -> pa.Table:
    """What `list_inputs` makes of them."""
    rows = [{"root": IMAGES, "label": label_of(entry.key), **asdict(entry)} for entry in entries]
    return pa.Table.from_pylist(rows, INPUTS)


def listed(shard: pa.Table) -> list[Entry]:
    return [entry for _, entry in entries_of(shard)]


class Memory(Storage):
    """An object store in a dict. A weak one ignores `If-None-Match`."""

    def __init__(self, *, weak: bool = False) -> None:
        super().__init__("memory://out")
        self.objects: dict[str, bytes] = {}
        self.weak = weak
        self._lock = Lock()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return iter([Entry(key, len(data), "") for key, data in [*self.objects.items()] if key.startswith(prefix)])

    def read(self, key: str, etag: str = "") -> bytes:
        if key not in self.objects:
            raise NotFoundError(self.uri_of(key), "there is no such object")
        return self.objects[key]

    def write(self, key: str, data: bytes) -> None:
        raise AssertionError("nothing in a scored output is ever replaced")

    def delete(self, key: str) -> None:
        raise AssertionError("nothing in a scored output is ever deleted")

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if key in self.objects and not self.weak:
                return False
            self.objects[key] = data
            return True

    def folders(self) -> Iterator[str]:
        raise NotImplementedError

    def stat(self, key: str) -> Entry:
        raise AssertionError("nothing here needs it")

    def exists(self, key: str) -> bool:
        return key in self.objects

    def check(self) -> None: ...


Hook = Callable[[int, str], None]


class Watched(Storage):
    """`inner`, where `hook(number of the operation, "before" or "after" it)` may kill or interrupt the caller."""

    def __init__(self, inner: Storage, hook: Hook) -> None:
        super().__init__(inner.uri)
        self.inner, self.hook, self.numbers = inner, hook, count()
        self.writes = list[str]()

    def _do(self, operation: Callable[[], Any]) -> Any:
        number = next(self.numbers)
        self.hook(number, "before")
        result = operation()
        self.hook(number, "after")
        return result

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return iter(self._do(lambda: [*self.inner.list(prefix)]))

    def read(self, key: str, etag: str = "") -> bytes:
        return self._do(lambda: self.inner.read(key, etag))

    def write(self, key: str, data: bytes) -> None:
        self._do(lambda: self.inner.write(key, data))

    def delete(self, key: str) -> None:
        self._do(lambda: self.inner.delete(key))

    def create(self, key: str, data: bytes) -> bool:
        self.writes.append(key)
        return self._do(lambda: self.inner.create(key, data))

    def folders(self) -> Iterator[str]:
        raise NotImplementedError

    def stat(self, key: str) -> Entry:
        return self._do(lambda: self.inner.stat(key))

    def exists(self, key: str) -> bool:
        return self._do(lambda: self.inner.exists(key))

    def check(self) -> None: ...


class KilledError(Exception):
    """The driver is gone: nothing may catch this."""


def kill_at(number: int, moment: str, error: Exception | None = None) -> Hook:
    def hook(here: int, now: str) -> None:
        if (here, now) == (number, moment):
            raise error or KilledError

    return hook


def predictions(entries: Sequence[Entry], model_id: str) -> list[Prediction]:
    """What a model says: follows from the photo and the model, as in real life. Every fifth photo is bad."""
    said = []
    for entry in entries:
        if entry.size % 5 == 0:
            said.append(Prediction(status="error", error_code="E_TRUNCATED", error="the file ends early"))
            continue
        labels = ["apple", "pear"] if model_id == "model-a" else ["pear", "apple"]
        said.append(
            Prediction(
                label=labels[0], confidence=0.75, top_labels=labels, top_scores=[0.75, 0.25], width=30, height=20
            )
        )
    return said


def commit_shard(out: Storage, plan: Plan, number: int, shard: pa.Table) -> bool:
    model_id = plan.settings["model_id"]
    rows = score_rows(shard, predictions(listed(shard), model_id), model_id)
    return commit(out, plan, part_key(number), shard, rows)


def drive(out: Storage, wanted: dict[str, Any] = SETTINGS, entries: Sequence[Entry] | None = None) -> list[Part]:
    """One run of the score job."""
    plan = adopt_plan(out, wanted) or write_plan(out, wanted, table(entries or inputs()), SHARD_ROWS)
    if is_finished(out):
        return read_manifest(out)
    shards = read_shards(out, plan)
    done = committed(out, shards)
    for number, (key, shard) in enumerate(shards.items()):
        if key not in done:
            commit_shard(out, plan, number, shard)
    return finish(out, plan)


def operations(out: Storage) -> int:
    """How many storage operations one undisturbed run takes."""
    watched = Watched(out, lambda number, moment: None)
    drive(watched)
    return next(watched.numbers)


def contents(out: Storage) -> dict[str, bytes]:
    return {entry.key: out.read(entry.key) for entry in out.list()}


def rows_of(out: Storage) -> list[dict[str, Any]]:
    keys = sorted(entry.key for entry in out.list("data/"))
    return [row for key in keys for row in pq.read_table(pa.BufferReader(out.read(key))).to_pylist()]


def require_one_row_each(out: Storage) -> None:
    """The output verifies, and holds the planned inputs, each in one row of the planned model."""
    parts = verify(out)
    plan = read_plan(out)
    planned = [entry for shard in read_shards(out, plan).values() for entry in listed(shard)]
    rows = rows_of(out)
    assert Counter(row["uri"] for row in rows) == {f"{IMAGES}/{entry.key}": 1 for entry in planned}
    assert {row["model_id"] for row in rows} == {plan.settings["model_id"]}
    assert sum(part.rows for part in parts) == plan.rows == len(planned)


@pytest.fixture(params=["strict", "weak", "local"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Storage]:
    """Makes empty stores of one kind."""
    numbers = count()
    if request.param == "local":
        return lambda: LocalStorage(str(tmp_path / f"{next(numbers)}"))
    return lambda: Memory(weak=request.param == "weak")


# ---- An undisturbed run


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 100])
def test_every_input_gets_one_row(count: int, new_store: Callable[[], Storage]) -> None:
    out = new_store()
    parts = drive(out, entries=inputs(count))
    require_one_row_each(out)
    assert [row["uri"] for row in rows_of(out)] == [f"{IMAGES}/{entry.key}" for entry in inputs(count)]
    assert [row["etag"] for row in rows_of(out)] == [entry.etag for entry in inputs(count)]
    assert [part.rows for part in parts] == [min(SHARD_ROWS, count - start) for start in range(0, count, SHARD_ROWS)]
    assert verify(out) == read_manifest(out) == parts


def test_the_manifest_counts_labels_and_errors() -> None:
    out = Memory()
    parts = drive(out)  # sizes 100 to 106: photos 0 and 5 are bad
    assert [part.labels for part in parts] == [{"apple": 2}, {"apple": 2}, {"apple": 1}]
    assert [part.errors for part in parts] == [{"E_TRUNCATED": 1}, {"E_TRUNCATED": 1}, {}]
    assert json.loads(out.read(MANIFEST))["rows"] == 7


def test_the_manifest_counts_predictions_by_folder_where_it_has_a_classs_name() -> None:
    sizes = {"apple/1": 101, "apple/2": 102, "apple/bad": 100, "pear/1": 101, "plum/1": 101, "loose": 101}
    entries = [Entry(key, size, f"etag-{key}") for key, size in sorted(sizes.items())]
    parts = drive(Memory(), SETTINGS | {"classes": ["apple", "pear"]}, entries)
    together = Counter[tuple[str, str]]()
    for part in parts:
        together.update({(folder, label): n for folder, row in part.confusion.items() for label, n in row.items()})
    assert together == {("apple", "apple"): 2, ("pear", "apple"): 1}


def test_a_row_says_all_that_was_predicted() -> None:
    out = Memory()
    drive(out)
    bad, good = rows_of(out)[:2]
    assert [*good] == SCHEMA.names
    assert good["uri"] == f"{IMAGES}/apple/1.jpg"
    assert (good["label"], good["confidence"], good["status"], good["error_code"]) == ("apple", 0.75, "ok", None)
    assert (good["top_labels"], good["top_scores"]) == (["apple", "pear"], [0.75, 0.25])
    assert (good["width"], good["height"], good["etag"], good["model_id"]) == (30, 20, "v1", "model-a")
    assert (bad["status"], bad["error_code"], bad["error"]) == ("error", "E_TRUNCATED", "the file ends early")
    assert (bad["label"], bad["confidence"], bad["top_scores"]) == (None, None, None)


def test_odd_keys_stand_in_the_rows_verbatim() -> None:
    out = Memory()
    drive(out, entries=[Entry(key, 1, "v") for key in ODD_KEYS])
    assert [row["uri"] for row in rows_of(out)] == [f"{IMAGES}/{key}" for key in ODD_KEYS]
    require_one_row_each(out)


def test_a_plan_of_another_version_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Memory()
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    monkeypatch.setattr("fruitray.commit.INPUTS", pa.schema([*INPUTS, ("later", pa.string())]))
    with pytest.raises(OutputConflictError, match="planned by another version"):
        read_shards(out, plan)


def test_planned_inputs_are_read_back_whole() -> None:
    out = Memory()
    entries = [*inputs(4), Entry("link.jpg", 9, "v", "symlink"), Entry("pipe", 0, "", "special")]
    plan = write_plan(out, SETTINGS, table(entries), SHARD_ROWS)
    assert [listed(shard) for shard in read_shards(out, plan).values()] == [entries[:3], entries[3:]]
    assert (plan.rows, plan.shards) == (6, 2)


def test_a_finished_output_is_frozen(new_store: Callable[[], Storage]) -> None:
    out = new_store()
    drive(out)
    before = contents(out)
    watched = Watched(out, lambda number, moment: None)
    assert drive(watched) == read_manifest(out)
    assert watched.writes == []
    assert contents(out) == before


def test_no_seal_before_all_shards_are_there() -> None:
    out = Memory()
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    shards = [*read_shards(out, plan).values()]
    commit_shard(out, plan, 2, shards[2])
    assert committed(out, read_shards(out, plan)) == {part_key(2)}
    with pytest.raises(TryAgainError, match="2 of 3 shards"):
        finish(out, plan)
    assert not out.exists(MANIFEST)
    assert not is_finished(out)


# ---- KilledError anywhere


def test_killed_at_any_moment_the_same_command_completes_the_same_output(new_store: Callable[[], Storage]) -> None:
    undisturbed = new_store()
    total = operations(undisturbed)
    assert total > 15
    for number in range(total):
        for moment in ("before", "after"):
            out = new_store()
            with pytest.raises(KilledError):
                drive(Watched(out, kill_at(number, moment)))
            drive(out)
            require_one_row_each(out)
            assert contents(out) == contents(undisturbed), (number, moment)


@pytest.mark.parametrize("weak", [False, True])
def test_a_write_that_happened_but_was_reported_lost_is_found_again(weak: bool) -> None:
    undisturbed = Memory(weak=weak)
    for number in range(operations(undisturbed)):
        out = Memory(weak=weak)
        lost = kill_at(number, "after", TryAgainError(out.uri, "no answer"))
        with pytest.raises(TryAgainError):
            drive(Watched(out, lost))
        drive(out)
        assert contents(out) == contents(undisturbed), number


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["before", "after"])), max_size=6))
def test_killed_again_and_again_it_still_completes(weak: bool, deaths: list[tuple[int, str]]) -> None:
    out, undisturbed = Memory(weak=weak), Memory(weak=weak)
    drive(undisturbed)
    for number, moment in deaths:
        try:
            drive(Watched(out, kill_at(number, moment)))
        except KilledError:
            continue
    drive(out)
    assert contents(out) == contents(undisturbed)
    require_one_row_each(out)


def test_a_file_half_written_by_a_killed_machine_does_no_harm(tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f".{'0' * 32}.fruitray-tmp").write_bytes(b"PAR1 and then nothing")
    drive(out)
    require_one_row_each(out)


# ---- Two drivers


def interrupted_by(number: int, moment: str, other: Callable[[], object]) -> Hook:
    """At that moment another driver runs from start to end."""

    def hook(here: int, now: str) -> None:
        if (here, now) == (number, moment):
            other()

    return hook


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_twin_at_any_moment_changes_nothing(weak: bool, moment: str) -> None:
    undisturbed = Memory(weak=weak)
    for number in range(operations(undisturbed)):
        out = Memory(weak=weak)
        drive(Watched(out, interrupted_by(number, moment, lambda out=out: drive(out))))
        assert contents(out) == contents(undisturbed), number


@pytest.mark.parametrize("moment", ["before", "after"])
def test_of_two_different_jobs_one_wins_and_the_other_is_told(moment: str) -> None:
    total = operations(Memory())
    losers = Counter[str]()
    for number in range(total):
        out, refused = Memory(), list[str]()

        def other(out: Memory = out, refused: list[str] = refused) -> None:
            try:
                drive(out, OTHER_SETTINGS)
            except OutputConflictError:
                refused.append("second")

        try:
            drive(Watched(out, interrupted_by(number, moment, other)))
        except OutputConflictError:
            refused.append("first")
        require_one_row_each(out)
        assert len(refused) == 1, (number, refused)
        losers.update(refused)
    assert set(losers) == {"first", "second"}  # both outcomes were seen


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_twin_that_listed_other_photos_adopts_the_plan_that_stands(moment: str) -> None:
    for number in range(operations(Memory())):
        out = Memory()
        drive(Watched(out, interrupted_by(number, moment, lambda out=out: drive(out, entries=inputs(9)))))
        require_one_row_each(out)
        assert len(rows_of(out)) in (7, 9)


Step = tuple[int, str, bool, int]  # at which operation, before or after it, whether killed there, which job


def run_nested(out: Memory, schedule: Sequence[Step]) -> None:
    """The first driver runs; at its moment the rest of the schedule happens; then it goes on, or is killed."""
    (number, moment, killed, job), *rest = schedule

    def hook(here: int, now: str) -> None:
        if (here, now) == (number, moment):
            if rest:
                run_nested(out, rest)
            if killed:
                raise KilledError

    wanted = (SETTINGS, SETTINGS, OTHER_SETTINGS)[job]
    try:
        drive(Watched(out, hook), wanted, inputs(9 if job == 1 else 7))
    except (KilledError, OutputConflictError):
        return


schedules = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["before", "after"]), st.booleans(), st.integers(0, 2)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=80)
@given(schedules)
def test_any_mix_of_jobs_zombies_and_deaths_ends_in_one_row_each(schedule: list[Step]) -> None:
    out = Memory()
    run_nested(out, schedule)
    drive(out, read_plan(out).settings if out.exists(PLAN) else SETTINGS)
    require_one_row_each(out)


@settings(deadline=None, max_examples=80)
@given(schedules)
def test_on_a_weak_store_a_mix_of_jobs_is_right_or_is_told(schedule: list[Step]) -> None:
    out = Memory(weak=True)
    run_nested(out, schedule)
    try:
        drive(out, read_plan(out).settings if out.exists(PLAN) else SETTINGS)
        verify(out)
    except OutputConflictError:
        return
    require_one_row_each(out)


def test_drivers_that_really_run_at_once_agree(new_store: Callable[[], Storage]) -> None:
    out, undisturbed = new_store(), new_store()
    drive(undisturbed)
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda _: drive(out), range(4))]
    assert answers == [verify(out)] * 4
    assert contents(out) == contents(undisturbed)


# ---- Zombies, conflicts and strangers


def test_a_zombie_that_commits_late_changes_nothing(new_store: Callable[[], Storage]) -> None:
    out = new_store()
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    shards = [*read_shards(out, plan).values()]
    assert commit_shard(out, plan, 1, shards[1])
    drive(out)
    before = contents(out)
    assert [commit_shard(out, plan, shard, rows) for shard, rows in enumerate(shards)] == [False] * 3
    assert contents(out) == before


def test_a_zombie_of_another_plan_is_refused_and_changes_nothing(new_store: Callable[[], Storage]) -> None:
    elsewhere, out = new_store(), new_store()
    foreign = write_plan(elsewhere, OTHER_SETTINGS, table(inputs()), SHARD_ROWS)
    drive(out)
    before = contents(out)
    with pytest.raises(OutputConflictError, match="another plan"):
        commit_shard(out, foreign, 0, table(inputs()[:3]))
    assert contents(out) == before


def test_a_shard_committed_with_other_inputs_is_refused() -> None:
    out = Memory()
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    commit_shard(out, plan, 0, table(inputs()[:3]))
    with pytest.raises(OutputConflictError, match="planned inputs"):
        commit_shard(out, plan, 0, table(inputs()[3:6]))


@pytest.mark.parametrize("standing", [b"", b"no Parquet at all", b"PAR1 half"])
def test_something_else_in_a_shards_place_is_refused(standing: bytes) -> None:
    out = Memory()
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    out.objects[part_key(0)] = standing
    with pytest.raises(OutputConflictError, match="part-000000"):
        commit_shard(out, plan, 0, table(inputs()[:3]))
    assert out.objects[part_key(0)] == standing


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (OTHER_SETTINGS, ["model_id", "model-a", "model-b"]),
        (SETTINGS | {"top_k": 5}, ["top_k", "3", "5"]),
        (SETTINGS | {"embed": True}, ["embed", "True"]),
        ({key: value for key, value in SETTINGS.items() if key != "top_k"}, ["top_k", "3"]),
    ],
)
def test_another_jobs_output_is_refused_by_naming_what_differs(wanted: dict[str, Any], named: list[str]) -> None:
    out = Memory()
    write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    before = dict(out.objects)
    for attempt in (lambda: adopt_plan(out, wanted), lambda: drive(out, wanted)):
        with pytest.raises(OutputConflictError) as caught:
            attempt()
        assert [word for word in named if word not in str(caught.value)] == []
    assert out.objects == before


def test_there_is_no_plan_to_adopt_in_an_empty_place() -> None:
    assert adopt_plan(Memory(), SETTINGS) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"version": 9}', b"\xff\xfe"])
def test_a_plan_of_another_program_is_refused(data: bytes) -> None:
    out = Memory()
    out.objects[PLAN] = data
    with pytest.raises(OutputConflictError, match="no plan"):
        adopt_plan(out, SETTINGS)


def test_the_plan_is_named_by_what_it_holds() -> None:
    def name(entries: list[Entry], wanted: dict[str, Any] = SETTINGS, shard_rows: int = SHARD_ROWS) -> str:
        return write_plan(Memory(), wanted, table(entries), shard_rows).hash

    changed = [replace(inputs()[0], etag="v0 again"), *inputs()[1:]]
    names = [
        name(inputs()),
        name(changed),
        name(inputs(6)),
        name(inputs(), OTHER_SETTINGS),
        name(inputs(), shard_rows=4),
    ]
    assert len(set(names)) == len(names)
    assert name(inputs()) == names[0]


@pytest.mark.parametrize("stranger", ["data/part-000003.parquet", "data/notes.txt", "data/old/part-000000.parquet"])
def test_a_stranger_among_the_parts_is_named_and_nothing_sealed(stranger: str) -> None:
    out = Memory()
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    for shard, rows in enumerate(read_shards(out, plan).values()):
        commit_shard(out, plan, shard, rows)
    out.objects[stranger] = b"hello"
    with pytest.raises(OutputConflictError, match=stranger):
        finish(out, plan)
    assert not is_finished(out)
    del out.objects[stranger]
    finish(out, plan)
    out.objects[stranger] = b"hello"
    with pytest.raises(OutputConflictError, match=stranger):
        verify(out)


@pytest.mark.parametrize("key", ["data/", "data/.DS_Store", "data/.cache/x", "data/Thumbs.db"])
def test_what_a_file_manager_leaves_does_no_harm(key: str) -> None:
    out = Memory()
    out.objects[key] = b""
    drive(out)
    verify(out)


# ---- A weak store


def test_the_plan_says_whether_the_store_creates_only_once(new_store: Callable[[], Storage]) -> None:
    out = new_store()
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    assert plan.created_atomically is not (isinstance(out, Memory) and out.weak)
    assert read_plan(out) == plan


def test_on_a_weak_store_a_committed_part_is_not_written_again() -> None:
    out = Memory(weak=True)
    plan = write_plan(out, SETTINGS, table(inputs()), SHARD_ROWS)
    assert commit_shard(out, plan, 0, table(inputs()[:3]))
    watched = Watched(out, lambda number, moment: None)
    assert not commit_shard(watched, plan, 0, table(inputs()[:3]))
    assert watched.writes == []


# ---- Verify


def finished() -> Memory:
    out = Memory()
    drive(out)
    verify(out)
    return out


def rewritten(out: Memory, shard: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a part by a changed one that keeps the marks of its plan."""
    table = pq.read_table(pa.BufferReader(out.objects[part_key(shard)]))
    sink = pa.BufferOutputStream()
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), sink)
    out.objects[part_key(shard)] = sink.getvalue().to_pybytes()


def set_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    position = table.schema.get_field_index(name)
    return table.set_column(
        position, table.schema.field(position), [pa.array(values, table.schema.field(position).type)]
    )


def edited(out: Memory, key: str, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(out.objects[key])
    change(value)
    out.objects[key] = json.dumps(value, indent=1, sort_keys=True).encode()


def swap(out: Memory) -> None:
    first, second = part_key(0), part_key(1)
    out.objects[first], out.objects[second] = out.objects[second], out.objects[first]


def drop_inputs(out: Memory) -> None:
    out.objects[read_plan(out).inputs] = out.objects[part_key(0)]


DAMAGE: dict[str, tuple[Callable[[Memory], object], str]] = {
    "a missing part": (lambda out: out.objects.pop(part_key(1)), "part-000001.parquet: is missing"),
    "a changed value": (
        lambda out: rewritten(out, 1, lambda table: set_column(table, "confidence", [0.9, 0.9, None])),
        "part-000001.parquet: is not what the manifest says",
    ),
    "the same rows in another file": (lambda out: rewritten(out, 1, lambda table: table), "part-000001"),
    "a duplicated row": (
        lambda out: rewritten(out, 0, lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        "part-000000.parquet: does not hold exactly the planned inputs",
    ),
    "one row for another": (
        lambda out: rewritten(out, 0, lambda table: pa.concat_tables([table.slice(0, 2), table.slice(0, 1)])),
        "part-000000.parquet: does not hold exactly",
    ),
    "a lost row": (lambda out: rewritten(out, 0, lambda table: table.slice(1)), "part-000000"),
    "rows in another order": (lambda out: rewritten(out, 0, lambda table: table.take([2, 1, 0])), "part-000000"),
    "a lost column": (lambda out: rewritten(out, 0, lambda table: table.drop_columns("label")), "part-000000"),
    "no uri column": (lambda out: rewritten(out, 0, lambda table: table.drop_columns("uri")), "part-000000"),
    "swapped parts": (swap, "part-000000.parquet: holds another shard"),
    "a cut part": (lambda out: out.objects.update({part_key(2): out.objects[part_key(2)][:-9]}), "part-000002"),
    "no Parquet": (lambda out: out.objects.update({part_key(2): b"hello"}), "part-000002"),
    "an empty part": (lambda out: out.objects.update({part_key(2): b""}), "part-000002"),
    "a manifest of fewer parts": (lambda out: edited(out, MANIFEST, lambda value: value["parts"].pop()), "part-000002"),
    "a manifest of more parts": (
        lambda out: edited(out, MANIFEST, lambda value: value["parts"].append(asdict(Part("data/x", 1, "0")))),
        MANIFEST,
    ),
    "a manifest of other counts": (lambda out: edited(out, MANIFEST, lambda value: value.update(rows=8)), MANIFEST),
    "a manifest of other labels": (
        lambda out: edited(out, MANIFEST, lambda value: value["parts"][0].update(labels={"pear": 2})),
        "part-000000",
    ),
    "no manifest's content": (lambda out: out.objects.update({MANIFEST: b"{}"}), MANIFEST),
    "half a manifest": (lambda out: out.objects.update({MANIFEST: out.objects[MANIFEST][:50]}), MANIFEST),
    "a plan of fewer rows": (lambda out: edited(out, PLAN, lambda value: value.update(rows=6)), "part-000000"),
    "a plan of other settings": (
        lambda out: edited(out, PLAN, lambda value: value["settings"].update(top_k=1)),
        "part-",
    ),
    "a plan of fewer shards": (lambda out: edited(out, PLAN, lambda value: value.update(shards=2)), "another plan"),
    "other inputs": (drop_inputs, "inputs-"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_verify_finds(damage: Callable[[Memory], object], said: str) -> None:
    out = finished()
    damage(out)
    with pytest.raises(OutputConflictError) as caught:
        verify(out)
    assert said in str(caught.value)


@pytest.mark.parametrize("victim", ["part-000000", "manifest", "plan.json", "inputs-"])
def test_verify_finds_any_damage_to(victim: str) -> None:
    out, choice = finished(), random.Random(7)
    [key] = [key for key in out.objects if victim in key]
    whole = out.objects[key]
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[choice.randrange(len(damaged))] ^= 1 << choice.randrange(8)
        out.objects[key] = bytes(damaged)
        with pytest.raises((OutputConflictError, NotFoundError)):  # not found, where the plan names other inputs
            verify(out)


@pytest.mark.parametrize("key", [PLAN, MANIFEST])
def test_verify_names_what_is_gone(key: str) -> None:
    out = finished()
    del out.objects[key]
    with pytest.raises(NotFoundError, match=key):
        verify(out)


def test_verify_of_an_unfinished_output_says_to_go_on() -> None:
    out = finished()
    del out.objects[SUCCESS]
    with pytest.raises(TryAgainError, match="run score again"):
        verify(out)
    drive(out)
    verify(out)


def test_a_damaged_part_hinders_the_seal() -> None:
    out = finished()
    plan = read_plan(out)
    del out.objects[SUCCESS], out.objects[MANIFEST]
    swap(out)
    with pytest.raises(OutputConflictError, match="part-000000"):
        finish(out, plan)
    assert not is_finished(out)


@pytest.mark.parametrize(
    ("model_id", "etag", "said"), [("model-b", None, "another model"), ("model-a", "x", "versions")]
)
def test_rows_of_another_model_or_of_other_versions_are_not_sealed(model_id: str, etag: str | None, said: str) -> None:
    out, shard = Memory(), table(inputs())
    plan = write_plan(out, SETTINGS, shard, shard.num_rows)
    changed = shard if etag is None else set_column(shard, "etag", [etag] * shard.num_rows)
    commit(out, plan, part_key(0), shard, score_rows(changed, predictions(inputs(), model_id), model_id))
    with pytest.raises(OutputConflictError, match=said):
        finish(out, plan)


# ---- Layout and columns


READERS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "pyarrow": lambda folder: pq.read_table(folder).to_pylist(),
    "pandas": lambda folder: pd.read_parquet(folder, dtype_backend="pyarrow").to_dict("records"),
    "polars": lambda folder: pl.read_parquet(folder).to_dicts(),
    "duckdb": lambda folder: (
        duckdb.sql(f"select * from read_parquet('{folder}/**/*.parquet', hive_partitioning = true)")
        .to_arrow_table()
        .to_pylist()
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_partitioned_by_folder_no_part_holds_photos_of_two_and_all_read_it(tmp_path: Path, reader: str) -> None:
    out = LocalStorage(str(tmp_path))
    keys = ["apple/1", "apple/2", "apple/3", "apple/4", "a b=%/1", "loose", "../1"]
    shard_of = table([Entry(key, 101, "v") for key in sorted(keys)])
    plan = write_plan(out, SETTINGS, shard_of, SHARD_ROWS, partitioned=True)
    for key, shard in read_shards(out, plan).items():
        commit(out, plan, key, shard, score_rows(shard, predictions(listed(shard), "model-a"), "model-a"))
    parts = finish(out, plan)
    assert verify(out) == parts
    assert sorted(part.rows for part in parts) == [1, 1, 1, 1, 3]
    found = READERS[reader](str(tmp_path / "data"))
    folders = {row["uri"].removeprefix(f"{IMAGES}/"): row["folder"] for row in found}
    assert folders == {key: label_of(key) for key in keys}
    assert {tuple(row["top_labels"]) for row in found} == {("apple", "pear")}
    assert {row["status"] for row in found} == {"ok"}


def test_a_label_that_can_name_no_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path))
    with pytest.raises(UsageError, match="too long"):
        write_plan(out, SETTINGS, table([Entry("果" * 30 + "/1.jpg", 1, "v1")]), 3, partitioned=True)
    assert list(out.list()) == []


def test_rows_with_embeddings_say_so_in_their_columns_and_their_origin_in_their_schema() -> None:
    out, wanted = Memory(), SETTINGS | {"embeddings": True}
    plan = write_plan(out, wanted, table(inputs()), 7)
    said = [replace(one, embedding=np.ones(4, np.float32)) for one in predictions(inputs(), "model-a")]
    [(key, shard)] = read_shards(out, plan).items()
    commit(out, plan, key, shard, score_rows(shard, said, "model-a", embeddings=True), {"fruitray.engine": "eager"})
    finish(out, plan)
    found = pq.read_table(pa.BufferReader(out.read(key)))
    assert found.schema.names == [*SCHEMA.names, EMBEDDING.name]
    assert found["embedding"].to_pylist()[1] == [1.0] * 4
    assert found.schema.metadata[b"fruitray.engine"] == b"eager"
    assert found.schema.metadata[b"fruitray.plan"] == plan.hash.encode()


def test_rows_without_the_wanted_embeddings_are_not_sealed() -> None:
    out = Memory()
    plan = write_plan(out, SETTINGS | {"embeddings": True}, table(inputs()), SHARD_ROWS)
    for number, shard in enumerate(read_shards(out, plan).values()):
        commit_shard(out, plan, number, shard)
    with pytest.raises(OutputConflictError, match="exactly the planned"):
        finish(out, plan)
