"""The whole path as a person walks it on a cluster: `ray job submit` of every job, photos and outputs in S3."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fruitray.package import load_package
from fruitray.s3server import S3Server
from fruitray.storage import LocalStorage, open_storage
from fruitray.synthetic import photo_set
from tests.cluster import ROOT, Cluster, ray_head

PER_CLASS = 20


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    """One that takes jobs."""
    with ray_head(s3.environment, dashboard=True) as head:
        yield head


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
        "export": ("--package", model, "--images", raw, "--out", f"s3://{aws}/export", "--format", "torch"),
    }
    for job, arguments in chain.items():
        code, log = cluster.submit(job, *arguments)
        assert code == 0, log
        assert f"{job}: " in log, "the closing line says what was written where"
        if job not in ("verify", "export"):
            told = json.loads(open_storage(arguments[arguments.index("--out") + 1]).read("status.json"))
            assert (told["job"], told["state"], told["exit_code"]) == (job, "succeeded", 0)
            assert told["said"] in log

    out = open_storage(scores)
    parts = sorted(entry.key for entry in out.list("data/"))
    rows = pa.concat_tables(pq.read_table(pa.BufferReader(out.read(key))) for key in parts)
    assert sorted(rows["uri"].to_pylist()) == sorted(f"{raw}/{key}" for key in photos)
    errors = rows.filter(pc.equal(rows["status"], "error"))
    assert errors.num_rows == 2
    assert sorted(errors["error_code"].to_pylist()) == ["E_NOT_IMAGE", "E_TRUNCATED"]
    assert all(len(labels) == 2 for labels in rows.filter(pc.equal(rows["status"], "ok"))["top_labels"].to_pylist())
    assert load_package(model).classes == ("cherry", "strawberry", "tomato")
    metrics = json.loads(out.read("metrics.json"))
    right = sum(row["label"] == Path(row["uri"]).parent.name for row in rows.to_pylist())
    assert (metrics["photos"], metrics["accuracy"]) == (58, right / 58), "the folders have the classes' names"
    trials = pq.read_table(pa.BufferReader(open_storage(tune).read("trials.parquet")))
    assert len(set(trials["initial_state_hash"].to_pylist())) == 1, "all trials of a backbone start alike"
    best = json.loads(open_storage(tune).read("best.json"))
    assert best["model"]["backbone"] == "cnn"


def test_local_folders_named_by_relative_paths_will_do(
    cluster: Cluster, photos: dict[str, bytes], tmp_path: Path
) -> None:
    for key, data in photos.items():
        LocalStorage(str(tmp_path / "raw")).write(key, data)
    network = ("--backbone", "cnn", "--weights", "none", "--image-size", "64", "--epochs", "1")
    for job, arguments in {
        "prepare": ("--images", "raw", "--out", "runs/index"),
        "train": ("--index", "runs/index", "--out", "runs/model", *network),
        "score": ("--package", "runs/model", "--images", "raw", "--out", "runs/scores"),
        "verify": ("--out", "runs/scores"),
    }.items():
        code, printed = cluster.run(job, *arguments, folder=tmp_path)
        assert code == 0, printed
    assert pq.read_table(tmp_path / "runs" / "scores" / "data").num_rows == len(photos)


def test_the_demo_ends_with_a_row_per_photo_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.demo", "--per-class", "20", "--trials", "2", "--epochs", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    demo = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment | {"TMPDIR": "/tmp", "DEMO_TEST": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    [scores] = tmp_path.glob("*/scores/data")
    rows = pq.read_table(scores)
    assert rows.num_rows == len(set(rows["uri"].to_pylist())) == 60
    assert rows["status"].to_pylist().count("error") == 2
    left = [process for process in psutil.process_iter() if _environment(process).get("DEMO_TEST") == str(tmp_path)]
    assert left == []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


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
    returned, log = cluster.submit(job, *(argument.format(bucket=aws) for argument in arguments))
    assert returned == 1, "`ray job submit` knows only success and failure"
    assert re.search(rf"exit code {code}\b", log), log
