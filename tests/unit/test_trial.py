"""One trial in this process: where it goes on from, and what is said of how it ended."""

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ray.exceptions import RayActorError
from ray.tune import Checkpoint
from ray.tune.experiment import Trial as Tried

from fruitray.checkpoints import to_bytes
from fruitray.cluster import trial
from fruitray.cluster.trial import CHECKPOINT, LONGEST, _passing, reason, train
from fruitray.cluster.tune import _row, plain
from fruitray.config import FitConfig
from fruitray.errors import DivergedError, OutputConflictError, TryAgainError
from fruitray.index import read_index
from fruitray.search import Trial
from tests.unit.runs import CONFIG, through_a_file, write_photos_and_index

FIT = FitConfig(epochs=2, batch_size=4, learning_rate=1e-3)
TRIAL = plain(3, Trial(CONFIG, FIT))


def space(folder: Path, folds: int) -> dict[str, Any]:
    """Of a trial as Tune hands it to its worker."""
    index = write_photos_and_index(folder)
    known = {"index": index, "index_sha256": read_index(index).sha256, "out": str(folder / "out")}
    return {**known, "folds": folds, "cpus": 1, "gpu": False, "trial": TRIAL}


def timeless(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if name not in ("seconds", "images_per_s", "peak_memory")}


@pytest.mark.parametrize("folds", [0, 2])
def test_a_trial_that_goes_on_from_any_epoch_ends_as_an_undisturbed_one(tmp_path: Path, folds: int) -> None:
    whole = space(tmp_path, folds)
    told = [(timeless(measured), through_a_file(state)) for measured, state in train(whole)]
    assert len(told) == FIT.epochs * max(1, folds)
    for done, (_, state) in enumerate(told, start=1):
        rest = [timeless(measured) for measured, _ in train(whole, state)]
        assert rest == [measured for measured, _ in told[done:]]


def test_a_trial_whose_index_was_prepared_anew_ends(tmp_path: Path) -> None:
    with pytest.raises(OutputConflictError, match="anew"):
        next(train(space(tmp_path, 0) | {"index_sha256": "another"}))


def test_a_full_disk_is_what_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(tempfile.TemporaryDirectory[str]):
        def __enter__(self) -> str:
            os.symlink("/dev/full", os.path.join(self.name, CHECKPOINT))
            return self.name

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Full)
    monkeypatch.setattr(trial, "train", lambda *_: iter([({"accuracy": 0.5}, {"weights": torch.zeros(100)})]))
    monkeypatch.setattr(trial, "_read_checkpoint", lambda: None)
    monkeypatch.setattr(trial, "use_threads", lambda _: None)
    monkeypatch.setattr(trial.Pace, "cheap", lambda _: True)
    monkeypatch.setattr(trial.tune, "report", lambda *_, **__: None)
    with pytest.raises(TryAgainError, match=r"cannot be kept: .*No space left"):
        trial.run_trial({"cpus": 1})


def ended(last_result: dict[str, Any] | None, error: Exception | str | None = None) -> Tried:
    """A trial that ended so, as far as it is asked."""
    told = {
        "pickled_error_file": None,
        "get_error": lambda: str(error) if error else None,
        "get_pickled_error": lambda: error if isinstance(error, Exception) else None,
    }
    status = Tried.ERROR if error else Tried.TERMINATED
    return cast(Tried, SimpleNamespace(config={"trial": TRIAL}, last_result=last_result, status=status, **told))


def row(last_result: dict[str, Any] | None, error: Exception | str | None = None) -> dict[str, Any]:
    """What the table says of a trial that ended so."""
    found, chosen = _row(ended(last_result, error), {})
    assert chosen == {"model": asdict(CONFIG), "fit": asdict(FIT)}
    assert found["trial"] == 3
    return found


DIED = RayActorError(error_msg="The actor died.\n\tpid: 7\nits node was short of memory")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DIED, "its node was short of memory"),
        ("Traceback\n  File ...\nOSError: disk", "OSError: disk"),
        (TryAgainError("s3://fruit", "busy"), "s3://fruit: busy"),
        (None, "it has not begun"),
    ],
)
def test_a_trial_that_never_reported_has_a_row_that_says_why(error: Exception | str | None, said: str) -> None:
    for metrics in (None, {"pid": 7}, {"accuracy": 0.0, "epochs": 0}):
        found = row(metrics, error)
        assert (found["error"], found["epochs"], found["accuracy"], found["right"]) == (said, 0, None, None)


def test_a_trial_has_what_it_reported_last(tmp_path: Path) -> None:
    *_, (measured, _) = train(space(tmp_path, 0))
    found = row(measured)
    assert (found["error"], found["epochs"], found["parts"]) == (None, FIT.epochs, 1)
    assert found["accuracy"] == pytest.approx(sum(found["right"]) / len(found["right"]))
    assert row(measured, DIED)["error"] == "its node was short of memory"
    assert row({**measured, "error": "the loss became nan"}, DIED)["error"] == "the loss became nan"


@pytest.mark.parametrize(("frozen", "said"), [(True, "the GPU is full"), (False, "its node was short of memory")])
def test_a_trial_that_had_no_embeddings_says_why_there_are_none(
    frozen: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRIAL["model"], "frozen", frozen)
    failed = _row(ended(None, DIED), {CONFIG.backbone: "the GPU is full"})[0]
    assert failed["error"] == said


def test_a_checkpoint_that_cannot_be_kept_is_worth_another_try() -> None:
    with pytest.raises(TryAgainError, match="a checkpoint: cannot be kept: no route to the store"), _passing():
        raise OSError("no route to the store")


def test_a_reason_is_one_line_that_holds_the_cause() -> None:
    assert reason(DivergedError(2, float("nan"))) == str(DivergedError(2, float("nan")))
    assert reason(RuntimeError("no compiler\nset A_FLAG=1 to see more")).startswith("RuntimeError: no compiler set")
    assert len(reason(ValueError("word " * 999))) <= LONGEST
    assert "--image-size" in reason(torch.OutOfMemoryError("CUDA out of memory\nadvice"))


@pytest.mark.parametrize("kept", [None, b"", b"P", b"PK\x03\x04 and no more"])
def test_a_trial_whose_checkpoint_is_gone_or_cut_starts_again(
    kept: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept is not None:
        (tmp_path / CHECKPOINT).write_bytes(kept)
    monkeypatch.setattr(trial.tune, "get_checkpoint", lambda: Checkpoint.from_directory(tmp_path))
    assert trial._read_checkpoint() is None
    (tmp_path / CHECKPOINT).write_bytes(to_bytes({"epochs": 3}))
    assert trial._read_checkpoint() == {"epochs": 3}
