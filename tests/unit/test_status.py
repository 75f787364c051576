"""What a job says of itself beside its output."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fruitray import status
from fruitray.console import progress
from fruitray.errors import AccessDeniedError, FruitrayError, NotFoundError, TryAgainError
from fruitray.storage import LocalStorage, Storage, open_storage


@pytest.fixture
def out(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def told(out: Storage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read("status.json"))
    return found


def test_a_job_under_way_tells_how_far_it_is(out: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "INTERVAL_S", 0.01)
    with status.of("score") as job:
        status.begin(out)
        first = told(out)
        assert (first["job"], first["state"], first["progress"]) == ("score", "running", {})
        assert first["versions"].keys() >= {"fruitray", "python", "ray", "torch"}
        with progress("predict", 40, "photos") as advance:
            advance(3)
            deadline = time.monotonic() + 10
            while (step := told(out)["progress"]).get("done") != 3:
                assert time.monotonic() < deadline
        assert step == {"step": "predict", "done": 3, "total": 40, "unit": "photos"}
        job.end(0, "score: all is well")
    last = told(out)
    assert (last["state"], last["exit_code"], last["said"]) == ("succeeded", 0, "score: all is well")
    assert last["started"] == first["started"] <= last["updated"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("a slip"), {"state": "failed", "exit_code": 1, "said": "ValueError: a slip"}),
        (KeyboardInterrupt(), {"state": "interrupted", "exit_code": 130, "said": "interrupted"}),
        (SystemExit(15), {"state": "interrupted", "exit_code": 130, "said": "interrupted"}),
    ],
)
def test_what_breaks_a_job_off_is_told(out: Storage, error: BaseException, expected: dict[str, Any]) -> None:
    def broken() -> None:
        with status.of("score"):
            status.begin(out)
            raise error

    with pytest.raises(type(error)):
        broken()
    assert told(out).items() >= expected.items()


def test_what_is_done_but_was_killed_before_it_said_so_says_so_when_run_again(out: Storage) -> None:
    with status.of("score"):
        status.begin(out)
        killed = out.read("status.json")
    out.write("status.json", killed)
    for said in ("now it is told", "and is told once"):
        with status.of("score") as job:
            status.mend(out)
            job.end(0, said)
    assert (told(out)["state"], told(out)["said"]) == ("succeeded", "now it is told")


@pytest.mark.parametrize("damaged", [b"", b"[]", b"null", b'{"a": 1}', b"\xff"])
def test_what_is_done_says_so_where_what_it_said_before_is_damaged(out: Storage, damaged: bytes) -> None:
    out.write("status.json", damaged)
    with status.of("score") as job:
        status.mend(out)
        job.end(0, "was complete already")
    assert told(out)["state"] == "succeeded"


@pytest.mark.parametrize("error", [AccessDeniedError, TryAgainError])
def test_a_place_that_takes_no_status_any_more_fails_no_job(tmp_path: Path, error: type[FruitrayError]) -> None:
    class Full(LocalStorage):
        begun = False

        def write(self, key: str, data: bytes) -> None:
            if self.begun or error is TryAgainError:
                raise error(self.uri_of(key), "the disk is full")

    with status.of("score") as job:
        status.begin(out := Full(str(tmp_path)))
        out.begun = True
        job.end(0, "done")


def test_a_job_does_not_begin_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    out = LocalStorage(str(tmp_path / "notes.txt" / "index"))
    with pytest.raises(NotFoundError, match="a file is there"), status.of("prepare"):
        status.begin(out)
    with status.of("score"):
        status.mend(out)
