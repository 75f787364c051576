"""Scoring goes on, whatever is killed: each photo one row, and the same bytes as an undisturbed run.

`pytest tests/integration/test_score_faults.py --rounds 30` kills three hundred times.
"""

import json
import os
import random
import signal
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from fruitray.commit import SUCCESS, verify
from fruitray.errors import TryAgainError
from fruitray.s3server import S3Server
from fruitray.storage import Storage, open_storage
from tests.cluster import Cluster, Nodes, end_of, ray_head, wait_for
from tests.integration.conftest import SCORED, score_arguments
from tests.trouble import trouble_before
from tests.unit.test_commit import contents, drive

KILLS = ["worker"] * 5 + ["decoder"] * 2 + ["driver"] * 2 + ["node"]
"""Of each of several rounds."""
FEW = ["worker"] * 2 + ["decoder", "driver", "node"]
"""Of a lone one."""


def _hashes(uri: str) -> dict[str, str]:
    return {part.key: part.sha256 for part in verify(open_storage(uri))}


def _committed(out: Storage) -> int:
    return sum(1 for _ in out.list("data/"))


def _wait_for_more(out: Storage, job: subprocess.Popen[str]) -> bool:
    """Until another part is committed; False if the job ended meanwhile."""
    before = _committed(out)
    wait_for(lambda: _committed(out) != before or job.poll() is not None)
    return job.poll() is None


def _kill(what: str, nodes: Nodes, job: subprocess.Popen[str], choice: random.Random) -> bool:
    """Whether it could be killed: the job may end before."""
    words = {"worker": "Scorer", "decoder": "fruitray.images:rgb"}
    if what == "node":
        nodes.replace()
    elif what == "driver":
        os.killpg(job.pid, signal.SIGKILL)
        end_of(job)
    else:
        wait_for(lambda: nodes.cluster.processes(words[what]) or job.poll() is not None)
        try:
            choice.choice(nodes.cluster.processes(words[what])).kill()
        except (IndexError, psutil.NoSuchProcess):
            return False
    return True


def test_whatever_is_killed_the_rows_are_those_of_an_undisturbed_run(
    nodes: Nodes, scorable: str, request: pytest.FixtureRequest
) -> None:
    rounds = request.config.getoption("--rounds")
    calm, choice = _hashes(f"{scorable}/calm"), random.Random(rounds)
    kills = KILLS * rounds if rounds > 1 else [*FEW]
    choice.shuffle(kills)
    outputs = 0
    while kills:  # as many outputs as it takes to kill so often
        outputs += 1
        assert outputs <= len(KILLS) * rounds, f"{len(kills)} cannot be killed"
        name = f"disturbed-{outputs}"
        out, arguments = open_storage(f"{scorable}/{name}"), ["score", *score_arguments(scorable, name)]
        job = nodes.cluster.start(*arguments)
        while kills and _wait_for_more(out, job):
            killed = _kill(kills[-1], nodes, job, choice)
            if kills[-1] == "driver":
                killed = not out.exists(SUCCESS)  # else it came too late
                job = nodes.cluster.start(*arguments)
            if killed:
                kills.pop()
        code, printed = end_of(job)
        assert code == 0, printed
        assert _hashes(out.uri) == calm


@pytest.mark.parametrize("bucket", ["aws", "weak_aws"])
def test_drivers_that_really_run_at_once_agree_on_a_real_store(bucket: str, request: pytest.FixtureRequest) -> None:
    """Without Ray; the weak store overwrites what is committed at once, by the same bytes."""
    root = f"s3://{request.getfixturevalue(bucket)}"
    calm, out = open_storage(f"{root}/calm"), open_storage(f"{root}/both")
    drive(calm)
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(drive, [open_storage(out.uri) for _ in range(4)])]
    assert answers == [verify(out)] * 4
    assert contents(out) == contents(calm)


@pytest.mark.chaos
def test_two_drivers_at_once_make_one_output(cluster: Cluster, scorable: str) -> None:
    arguments = [*score_arguments(scorable, "both"), "--workers", "1"]
    jobs = [cluster.start("score", *arguments) for _ in range(2)]
    for job in jobs:
        code, printed = end_of(job)
        assert code == 0, printed
    assert _hashes(f"{scorable}/both") == _hashes(f"{scorable}/calm")


