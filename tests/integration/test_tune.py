"""Searching on a real cluster: every search, what fails, what is killed, what is left behind."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.cluster.watch import SHORT_OF_MEMORY
from fruitray.errors import TrialsFailedError
from fruitray.index import read_index
from fruitray.storage import open_storage
from tests.cluster import Cluster, end_of, wait_for

SMALL = ("--image-size", "64", "--batch-size", "16")


def _tune(place: str, *options: str) -> tuple[str, ...]:
    return ("tune", "--index", f"{place}/index", "--out", f"{place}/tune", *options)


def _rows(place: str) -> list[dict[str, Any]]:
    """By number."""
    table = pq.read_table(pa.BufferReader(open_storage(f"{place}/tune").read("trials.parquet")))
    return sorted(table.to_pylist(), key=lambda row: row["trial"])


def _reports(place: str) -> list[list[dict[str, Any]]]:
    """What each trial has reported to Tune, one after the other."""
    storage = open_storage(f"{place}/tune/_ray")
    keys = [entry.key for entry in storage.list() if entry.key.endswith("/result.json")]
    return [[json.loads(line) for line in storage.read(key).splitlines()] for key in sorted(keys)]


def _checkpoints(place: str) -> list[str]:
    return [entry.key for entry in open_storage(f"{place}/tune/_ray").list() if entry.key.endswith("checkpoint.pt")]


def _state(place: str) -> list[str]:
    """The versions of Tune's own state."""
    found = open_storage(f"{place}/tune/_ray").list("tune/experiment_state")
    return sorted(f"{entry.key} {entry.etag}" for entry in found)


def test_a_trial_that_fails_says_why_and_the_others_are_cross_validated(
    cluster: Cluster, place: str, weights: Path
) -> None:
    """One network has no weights, two are fine at one learning rate and diverge at another."""
    space = ("--backbones", "cnn", "resnet50", "mobilenet_v2", "--weights", str(weights), "--search", "grid")
    rates = ("--learning-rates", "1e-3", "1e30", "--frozen-choices", "True", "--epochs", "2")
    code, printed = cluster.run(*_tune(place, *space, *rates, "--folds", "3", *SMALL))
    assert code == 0, printed
    rows = _rows(place)
    assert [(row["backbone"], row["learning_rate"], row["error"] is None) for row in rows] == [
        ("cnn", 1e-3, True),
        ("cnn", 1e30, False),
        ("resnet50", 1e-3, False),
        ("resnet50", 1e30, False),
        ("mobilenet_v2", 1e-3, True),
        ("mobilenet_v2", 1e30, False),
    ]
    assert "the loss became" in rows[1]["error"]
    assert all("resnet50.safetensors does not exist" in row["error"] for row in rows[2:4])
    assert "tune: without resnet50 frozen" in printed
    assert {row["backbone"]: row["part"] for row in rows if not row["error"]} == {
        "cnn": "whole network",
        "mobilenet_v2": "last two layers",
    }
    layers = open_storage(f"{place}/tune/layers")
    assert sorted(entry.key for entry in layers.list()) == ["cnn.txt", "mobilenet_v2 frozen.txt"]
    assert f"Trainable params: {rows[4]['trained_parameters']:,}" in layers.read("mobilenet_v2 frozen.txt").decode()
    assert f"{rows[0]['parameters']:,}" in layers.read("cnn.txt").decode()
    assert len({row["initial_state_hash"] for row in rows[:1] + rows[4:5]}) == 2
    assert all(row["peak_memory"] > 0 and row["images_per_s"] > 0 and row["seconds"] > 0 for row in rows[::4])
    photos = len(read_index(f"{place}/index").pool().labels)
    for row in rows[::4]:
        assert len(row["fold_accuracies"]) == 3
        assert len(row["right"]) == photos, "every photo is held out once"
        assert row["accuracy"] == pytest.approx(sum(row["right"]) / photos)
        assert row["epochs"] == 6
    assert "distinguishable" in printed


def test_a_killed_trial_goes_on_from_its_checkpoint(cluster: Cluster, place: str) -> None:
    """And when all is done, no checkpoint takes up space."""
    options = ("--backbones", "cnn", "--trials", "1", "--epochs", "250", "--patience", "250", "--scheduler", "none")
    job = cluster.start(*_tune(place, *options, "--image-size", "96", "--augment", "mirror+jitter"))
    wait_for(lambda: _checkpoints(place), job)
    [before] = wait_for(lambda: _reports(place), job)
    os.kill(before[-1]["pid"], signal.SIGKILL)
    code, printed = end_of(job)
    assert code == 0, printed
    [reports] = _reports(place)
    epochs = [report["epochs"] for report in reports]
    restart = next(place for place, (a, b) in enumerate(itertools.pairwise(reports)) if a["pid"] != b["pid"])
    assert restart >= len(before) - 1
    assert 1 < epochs[restart + 1] <= epochs[restart] + 1, "it must go on from a checkpoint, not from the start"
    assert epochs[-1] == 250
    assert _rows(place)[0]["epochs"] == 250
    assert _checkpoints(place) == []


