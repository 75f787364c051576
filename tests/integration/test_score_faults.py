"""Scoring goes on, whatever is killed: each photo one row, and the same bytes as an undisturbed run.

`pytest tests/integration/test_score_faults.py --rounds 30` kills three hundred times.
"""

import os
import random
import signal
import subprocess
import time

import pytest

from fruitray.commit import SUCCESS, verify
from fruitray.storage import Storage, open_storage
from tests.cluster import Cluster, Nodes
from tests.integration.conftest import SCORED, score_arguments

KILLS = ["worker"] * 5 + ["decoder"] * 2 + ["driver"] * 2 + ["node"]
"""Of one round."""


def _hashes(uri: str) -> dict[str, str]:
    return {part.key: part.sha256 for part in verify(open_storage(uri))}


def _committed(out: Storage) -> int:
    return sum(1 for _ in out.list("data/"))


def _wait_for_more(out: Storage, job: subprocess.Popen[str]) -> bool:
    """Until another part is committed; False if the job ended meanwhile."""
    before, deadline = _committed(out), time.monotonic() + 120
    while _committed(out) == before:
        if job.poll() is not None:
            return False
        assert time.monotonic() < deadline, "it stands still"
        time.sleep(0.02)
    return True


def _kill(what: str, nodes: Nodes, job: subprocess.Popen[str], choice: random.Random) -> None:
    words = {"worker": "_Scorer", "decoder": "fruitray.images:rgb"}
    if what == "node":
        nodes.replace()
    elif what == "driver":
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate(timeout=60)
    elif there := nodes.cluster.processes(words[what]):
        choice.choice(there).kill()


def test_whatever_is_killed_the_rows_are_those_of_an_undisturbed_run(
    nodes: Nodes, scorable: str, request: pytest.FixtureRequest
) -> None:
    rounds = request.config.getoption("--rounds")
    calm, choice = _hashes(f"{scorable}/calm"), random.Random(rounds)
    kills = KILLS * rounds
    choice.shuffle(kills)
    outputs = 0
    while kills:  # as many outputs as it takes to kill so often
        outputs += 1
        name = f"disturbed-{outputs}"
        out, arguments = open_storage(f"{scorable}/{name}"), ["score", *score_arguments(scorable, name)]
        job = nodes.cluster.start(*arguments)
        while kills and _wait_for_more(out, job):
            what = kills.pop()
            _kill(what, nodes, job, choice)
            if what == "driver":
                assert not out.exists(SUCCESS)
                job = nodes.cluster.start(*arguments)
        printed, _ = job.communicate(timeout=300)
        assert job.returncode == 0, printed
        code, printed = nodes.cluster.run("verify", "--out", out.uri)
        assert (code, f"{SCORED} inputs, one row each" in printed) == (0, True), printed
        assert _hashes(out.uri) == calm


def test_two_drivers_at_once_make_one_output(cluster: Cluster, scorable: str) -> None:
    arguments = [*score_arguments(scorable, "both"), "--workers", "1"]
    jobs = [cluster.start("score", *arguments) for _ in range(2)]
    for job in jobs:
        printed, _ = job.communicate(timeout=300)
        assert job.returncode == 0, printed
    assert _hashes(f"{scorable}/both") == _hashes(f"{scorable}/calm")


def test_a_run_that_is_stopped_goes_on_when_asked_again(cluster: Cluster, scorable: str) -> None:
    out = open_storage(f"{scorable}/stopped")
    job = cluster.start("score", *score_arguments(scorable, "stopped"))
    assert _wait_for_more(out, job)
    os.killpg(job.pid, signal.SIGINT)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 130, printed
    code, printed = cluster.run("score", *score_arguments(scorable, "stopped"))
    assert (code, "were committed before" in printed) == (0, True), printed
    assert len(verify(out)) == SCORED // 2
