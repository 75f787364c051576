"""Training goes on, whatever is killed: same epochs, same weights as an undisturbed run.

A node that is lost while others are left is `test_nodes.py`'s; here the only one is. With `--rounds 4` each is killed
four times, and the driver is also asked to end.
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
import torch

from fruitray.package import load_package
from fruitray.storage import open_storage
from tests.cluster import Nodes, end_of, wait_for
from tests.integration.conftest import trained_here

NETWORK = ("--backbone", "timm/test_efficientnet", "--weights", "none", "--image-size", "64", "--ema", "0.9")
"""Small, as a whole state is kept at every step, and an object store keeps the room of what is deleted for a while."""
OFTEN = ("--patience", "99", "--batch-size", "4", "--checkpoint-minutes", "0", "--augment", "mirror+jitter")


def _start(nodes: Nodes, place: str, epochs: int) -> subprocess.Popen[str]:
    """`train`, which soon says who waits for nodes."""
    command = ("train", "--index", f"{place}/index", "--out", f"{place}/killed", "--epochs", str(epochs))
    return nodes.cluster.start(*command, *NETWORK, *OFTEN, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5")


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
        _lose_the_node(nodes, job)
        nodes.raylet = nodes.add()
    else:
        os.killpg(job.pid, signal.SIGKILL if what == "driver" else signal.SIGTERM)
        end_of(job)


def _lose_the_node(nodes: Nodes, job: subprocess.Popen[str]) -> None:
    """Until `job` says that it waits for another."""
    nodes.raylet.kill()
    assert job.stdout
    assert any("1 of 1 workers wait for nodes" in line for line in job.stdout), end_of(job)


def test_whatever_is_killed_training_ends_as_if_nothing_had_been(
    nodes: Nodes, place: str, request: pytest.FixtureRequest
) -> None:
    rounds = request.config.getoption("--rounds")
    kills = ["worker", "driver", "node", "driver, politely"][: None if rounds > 1 else 3] * rounds
    random.Random(rounds).shuffle(kills)
    epochs = 2 * len(kills) + 1  # a kill can take until the next one
    job, after = _start(nodes, place, epochs), ""
    for what in kills:
        after = _wait_within_an_epoch(nodes, place, job, after)
        _kill(what, nodes, job)
        if what.startswith("driver"):
            job = _start(nodes, place, epochs)
    code, printed = end_of(job)
    assert code == 0, printed
    assert "going on from a checkpoint" in printed
    history, weights = trained_here(nodes.cluster, f"{place}/killed")
    assert _history(place) == [_told_by_no_clock(row) for row in history]
    package = load_package(f"{place}/killed")
    state = package.model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert package.description["epochs"] == epochs
    assert _checkpoints(place) == []
    files = [entry.key for entry in open_storage(f"{place}/killed").list("tensorboard/")]
    assert len(files) == epochs + 2, "the options, each epoch once, and the best one"


@pytest.mark.chaos
def test_training_goes_on_with_a_smaller_node_than_it_had(nodes: Nodes, place: str) -> None:
    job = _start(nodes, place, 4)
    _wait_within_an_epoch(nodes, place, job, "")
    _lose_the_node(nodes, job)
    nodes.raylet = nodes.add(cpus=1)
    code, printed = end_of(job)
    assert (code, "going on from a checkpoint" in printed) == (0, True), printed
    assert len(_history(place)) == 4


def _history(place: str) -> list[dict[str, Any]]:
    table = pq.read_table(pa.BufferReader(open_storage(f"{place}/killed").read("history.parquet")))
    return [_told_by_no_clock(row) for row in table.to_pylist()]


def _told_by_no_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("seconds", "images_per_s")}
