"""Scoring on a real cluster and a real store: one row per input, of whatever lies there, and what a run can be asked
for. What happens while things are killed is `test_score_faults.py`'s."""

import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.commit import PLAN, verify
from fruitray.images import decode
from fruitray.package import load_package
from fruitray.predictor import Predictor
from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from fruitray.synthetic import photo_set
from tests.cluster import Cluster
from tests.integration.conftest import SCORED, fill_scorable, save_untrained
from tests.unit.test_bad_input import FILES, HIDDEN, NEVER_OPENED, fill


def _arguments(root: str, out: str) -> list[str]:
    places = ["--package", f"{root}/model", "--images", f"{root}/raw", "--out", f"{root}/{out}"]
    return [*places, "--shard-rows", "8", "--workers", "2"]


def _rows(uri: str) -> dict[str, dict[str, Any]]:
    """The rows of a finished output, by URI of the photo."""
    out = open_storage(uri)
    tables = [pq.read_table(pa.BufferReader(out.read(part.key))) for part in verify(out)]
    rows = pa.concat_tables(tables).to_pylist()
    by_uri = {row["uri"]: row for row in rows}
    assert len(by_uri) == len(rows)
    return by_uri


@pytest.mark.parametrize(
    ("options", "settings", "tolerance"),
    [
        ((), {"engine": "openvino"}, 1e-2),
        (("--engine", "eager", "--full-precision", "--batch-size", "3"), {"full_precision": True}, 1e-5),
    ],
    ids=["auto", "fp32"],
)
def test_the_rows_are_what_the_predictor_says_in_this_process(
    cluster: Cluster, scorable: str, options: tuple[str, ...], settings: dict[str, Any], tolerance: float
) -> None:
    if "openvino" in settings.values():
        pytest.importorskip("openvino")
    code, printed = cluster.run("score", *_arguments(scorable, "scores"), *options)
    assert code == 0, printed
    rows, raw = _rows(f"{scorable}/scores"), open_storage(f"{scorable}/raw")
    keys = sorted(entry.key for entry in raw.list())
    predictor = Predictor(load_package(f"{scorable}/model"), gpu=False, **settings)
    for key, prediction in zip(keys, predictor.predict([raw.read(key) for key in keys]), strict=True):
        row = rows[f"{scorable}/raw/{key}"]
        assert (row["status"], row["error_code"]) == (prediction.status, prediction.error_code)
        assert row["label"] == prediction.label
        if prediction.status == "ok":
            assert row["top_scores"] == pytest.approx(prediction.top_scores, abs=tolerance)


def test_a_dry_run_says_how_long_it_would_take_and_writes_nothing(cluster: Cluster, scorable: str, aws: str) -> None:
    before = _written(aws)
    code, printed = cluster.run("score", *_arguments(scorable, "scores"), "--dry-run", "--cost-per-hour", "3600")
    assert code == 0, printed
    assert f"{SCORED} photos, " in printed
    seconds = float(printed.split("would take about ")[1].split(" s")[0])
    cost = float(printed.split("and cost ")[1].split(",")[0])
    assert cost == pytest.approx(seconds, abs=0.6)
    assert _written(aws) == before


def test_a_folder_that_has_grown_costs_what_is_new(cluster: Cluster, scorable: str) -> None:
    options = ("--embeddings", "--partition-by", "folder")
    code, printed = cluster.run("score", *_arguments(scorable, "first"), *options)
    assert code == 0, printed
    first = _rows(f"{scorable}/first")
    bad = sorted(uri for uri, row in first.items() if row["status"] == "error")
    raw = open_storage(f"{scorable}/raw")
    good = next(data for data in photo_set(20).values() if _decodes(data))
    raw.write(bad[0].removeprefix(f"{raw.uri}/"), good)  # mended
    raw.write("plum/new one.jpg", good)
    again = ("--previous", f"{scorable}/first", "--retry-errors")
    code, printed = cluster.run("score", *_arguments(scorable, "second"), *options, *again)
    assert code == 0, printed
    assert f"{SCORED - len(bad)} of {SCORED + 1} rows are taken from {scorable}/first" in printed
    second = _rows(f"{scorable}/second")
    assert second.keys() - first.keys() == {f"{raw.uri}/plum/new one.jpg"}
    assert second[bad[0]]["status"] == "ok"
    assert {uri: row for uri, row in second.items() if uri in first and uri != bad[0]} == {
        uri: row for uri, row in first.items() if uri != bad[0]
    }
    assert all(len(row["embedding"]) == 1280 for row in second.values() if row["status"] == "ok")
    folders = {part.key.split("/")[1] for part in verify(open_storage(f"{scorable}/second"))}
    assert folders == {"folder=cherry", "folder=strawberry", "folder=tomato", "folder=plum"}
    code, printed = cluster.run("score", *_arguments(scorable, "third"), *again)
    assert (code, "--previous" in printed, "embeddings" in printed) == (2, True, True), printed


