"""The whole path as a person walks it on a cluster: `ray job submit` of every job, photos and outputs in S3."""

import json
import re
import subprocess

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fruitray.images import CODES
from fruitray.package import load_package
from fruitray.s3server import find_binary
from fruitray.storage import open_storage
from fruitray.synthetic import photo_set
from tests.cluster import ROOT, Cluster

PER_CLASS = 20


def submit(cluster: Cluster, job: str, *arguments: str) -> tuple[int, str]:
    """(exit code, log) of `ray job submit --working-dir . -- python -m jobs.JOB arguments`."""
    entrypoint = ["python", "-m", f"jobs.{job}", *arguments]
    done = subprocess.run(
        [find_binary("ray") or "ray", "job", "submit", "--working-dir", ".", "--", *entrypoint],
        cwd=ROOT,
        env=cluster.environment | {"RAY_ADDRESS": cluster.dashboard},
        capture_output=True,
        text=True,
        timeout=400,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def photos(aws: str) -> dict[str, bytes]:
    """60 drawn photos, two of them corrupt, uploaded below raw/."""
    drawn = photo_set(PER_CLASS)
    raw = open_storage(f"s3://{aws}/raw")
    for key, data in drawn.items():
        raw.write(key, data)
    return drawn


def test_every_job_runs_by_job_submit_from_photos_to_verified_scores(
    cluster: Cluster, aws: str, photos: dict[str, bytes]
) -> None:
    raw, index, tune, model, scores = (f"s3://{aws}/{name}" for name in ("raw", "index", "tune", "model", "scores"))
    small = ("--image-size", "64", "--epochs", "3", "--batch-sizes", "16")
    chain = {
        "prepare": ("--images", raw, "--out", index),
        "tune": ("--index", index, "--out", tune, "--backbones", "cnn", "--trials", "2", *small),
        "train": ("--index", index, "--out", model, "--config", f"{tune}/best.json", "--workers", "2"),
        "score": ("--package", model, "--images", raw, "--out", scores, "--shard-rows", "16", "--top-k", "2"),
        "verify": ("--out", scores),
    }
    for job, arguments in chain.items():
        code, log = submit(cluster, job, *arguments)
        assert code == 0, log
        assert f"{job}: " in log, "the closing line says what was written where"

    out = open_storage(scores)
    parts = sorted(entry.key for entry in out.list("data/"))
    rows = pa.concat_tables(pq.read_table(pa.BufferReader(out.read(key))) for key in parts)
    assert sorted(rows["uri"].to_pylist()) == sorted(f"{raw}/{key}" for key in photos)
    errors = rows.filter(pc.equal(rows["status"], "error"))
    assert errors.num_rows == 2
    assert set(errors["error_code"].to_pylist()) <= set(CODES)
    assert all(len(labels) == 2 for labels in rows.filter(pc.equal(rows["status"], "ok"))["top_labels"].to_pylist())
    assert load_package(model).classes == ("cherry", "strawberry", "tomato")
    trials = pq.read_table(pa.BufferReader(open_storage(tune).read("trials.parquet")))
    assert len(set(trials["initial_state_hash"].to_pylist())) == 1, "all trials of a backbone start alike"
    best = json.loads(open_storage(tune).read("best.json"))
    assert best["model"]["backbone"] == "cnn"


@pytest.mark.parametrize(
    ("job", "arguments", "code"),
    [
        ("prepare", ("--images", "s3://{bucket}/nothing", "--out", "s3://{bucket}/index"), 3),
        ("prepare", ("--images", "s3://{bucket}-absent/raw", "--out", "s3://{bucket}/index"), 6),
        ("train", ("--index", "s3://{bucket}/index", "--out", "s3://{bucket}/model", "--workers", "0"), 2),
    ],
)
def test_a_failing_job_is_reported_with_its_exit_code(
    cluster: Cluster, aws: str, job: str, arguments: tuple[str, ...], code: int
) -> None:
    returned, log = submit(cluster, job, *(argument.format(bucket=aws) for argument in arguments))
    assert returned == 1, "`ray job submit` knows only success and failure"
    assert re.search(rf"exit code {code}\b", log), log
