"""Scoring on a real cluster and a real store while things are killed: one row per input, whatever happens."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.backbones import build
from fruitray.commit import verify
from fruitray.config import ModelConfig
from fruitray.package import load_package, save_package
from fruitray.predictor import Predictor
from fruitray.s3server import S3Server
from fruitray.storage import Storage, open_storage
from fruitray.synthetic import photo_set
from tests.cluster import Cluster

PHOTOS = 240


@pytest.fixture
def place(aws: str) -> str:
    """A prefix with a package of an untrained network below model/ and photos, two of them corrupt, below raw/."""
    root = f"s3://{aws}"
    _fill(root)
    return root


def _fill(root: str) -> None:
    config = ModelConfig(backbone="mobilenet_v2", weights="none", image_size=96)
    model, _ = build(config, classes=3)
    save_package(open_storage(f"{root}/model"), model.eval(), config, ("cherry", "strawberry", "tomato"), {})
    raw = open_storage(f"{root}/raw")
    drawn = list(photo_set(20).items())
    for number in range(PHOTOS):
        key, data = drawn[number % len(drawn)]
        raw.write(f"{number:03d} {key}", data)


def _arguments(root: str, out: str) -> list[str]:
    places = ["--package", f"{root}/model", "--images", f"{root}/raw", "--out", f"{root}/{out}"]
    return [*places, "--shard-rows", "8", "--workers", "2"]


def _hashes(out: Storage) -> dict[str, str]:
    return {part.key: part.sha256 for part in verify(out)}


def _wait_for(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert job.poll() is None, f"the job ended before it could be disturbed: {job.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_workers_and_drivers_leave_what_an_undisturbed_run_leaves(cluster: Cluster, place: str) -> None:
    code, printed = cluster.run("score", *_arguments(place, "calm"))
    assert code == 0, printed
    calm, disturbed = open_storage(f"{place}/calm"), open_storage(f"{place}/disturbed")

    def committed() -> int:
        return sum(1 for _ in disturbed.list("data/"))

    job = cluster.start("score", *_arguments(place, "disturbed"))
    _wait_for(lambda: committed() >= 3, job)
    for decoder in cluster.processes("fruitray.images:rgb"):
        decoder.kill()
    cluster.processes("_Scorer")[0].kill()
    before = committed()
    _wait_for(lambda: committed() > before, job)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert not disturbed.exists("_SUCCESS"), "the driver must have been killed mid-run"

    code, printed = cluster.run("score", *_arguments(place, "disturbed"))
    assert code == 0, printed
    assert "were committed before" in printed
    code, printed = cluster.run("verify", "--out", f"{place}/disturbed")
    assert code == 0, printed
    assert f"{PHOTOS} inputs, one row each" in printed
    assert _hashes(disturbed) == _hashes(calm)


def test_the_rows_are_what_the_predictor_says_in_this_process(cluster: Cluster, place: str) -> None:
    code, printed = cluster.run("score", *_arguments(place, "scores"))
    assert code == 0, printed
    out, raw = open_storage(f"{place}/scores"), open_storage(f"{place}/raw")
    tables = [pq.read_table(pa.BufferReader(out.read(part.key))) for part in verify(out)]
    rows = {row["uri"]: row for row in pa.concat_tables(tables).to_pylist()}
    keys = sorted(entry.key for entry in raw.list())
    predictions = Predictor(load_package(f"{place}/model")).predict([raw.read(key) for key in keys])
    for key, prediction in zip(keys, predictions, strict=True):
        row = rows[f"{place}/raw/{key}"]
        assert (row["status"], row["error_code"]) == (prediction.status, prediction.error_code)
        if prediction.status == "ok":
            assert row["confidence"] == pytest.approx(prediction.confidence, abs=1e-2)


def _written(bucket: str) -> list[tuple[str, datetime]]:
    """Every object and when it was written: equal bytes written again have the same etag, but not the same time."""
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [(item["Key"], item["LastModified"]) for page in pages for item in page["Contents"]]


def test_a_finished_job_run_again_writes_nothing(cluster: Cluster, place: str, aws: str) -> None:
    assert cluster.run("score", *_arguments(place, "scores"))[0] == 0
    before = _written(aws)
    code, printed = cluster.run("score", *_arguments(place, "scores"))
    assert (code, "complete already" in printed) == (0, True), printed
    assert _written(aws) == before
    code, printed = cluster.run("score", *_arguments(place, "scores"), "--top-k", "1")
    assert (code, "top_k" in printed) == (5, True), printed


def test_a_store_that_ignores_if_none_match_gets_a_warning_and_a_verified_output(
    cluster: Cluster, weak_aws: str, weak_s3: S3Server
) -> None:
    root = f"s3://{weak_aws}"
    _fill(root)
    own = weak_s3.environment | {"RAY_ADDRESS": "local", "RAY_TMPDIR": cluster.environment["FRUITRAY_CACHE"] + "-ray"}
    code, printed = cluster.run("score", *_arguments(root, "scores"), **own)
    assert code == 0, printed
    assert "ignores If-None-Match" in printed
    assert len(verify(open_storage(f"{root}/scores"))) == PHOTOS // 8