def _decodes(data: bytes) -> bool:
    try:
        return decode(data).width > 0
    except Exception:
        return False


def test_a_list_in_the_store_is_scored_with_what_it_says(cluster: Cluster, scorable: str) -> None:
    raw = open_storage(f"{scorable}/raw")
    keys = sorted(entry.key for entry in raw.list())[:10]
    lines = ["uri,label", *(f"{raw.uri}/{key},tomato" for key in keys), f"{raw.uri}/gone.jpg,tomato"]
    open_storage(f"{scorable}/lists").write("some.csv", "\n".join(lines).encode())
    places = ["--package", f"{scorable}/model", "--images", f"{scorable}/lists/some.csv", "--out", f"{scorable}/few"]
    code, printed = cluster.run("score", *places)
    assert code == 0, printed
    rows = _rows(f"{scorable}/few")
    assert list(rows) == sorted(f"{raw.uri}/{key}" for key in [*keys, "gone.jpg"])
    assert rows[f"{raw.uri}/gone.jpg"]["error_code"] == "E_SRC_GONE"
    counted = [part.confusion for part in verify(open_storage(f"{scorable}/few"))]
    good = sum(row["status"] == "ok" for row in rows.values())
    assert sum(sum(row.values()) for folders in counted for row in folders.values()) == good
    assert all(set(folders) == {"tomato"} for folders in counted)


def test_every_kind_of_bad_file_has_its_row_and_harms_no_other(cluster: Cluster, tmp_path: Path) -> None:
    root, good = tmp_path / "photos", tmp_path / "good"
    photos = [data for data in photo_set(24).values() if _decodes(data)]
    for number in range(1000):
        path = good / "22" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[number % len(photos)])
    fill(root)
    shutil.copytree(good, root, dirs_exist_ok=True)
    save_untrained(str(tmp_path / "model"))
    fixed = ["--package", str(tmp_path / "model"), "--engine", "eager", "--full-precision", "--shard-rows", "100"]
    code, printed = cluster.run("score", *fixed, "--images", str(good), "--out", str(tmp_path / "calm"))
    assert code == 0, printed
    job = cluster.start("score", *fixed, "--images", str(root), "--out", str(tmp_path / "out"))
    while not (tmp_path / "out" / PLAN).exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
    (root / "17/deleted.jpg").unlink()  # the workers have yet to start
    (root / "17/replaced.jpg").write_bytes(photos[0])
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed
    assert f"hidden files skipped: {len(HIDDEN)}" in printed
    rows = {uri.removeprefix(f"{root}/"): row for uri, row in _rows(str(tmp_path / "out")).items()}
    assert sorted(rows) == sorted([*FILES, *NEVER_OPENED, *(f"22/{number:04d}.jpg" for number in range(1000))])
    wanted = {key: case if isinstance(case, str) else None for key, (_, case) in FILES.items()} | NEVER_OPENED
    del wanted["21/secret.jpg"]  # root may read it
    assert {key: rows[key]["error_code"] for key in wanted} == wanted
    for uri, row in _rows(str(tmp_path / "calm")).items():
        beside = rows[uri.removeprefix(f"{good}/")]
        assert (beside["label"], beside["status"]) == (row["label"], "ok")
        assert beside["top_scores"] == pytest.approx(row["top_scores"], abs=1e-5)


def _written(bucket: str) -> list[tuple[str, datetime]]:
    """Every object and when it was written: equal bytes written again have the same etag, but not the same time."""
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [(item["Key"], item["LastModified"]) for page in pages for item in page["Contents"]]


def test_a_finished_job_run_again_writes_nothing(cluster: Cluster, scorable: str, aws: str) -> None:
    assert cluster.run("score", *_arguments(scorable, "scores"))[0] == 0
    before = _written(aws)
    code, printed = cluster.run("score", *_arguments(scorable, "scores"))
    assert (code, "complete already" in printed) == (0, True), printed
    assert _written(aws) == before
    code, printed = cluster.run("score", *_arguments(scorable, "scores"), "--top-k", "1")
    assert (code, "top_k" in printed) == (5, True), printed


def test_a_store_that_ignores_if_none_match_gets_a_warning_and_a_verified_output(
    cluster: Cluster, weak_aws: str, weak_s3: S3Server
) -> None:
    root = f"s3://{weak_aws}"
    fill_scorable(root)
    own = weak_s3.environment | {"RAY_ADDRESS": "local", "RAY_TMPDIR": cluster.environment["FRUITRAY_CACHE"] + "-ray"}
    code, printed = cluster.run("score", *_arguments(root, "scores"), **own)
    assert code == 0, printed
    assert "ignores If-None-Match" in printed
    assert len(verify(open_storage(f"{root}/scores"))) == SCORED // 8
