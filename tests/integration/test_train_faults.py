"""Training goes on, whatever is killed: same epochs, same weights as an undisturbed run.

A node that is lost while others are left is `test_nodes.py`'s; here the only one is. With `--rounds 4` it is lost and
replaced in the long run, too, and each is killed four times in it.
"""

import os
import random
import signal
import subprocess
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.package import load_package
from fruitray.storage import open_storage
from tests.cluster import Nodes, end_of, wait_for

NETWORK = ("--backbone", "timm/test_efficientnet", "--weights", "none", "--image-size", "64", "--ema", "0.9")
"""Small, as a whole state is kept at every step, and an object store keeps the room of what is deleted for a while."""
OFTEN = ("--patience", "99", "--batch-size", "4", "--checkpoint-minutes", "0", "--augment", "mirror+jitter")


def _command(place: str, out: str, epochs: int) -> tuple[str, ...]:
    return "train", "--index", f"{place}/index", "--out", f"{place}/{out}", *NETWORK, *OFTEN, "--epochs", str(epochs)


def _checkpoints(place: str) -> list[str]:
    """Names of the committed ones, oldest first."""
    keys = sorted(entry.key for entry in open_storage(f"{place}/killed").list("checkpoints/"))
    return [key for key in keys if key.endswith(".json")]


def _wait_within_an_epoch(nodes: Nodes, place: str, job: subprocess.Popen[str], after: str) -> str:
    """Until a worker has kept a checkpoint newer than `after` in the middle of an epoch; answers its name."""

    def newer() -> list[str]:
        return [key for key in _checkpoints(place) if key > after and "-00000000-" not in key and _workers(nodes)]

    newest: str = wait_for(newer, job)[-1]
    return newest


def _workers(nodes: Nodes) -> list[psutil.Process]:
    return nodes.cluster.processes("RayTrainWorker")


def _kill(what: str, nodes: Nodes, job: subprocess.Popen[str]) -> None:
    if what == "worker":
        _workers(nodes)[0].kill()
    elif what == "node":
        nodes.replace()
    else:
        os.killpg(job.pid, signal.SIGKILL if what == "driver" else signal.SIGTERM)
        end_of(job)


def test_whatever_is_killed_training_ends_as_if_nothing_had_been(
    nodes: Nodes, place: str, request: pytest.FixtureRequest
) -> None:
    rounds = request.config.getoption("--rounds")
    kills = ["worker", "driver", "node", "driver, politely"][: None if rounds > 1 else 2] * rounds
    random.Random(rounds).shuffle(kills)
    epochs = 2 * len(kills) + 1  # a kill can take until the next one
    calmly, disturbed = _command(place, "calm", epochs), _command(place, "killed", epochs)
    code, printed = nodes.cluster.run(*calmly)
    assert code == 0, printed
    job, after = nodes.cluster.start(*disturbed), ""
    for what in kills:
        after = _wait_within_an_epoch(nodes, place, job, after)
        _kill(what, nodes, job)
        if what.startswith("driver"):
            job = nodes.cluster.start(*disturbed)
    code, printed = end_of(job)
    assert code == 0, printed
    assert "going on from a checkpoint" in printed
    assert _history(place, "killed") == _history(place, "calm")
    calm, killed = (load_package(f"{place}/{name}").description for name in ("calm", "killed"))
    assert killed["files"]["model.safetensors"] == calm["files"]["model.safetensors"]
    assert killed["epochs"] == epochs
    assert _checkpoints(place) == []
    files = [entry.key for entry in open_storage(f"{place}/killed").list("tensorboard/")]
    assert len(files) == epochs + 2, "the options, each epoch once, and the best one"


def test_where_no_node_is_left_train_says_who_waits_and_goes_on_with_the_smaller_one_that_comes(
    nodes: Nodes, place: str
) -> None:
    job = nodes.cluster.start(*_command(place, "killed", 4), RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5")
    _wait_within_an_epoch(nodes, place, job, "")
    nodes.raylet.kill()
    assert job.stdout
    printed = next((line for line in job.stdout if "1 of 1 workers wait for nodes" in line), None)
    assert printed, end_of(job)
    nodes.raylet = nodes.add(cpus=1)
    code, printed = end_of(job)
    assert (code, "going on from a checkpoint" in printed) == (0, True), printed
    assert len(_history(place, "killed")) == 4


def _history(place: str, out: str) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    table = pq.read_table(pa.BufferReader(open_storage(f"{place}/{out}").read("history.parquet")))
    rows: list[dict[str, Any]] = table.drop_columns(["seconds", "images_per_s"]).to_pylist()
    return rows
