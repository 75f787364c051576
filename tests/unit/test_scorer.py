"""What score's driver makes of its workers' answers."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from fruitray import console
from fruitray.cluster import scorer
from fruitray.cluster.score import measured
from fruitray.cluster.scorer import GIVE_UP, STAGES, score_shards
from fruitray.commit import Part
from fruitray.config import ScoreConfig
from fruitray.errors import TryAgainError

SCORED = {"rows": 2, "scored": 2, "errors": 0, "engine": "eager", **dict.fromkeys(STAGES, 0.1), "failed": []}
WAITS = {"failed": ["s3://fruit/a.jpg", "the connection broke"]}


def answered(answers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the driver has taken of its workers' `answers` when it has done, or given up."""
    taken = []

    def stream(*_: Any, **__: Any) -> Iterator[pa.Table]:
        for answer in answers:
            taken.append(answer)
            yield pa.Table.from_pylist([answer], scorer._ANSWER)

    monkeypatch.setattr(console, "_shown", {})  # else the progress that is broken off here would be another test's
    monkeypatch.setattr(scorer, "stream", stream)
    monkeypatch.setattr(scorer, "connect", lambda: None)
    monkeypatch.setattr(scorer, "say_who_waits", lambda *_, **__: None)
    monkeypatch.setattr(scorer, "worker_count", lambda *_, **__: 2)
    config = ScoreConfig(package="p", images=("i",), out="o")
    with pytest.raises(TryAgainError, match=r"a\.jpg: the connection broke; \d+ shards wait"):
        score_shards(config, [None] * len(answers), 2 * len(answers), "eager")
    return taken


def test_shards_that_wait_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [WAITS, SCORED] * 2 * GIVE_UP
    assert answered(answers, monkeypatch) == answers


def test_a_store_that_fails_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [SCORED, *[WAITS] * 2 * GIVE_UP, SCORED]
    assert answered(answers, monkeypatch) == answers[: 1 + GIVE_UP]


def test_a_class_of_which_no_photo_was_scored_has_no_recall() -> None:
    part = Part("data/part-0.parquet", 12, "", confusion={"cherry": {"cherry": 5, "plum": 1}, "plum": {"plum": 6}})
    assert measured(["cherry", "plum", "tomato"], [part])["recalls"] == [pytest.approx(5 / 6), 1.0, None]
