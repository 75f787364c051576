"""Behaviour of tracking: what readers find, that a resumed training is one, and that no failure ends a training."""

import importlib.util
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from fruitray import tracking as room
from fruitray.storage import LocalStorage
from fruitray.tracking import Tracking, hyperparameters, tracking

CONFIG = {"index": "s3://fruit/index", "config": None, "fit": {"epochs": 3, "learning_rate": 0.1}, "workers": 2}
BEST = 2


def row(number: int) -> dict[str, Any]:
    return {"epoch": number, "train_loss": 1 / number, "accuracy": 0.5 + number / 10, "recalls": [0.5, 0.7]}


def train(out: Any, epochs: Iterable[int], *, finish: bool = False, rank: int = 0) -> list[str]:
    """Track `epochs`; answers what was warned of."""
    said: list[str] = []
    with tracking(out, CONFIG, rank=rank, warn=said.append) as track:
        for number in epochs:
            track.epoch(row(number))
        if finish:
            track.finish(row(BEST))
    return said


def break_off_after(number: int, out: Any) -> None:
    """Track the epochs to `number`, then let the training fail, which it must."""

    def stream() -> Any:
        yield from range(1, number + 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(out, stream())


def events(folder: Path) -> list[Event]:
    """The events of all files in the order of their names, with checksums verified, as TFRecord frames them."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            [length], [of_length] = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            event, [of_event] = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
            assert (of_length, of_event) == (masked(data[:8]), masked(event))
            found.append(Event.FromString(event))
            data = data[16 + length :]
    return found


def masked(data: bytes) -> int:
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, pytest.approx(value.simple_value)))
    return found


EXPECTED = {
    "train_loss": [(1, 1.0), (2, 1 / 2), (3, 1 / 3)],
    "accuracy": [(1, 0.6), (2, 0.7), (3, 0.8)],
    "best_train_loss": [(2, 1 / 2)],
    "best_accuracy": [(2, 0.7)],
}


def test_a_training_that_is_resumed_shows_each_step_once(tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path))
    assert train(out, range(1, 3)) == []
    assert train(out, range(2, 4), finish=True) == []  # from the checkpoint of epoch 1
    assert curves(tmp_path / "tensorboard") == EXPECTED
    tags = {value.tag for event in events(tmp_path / "tensorboard") for value in event.summary.value}
    assert tags >= {"config/text_summary", "_hparams_/session_start_info", "_hparams_/session_end_info"}


def test_tensorboard_reads_the_curves_and_the_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    train(LocalStorage(str(tmp_path)), range(1, 3))
    reader = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    reader.Reload()
    train(LocalStorage(str(tmp_path)), range(2, 4), finish=True)
    reader.Reload()  # as one does that looks on
    for tag, points in EXPECTED.items():
        assert [(event.step, pytest.approx(event.value)) for event in reader.Scalars("tensorboard", tag)] == points
    assert reader.Runs()["tensorboard"].keys() >= {"scalars", "tensors"}
    plugins = reader.SummaryMetadata("tensorboard", "_hparams_/session_start_info").plugin_data.content
    assert b"learning_rate" in plugins


def test_only_rank_0_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(room.SERVER, "http://127.0.0.1:1")
    assert train(LocalStorage(str(tmp_path / "out")), range(1, 4), finish=True, rank=1) == []
    assert not (tmp_path / "out").exists()


def test_hyperparameters_are_the_options_that_have_a_value() -> None:
    assert hyperparameters(CONFIG) == {
        "index": "s3://fruit/index",
        "epochs": 3,
        "learning_rate": 0.1,
        "workers": 2,
    }


class _Broken(LocalStorage):
    """A storage to which nothing can be written."""

    def write(self, key: str, data: bytes) -> None:
        raise OSError("the disk is full\nand so on")


def test_a_tracker_that_fails_is_said_once_and_left_out(tmp_path: Path) -> None:
    said = train(_Broken(str(tmp_path)), range(1, 4), finish=True)
    assert said == ["train: goes on without TensorBoard: the disk is full"]


class _Counting:
    """A tracker that fails at one epoch."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.seen, self.closed = fails_at, [], []

    def epoch(self, row: Any) -> None:
        if row["epoch"] == self.fails_at:
            raise RuntimeError
        self.seen.append(row["epoch"])

    def finish(self, row: Any) -> None:
        self.seen.append("finish")

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


def test_one_that_fails_does_not_disturb_the_others_nor_does_a_driver_that_is_gone() -> None:
    def gone(line: str) -> None:
        raise ConnectionError

    sound, fails = _Counting(0), _Counting(2)
    track = Tracking({"fails": lambda: fails, "sound": lambda: sound}, gone)
    for number in (1, 2, 3):
        track.epoch(row(number))
    track.finish(row(BEST))
    track.close(failed=False)
    assert (sound.seen, sound.closed) == ([1, 2, 3, "finish"], [False])
    assert (fails.seen, fails.closed) == ([1], [])


def test_a_training_that_fails_still_fails(tmp_path: Path) -> None:
    break_off_after(2, LocalStorage(str(tmp_path)))
    assert curves(tmp_path / "tensorboard") == {name: EXPECTED[name][:2] for name in ("train_loss", "accuracy")}


def test_a_missing_mlflow_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(room.SERVER, "http://127.0.0.1:1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [said] = train(LocalStorage(str(tmp_path)), range(1, 4), finish=True)
    assert said.startswith("train: goes on without MLflow")
    assert "pip install mlflow-skinny" in said
    assert curves(tmp_path / "tensorboard") == EXPECTED


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow with a store of this test's own."""
    import mlflow as package

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv(room.SERVER, uri)
    monkeypatch.chdir(tmp_path)
    package.set_tracking_uri(uri)
    return package


def test_an_mlflow_run_goes_on_where_its_training_does(mlflow: Any, tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path / "out"))
    break_off_after(2, out)
    client, known = mlflow.MlflowClient(), json.loads(out.read("mlflow.json"))["run_id"]
    assert client.get_run(known).info.status == "FAILED"
    assert train(out, range(2, 4), finish=True) == []
    run = client.get_run(known)
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in hyperparameters(CONFIG).items()}
    for name, points in EXPECTED.items():
        assert [(point.step, pytest.approx(point.value)) for point in client.get_metric_history(known, name)] == points


def test_a_server_that_does_not_answer_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow as package

    monkeypatch.setenv(room.SERVER, "http://127.0.0.1:1")
    package.set_tracking_uri("http://127.0.0.1:1")
    [said] = train(LocalStorage(str(tmp_path)), range(1, 4), finish=True)
    assert said.startswith("train: goes on without MLflow")
    assert curves(tmp_path / "tensorboard") == EXPECTED