@pytest.mark.chaos
def test_a_run_that_is_stopped_goes_on_when_asked_again(cluster: Cluster, scorable: str) -> None:
    out = open_storage(f"{scorable}/stopped")
    job = cluster.start("score", *score_arguments(scorable, "stopped"))
    assert _wait_for_more(out, job)
    os.killpg(job.pid, signal.SIGINT)
    code, printed = end_of(job)
    assert code == 130, printed
    told = json.loads(out.read("status.json"))
    assert (told["state"], told["progress"]["total"]) == ("interrupted", SCORED)
    code, printed = cluster.run("score", *score_arguments(scorable, "stopped"))
    assert (code, "were committed before" in printed) == (0, True), printed
    assert len(verify(out)) == SCORED // 2


LONG = 12
"""As often as the workers of two runs read a photo that they do not get."""


def _moody(method: str, path: str, before: int) -> str:
    """One part is refused once, one photo cannot be read for long; a fifth of all else goes wrong at first."""
    key = path.split("/", 2)[-1]  # without the bucket, whose name is another each time
    if "/007%20" in key and method == "GET" and before < LONG:
        return "short"
    if before:
        return ""
    mood = zlib.crc32(key.encode()) % 100
    if method == "PUT":
        return "denied" if "part-000040" in key else "lost" if mood < 20 else ""
    return "stall" if mood < 1 else "busy" if mood < 10 else "short" if mood < 20 and method == "GET" else ""


@pytest.mark.chaos
def test_a_store_that_misbehaves_is_told_and_costs_only_time(s3: S3Server, scorable: str) -> None:
    told, runs, left = "", 0, []
    trouble = trouble_before(s3.environment["AWS_ENDPOINT_URL"], _moody)
    with trouble as (endpoint, made), ray_head(s3.environment | {"AWS_ENDPOINT_URL": endpoint}) as troubled:
        while runs < 5 and not open_storage(f"{scorable}/troubled").exists(SUCCESS):
            runs += 1
            _, printed = troubled.run("score", *score_arguments(scorable, "troubled"))
            assert "Traceback" not in printed
            told += printed
            if "the same command scores what is left" in printed:
                left.append(SCORED // 2 - _committed(open_storage(f"{scorable}/troubled")))
    assert {"busy", "denied", "short", "stall", "lost"} <= made.keys()
    assert "part-000040.parquet: access denied" in told
    assert left[-1] == 1, "all but what could not be had"
    assert _hashes(f"{scorable}/troubled") == _hashes(f"{scorable}/calm")


@pytest.mark.chaos
def test_killed_before_and_after_everything_asked_of_the_store(s3: S3Server, cluster: Cluster, scorable: str) -> None:
    """Whoever asks, the first two times: a worker, and the job goes on, or the driver, and it is run again."""
    some = [entry.key for entry in open_storage(f"{scorable}/raw").list()][:6]
    for key in some:
        open_storage(f"{scorable}/some").write(key, open_storage(f"{scorable}/raw").read(key))
    arguments = ["--package", f"{scorable}/model", "--images", f"{scorable}/some", "--shard-rows", "3"]
    code, printed = cluster.run("score", *arguments, "--out", f"{scorable}/some-calm")
    assert code == 0, printed
    kinds = ("kill before", "kill after")
    trouble = trouble_before(s3.environment["AWS_ENDPOINT_URL"], lambda *asked: (*kinds, "")[min(asked[-1], 2)])
    with trouble as (endpoint, made), ray_head(s3.environment | {"AWS_ENDPOINT_URL": endpoint}, cpus=1) as mortal:
        code = -signal.SIGKILL
        while code in (-signal.SIGKILL, TryAgainError.exit_code):
            code, printed = mortal.run("score", *arguments, "--out", f"{scorable}/some-killed")
    assert code == 0, printed
    assert made["kill before"] == made["kill after"] > 20
    assert _hashes(f"{scorable}/some-killed") == _hashes(f"{scorable}/some-calm")
