"""Tuning and training on a real cluster: every backbone's path, several workers, and resuming after a kill."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
import torchvision
from ray.exceptions import ActorDiedError

from fruitray.checkpoints import delete_checkpoints, save_checkpoint
from fruitray.cli import run_job
from fruitray.cluster import train
from fruitray.config import FitConfig, TrainConfig
from fruitray.errors import DivergedError, GpuFullError, OutputConflictError, TryAgainError, find_ours
from fruitray.package import load_package
from fruitray.storage import LocalStorage, open_storage
from tests.cluster import Cluster, end_of
from tests.integration.conftest import save_untrained, trained_here
from tests.unit.runs import write_photos_and_index

SMALL = ("--image-size", "64", "--batch-size", "16")


def _end_when(job: subprocess.Popen[str], line: str, how: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """(exit code, what it printed from then on) of a driver that is ended as soon as it has printed `line`."""
    assert job.stdout
    printed = ""
    while line not in printed:
        read = job.stdout.readline()
        assert read, printed
        printed += read
    os.killpg(job.pid, how)
    return end_of(job)


def _table(uri: str) -> list[dict[str, Any]]:
    folder, _, name = uri.rpartition("/")
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(open_storage(folder).read(name))).to_pylist()
    return rows


def _history(model: str) -> list[dict[str, Any]]:
    return _table(f"{model}/history.parquet")


@pytest.mark.chaos
def test_efficientnet_b2_goes_the_whole_path(cluster: Cluster, place: str) -> None:
    model, scores = f"{place}/model", f"{place}/scores"
    network = ("--backbone", "efficientnet_b2", "--weights", "none", "--epochs", "1", "--tta", *SMALL)
    code, printed = cluster.run("train", "--index", f"{place}/index", "--out", model, *network)
    assert code == 0, printed
    assert load_package(model).description["model"]["backbone"] == "efficientnet_b2"
    code, printed = cluster.run("score", "--package", model, "--images", f"{place}/raw", "--out", scores)
    assert code == 0, printed
    code, printed = cluster.run("verify", "--out", scores)
    assert (code, "60 inputs, one row each (2 errors)" in printed) == (0, True), printed
    parts = [entry.key for entry in open_storage(scores).list("data/")]
    scored = {row["uri"]: row for part in parts for row in _table(f"{scores}/{part}")}
    for row in _table(f"{model}/predictions.parquet"):
        assert scored[row["uri"]]["confidence"] == pytest.approx(row["confidence"], abs=0.02)


def test_a_frozen_backbone_stays_as_it_is_and_its_package_says_what_was_measured(
    cluster: Cluster, place: str, weights: Path
) -> None:
    index, model = f"{place}/index", f"{place}/model"
    network = ("--backbone", "mobilenet_v2", "--weights", str(weights), "--frozen", "--epochs", "2", "--tta")
    code, printed = cluster.run("train", "--index", index, "--out", model, *network, *SMALL)
    assert code == 0, printed
    package, card = load_package(model), open_storage(model).read("README.md").decode()
    assert package.inference.tta
    assert f"validation accuracy {package.description['metrics']['accuracy']:.4f}" in card
    assert f"validation accuracy {package.description['metrics']['accuracy']:.4f}" in printed
    state = package.model.trunk.state_dict()
    untouched = torchvision.models.mobilenet_v2().state_dict().keys() & state.keys()
    [stored] = [entry.key for entry in open_storage(f"{model}/initial").list() if entry.key.endswith("package.json")]
    started = load_package(f"{model}/initial/{stored.rpartition('/')[0]}").model.trunk.state_dict()
    assert untouched
    assert all(torch.equal(state[name], started[name]) for name in untouched)


def test_two_workers_measure_what_one_measures(cluster: Cluster, place: str, weights: Path) -> None:
    """With batch norm, in stages and with an average of the weights, of a network that makes little of a last bit and
    in steps that a tenth more or less would show in; in float32, as a bfloat16 has few bits to be alike in."""
    model = f"{place}/model"
    network = ("--backbone", "resnet18", "--weights", str(weights), "--head-epochs", "1", "--ema", "0.5")
    network += ("--image-size", "96", "--batch-size", "32", "--dropout", "0", "--optimizer", "sgd")
    network += ("--learning-rate", "2e-3", "--epochs", "3", "--augment", "mirror+jitter", "--full-precision")
    code, printed = cluster.run("train", "--index", f"{place}/index", "--out", model, "--workers", "2", *network)
    assert code == 0, printed
    assert re.search(r"^decode: (\d+) of \1 photos, ", printed, re.MULTILINE), "its workers' progress is shown, too"
    alone, _ = trained_here(cluster, model)
    names = ("train_loss", "val_loss", "accuracy")
    measured = (torch.tensor([[epoch[name] for name in names] for epoch in rows]) for rows in (_history(model), alone))
    torch.testing.assert_close(*measured, rtol=0, atol=3e-4)


def test_a_killed_search_keeps_its_finished_trials(cluster: Cluster, place: str) -> None:
    space = ("--backbones", "cnn", "--trials", "3", "--image-size", "64", "--epochs", "3", "--cpus-per-trial", "2")
    arguments = ("--index", f"{place}/index", "--out", f"{place}/tune", *space)
    _end_when(cluster.start("tune", *arguments), "tune: 2 of 3 trials ended")
    code, printed = cluster.run("tune", *arguments)
    assert code == 0, printed
    trials = pq.read_table(pa.BufferReader(open_storage(f"{place}/tune").read("trials.parquet"))).to_pylist()
    assert sorted(row["trial"] for row in trials) == [0, 1, 2]
    assert all(row["error"] is None for row in trials)
    assert "number 0" not in printed, "a finished trial is not run again"


def test_a_training_that_is_stopped_says_so(cluster: Cluster, place: str) -> None:
    arguments = ("--index", f"{place}/index", "--out", f"{place}/model", "--backbone", "cnn", "--image-size", "96")
    job = cluster.start("train", *arguments, "--epochs", "500", "--patience", "500")
    code, printed = _end_when(job, "train: epoch 1 of 500", signal.SIGINT)
    assert (code, printed.splitlines()[-1]) == (130, "fruitray train: interrupted (exit code 130)"), printed
    assert json.loads(open_storage(f"{place}/model").read("status.json"))["state"] == "interrupted"


def _train_with(
    monkeypatch: pytest.MonkeyPatch, out: LocalStorage, config: TrainConfig, failures: Iterator[Exception | None]
) -> tuple[list[int], Exception | None]:
    """With workers that do nothing but fail so, one after the other; in how many parts each computed a step, and how it
    ended."""
    tried: list[int] = []

    class Workers:
        def __init__(self, config: TrainConfig, job: dict[str, Any]) -> None:
            tried.append(job["parts"])

        def fit(self) -> None:
            if failure := next(failures, None):
                lost = ray.train.WorkerGroupError("lost", {0: failure})
                raise failure if isinstance(failure, ray.train.ControllerError) else lost

    monkeypatch.setattr(train, "_trainer", Workers)
    try:
        train._train(config, out, {})
    except (ray.train.WorkerGroupError, TryAgainError, GpuFullError) as error:
        return tried, error
    return tried, None


def test_workers_out_of_memory_begin_again_with_smaller_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is no GPU to fill, so what is tried here is the driver: its workers end as Ray says they would."""
    full, out = torch.OutOfMemoryError("CUDA out of memory"), LocalStorage(str(tmp_path))
    config = TrainConfig(index="i", out=str(tmp_path), workers=2, fit=FitConfig(accumulate=2))
    assert _train_with(monkeypatch, out, config, iter([full, full, None])) == ([2, 4, 8], None)
    tried, ended = _train_with(monkeypatch, out, config, iter([full] * 9))
    assert (tried, type(ended)) == ([2, 4, 8, 16, 32], GpuFullError)
    alone = replace(config, workers=1)
    assert _train_with(monkeypatch, out, alone, iter([full, None])) == ([2, 4], None)


