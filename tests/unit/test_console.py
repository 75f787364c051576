"""Progress in a job's log, and what workers hand on of it."""

import pytest

from fruitray import console
from fruitray.console import LOG_WIDTH, progress, reached, say, show_table, shown, tell


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hears, and no progress is under way."""
    for name, value in {"_hear": None, "_shown": {}, "_advance": None}.items():
        monkeypatch.setattr(console, name, value)


def test_a_log_gets_a_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("decode", 3, "photos") as advance:
        for _ in range(3):
            advance(1)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("decode: 3 of 3 photos, ")
    assert shown() == {}


def test_a_job_with_lines_of_its_own_is_as_far_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 5, "epochs", in_logs=False):
        for epoch in (1, 3, 2):  # the last one was done again, where a worker was lost
            say(f"epoch {epoch}")
            reached(epoch)
        assert shown() == {"step": "train", "done": 3, "total": 5, "unit": "epochs"}
    assert capsys.readouterr().out.splitlines() == ["epoch 1", "epoch 3", "epoch 2"]


def test_a_table_that_is_too_wide_loses_its_last_columns_and_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"trial": 1, "accuracy": 0.97531, "recalls": "0.91 " * 20, "start": "x" * LOG_WIDTH, "MiB": 7}
    show_table("trials", [row, row])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "not shown, for want of room: start, MiB"
    assert all(value in printed for value in ("0.9753", ("0.91 " * 20).strip()))
    show_table("trials", [{"name": "x" * LOG_WIDTH}])  # one column stays, whatever it takes
    assert "xxx" in capsys.readouterr().out


def test_of_a_thousand_columns_only_those_are_looked_at_that_may_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    class Watched(dict[str, int]):
        looked = 0

        def __getitem__(self, name: str) -> int:
            Watched.looked += 1
            return super().__getitem__(name)

    show_table("confusion", [Watched({f"class {number}": 1 for number in range(1000)})] * 1000, at_most=5)
    printed = capsys.readouterr().out
    assert "class 3" in printed.splitlines()[2]
    assert printed.splitlines()[-2].endswith("class 999")
    assert Watched.looked < 1000


def test_a_worker_shows_nothing_and_hands_on_all(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str | int] = []
    tell(heard.append)
    say("a line")
    reached(2)
    with progress("decode", 1, "photos") as advance:
        advance(1)
    assert heard[:2] == ["a line", 2]
    assert str(heard[2]).startswith("decode: 1 of 1 photos, ")
    assert capsys.readouterr().out == ""