@pytest.mark.chaos
def test_a_killed_search_goes_on_within_its_trials(cluster: Cluster, place: str) -> None:
    options = ("--backbones", "cnn", "--trials", "1", "--epochs", "250", "--patience", "250", "--scheduler", "none")
    command = _tune(place, *options, "--image-size", "96", "--augment", "mirror+jitter")
    job = cluster.start(*command)
    wait_for(lambda: _checkpoints(place), job)
    for _ in range(2):  # then Tune's own state, which is kept now and then, knows it
        before = _state(place)
        wait_for(lambda before=before: _state(place) != before, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    code, printed = cluster.run(*command)
    assert code == 0, printed
    epochs = [report["epochs"] for report in _reports(place)[-1]]
    assert epochs.count(1) == 1, "it must go on from a checkpoint, not from the start"
    assert epochs[-1] == 250


_WHOSE_WORKER_DIES_AS_THE_NEXT_IS_TO_HAVE_IT = """
import os, sys
import ray
from ray import tune
from ray.train._internal.session import get_session
import fruitray.cluster.watch

def trial(space):
    get_session().reset = lambda **_: os._exit(1)
    tune.report({"accuracy": 1.0, "process": os.getpid()})

ray.init()
once = tune.TuneConfig(num_samples=3, max_concurrent_trials=1, reuse_actors=True)
kept = tune.RunConfig(storage_path=sys.argv[1], failure_config=tune.FailureConfig(max_failures=1))
found = tune.Tuner(trial, tune_config=once, run_config=kept).fit()
processes = {result.metrics["process"] for result in found}
print([result.metrics["accuracy"] for result in found], found.num_errors, "in", len(processes), "processes")
"""


def test_a_worker_that_dies_between_two_trials_costs_none(cluster: Cluster, tmp_path: Path) -> None:
    code, printed = end_of(cluster.start_program(_WHOSE_WORKER_DIES_AS_THE_NEXT_IS_TO_HAVE_IT, str(tmp_path)))
    assert code == 0, printed
    assert "[1.0, 1.0, 1.0] 0 in 3 processes" in printed


def test_a_trial_that_ray_kills_for_want_of_memory_says_so(cluster: Cluster, place: str) -> None:
    command = _tune(place, "--backbones", "cnn", "--trials", "1", "--epochs", "1", *SMALL)
    code, printed = end_of(cluster.start_apart(*command, cpus=2, RAY_memory_usage_threshold="0.01"))
    assert (code, "Traceback" in printed) == (TrialsFailedError.exit_code, False), printed
    assert [row["error"] for row in _rows(place)] == [SHORT_OF_MEMORY], printed
    code, printed = cluster.run(*command)
    assert code == 0, printed
    assert [row["error"] for row in _rows(place)] == [None]


def test_optuna_searches_a_space_that_depends_on_the_network_and_can_be_asked_again(
    cluster: Cluster, place: str, weights: Path
) -> None:
    """With this seed it tries each of two networks twice, and once one that has no weights, which fails."""
    space = ("--backbones", "mobilenet_v2", "cnn", "resnet50", "--weights", str(weights), "--dropouts", "0", "0.3")
    search = ("--search", "optuna", "--trials", "5", "--seed", "32", "--epochs", "1")
    code, printed = cluster.run(*_tune(place, *search, *space, *SMALL))
    assert code == 0, printed
    rows = _rows(place)
    assert [row["trial"] for row in rows] == list(range(5))
    assert [row["backbone"] for row in rows if row["error"]] == ["resnet50"]
    for row in rows:
        suited = 1e-4 if row["backbone"] == "cnn" else 1e-3
        assert suited / 3.01 <= row["learning_rate"] <= suited * 3.01
    starts = {(row["backbone"], row["frozen"], row["initial_state_hash"]) for row in rows if not row["error"]}
    assert sorted(start[:2] for start in starts) == [("cnn", False), ("mobilenet_v2", True)], "each starts alike"
    code, printed = cluster.run(*_tune(place, *search, *space, *SMALL))
    assert (code, "Traceback" in printed) == (0, False), printed
    assert _rows(place) == rows, "none is run again"


def test_the_reports_preset_ends_in_its_tables(cluster: Cluster, place: str) -> None:
    """One worker has all of its trials, and each its own peak of memory: the last network is the smaller one."""
    options = ("--preset", "report", "--weights", "none", "--backbones", "cnn", "efficientnet_b2", "mlp")
    small = ("--epochs", "1", "--augment", "none", "--image-size", "64", "--cpus-per-trial", "2")
    code, printed = cluster.run(*_tune(place, *options, *small))
    assert code == 0, printed
    for table in ("dropout", "learning rate", "batch size", "network"):
        assert f"{table}, up to epoch 1 each" in printed
    rows = _rows(place)
    assert [row["error"] for row in rows] == [None] * (1 + 1 + 3 + 2 + 2)
    assert [row["backbone"] for row in rows[-2:]] == ["efficientnet_b2", "mlp"]
    assert len({report["pid"] for reports in _reports(place) for report in reports}) == 1
    assert rows[-1]["peak_memory"] < rows[-2]["peak_memory"] - 2**25