def test_what_would_fail_again_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, out = TrainConfig(index="i", out=str(tmp_path)), LocalStorage(str(tmp_path))

    def tried(failure: Exception, *, gets_on: bool = False) -> tuple[int, type[Exception] | None]:
        def failures() -> Iterator[Exception]:
            for number in range(2 * train.FAILURES):
                yield failure
                if gets_on:
                    save_checkpoint(out, {"number": number, "step": 0})

        parts, ended = _train_with(monkeypatch, out, config, failures())
        return len(parts), ended and type(find_ours(ended) or ended)

    assert tried(DivergedError(1, float("nan"))) == (1, DivergedError)
    assert tried(TryAgainError("s3://fruit", "busy")) == (1 + train.FAILURES, TryAgainError)
    assert tried(ActorDiedError()) == (1 + train.FAILURES, TryAgainError)
    assert tried(ray.train.ControllerError(ActorDiedError())) == (1 + train.FAILURES, TryAgainError)
    assert tried(ActorDiedError(), gets_on=True) == (1 + 2 * train.FAILURES, None)


def test_a_package_that_two_wrote_at_once_is_written_again_while_there_are_checkpoints(tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path))
    save_untrained(out.uri)
    save_checkpoint(out, {"number": 1, "step": 0})
    assert not train._can_be_mended(out)
    out.write("model.safetensors", b"another's")
    assert train._can_be_mended(out)
    delete_checkpoints(out)
    assert not train._can_be_mended(out), "nothing is left to write it from"


def test_a_package_that_was_copied_there_is_not_taken_for_the_trained_one(tmp_path: Path) -> None:
    save_untrained(str(tmp_path / "model"))
    config = TrainConfig(index=write_photos_and_index(tmp_path), out=str(tmp_path / "model"))
    with pytest.raises(OutputConflictError, match="not trained here"):
        train.run(config)


def test_missing_weights_end_in_one_sentence_with_the_three_choices(
    tmp_path: Path, aws: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--index", write_photos_and_index(tmp_path), "--out", f"s3://{aws}/model", "--backbone", "resnet50")
    assert run_job("train", [*arguments, "--weights", f"s3://{aws}/absent"]) == 6
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert all(choice in last for choice in ("--weights imagenet", "--weights none", "--weights PATH_OR_URI")), last
