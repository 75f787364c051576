"""Scoring on a real cluster and a real store: one row per input, of whatever lies there, and what a run can be asked
for. What happens while things are killed is `test_score_faults.py`'s."""

import itertools
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.cli import run_job
from fruitray.cluster.planner import look
from fruitray.cluster.scorer import Scorer
from fruitray.commit import PLAN, verify
from fruitray.config import ScoreConfig
from fruitray.errors import AccessDeniedError, ImageError, NoInputError, NotFoundError
from fruitray.images import decode
from fruitray.inputs import list_inputs
from fruitray.package import load_package
from fruitray.predictor import Predictor
from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from tests.cluster import Cluster, end_of, wait_for
from tests.integration.conftest import LARGE, SCORED, save_untrained, score_arguments
from tests.trouble import trouble_before
from tests.unit.photos import sixty
from tests.unit.runs import write_photos_and_index
from tests.unit.test_bad_input import FILES, HIDDEN, NEVER_OPENED, fill


def _rows(uri: str) -> dict[str, dict[str, Any]]:
    """The rows of a finished output, by URI of the photo."""
    out = open_storage(uri)
    tables = [pq.read_table(pa.BufferReader(out.read(part.key))) for part in verify(out)]
    rows = pa.concat_tables(tables).to_pylist()
    by_uri = {row["uri"]: row for row in rows}
    assert len(by_uri) == len(rows)
    return by_uri


def test_the_rows_are_what_the_predictor_says_in_this_process(scorable: str) -> None:
    rows, raw = _rows(f"{scorable}/calm"), open_storage(f"{scorable}/raw")
    keys = sorted(entry.key for entry in raw.list())
    predictor, compared = Predictor(load_package(f"{scorable}/model"), gpu=False, batch_size=7), 0
    for key, prediction in zip(keys, predictor.predict([raw.read(key) for key in keys]), strict=True):
        row = rows[f"{scorable}/raw/{key}"]
        for name in ("status", "error_code", "width", "height"):
            assert row[name] == getattr(prediction, name)
        if prediction.status == "ok":
            scores = dict(zip(prediction.top_labels or (), prediction.top_scores or (), strict=True))
            assert dict(zip(row["top_labels"], row["top_scores"], strict=True)) == pytest.approx(scores, abs=1e-2)
            assert row["label"] == row["top_labels"][0]
            first, second = sorted(scores.values())[:-3:-1]
            if first - second > 2e-2:
                compared += 1
                assert row["label"] == prediction.label
    assert compared > SCORED / 2
    assert LARGE in {(row["width"], row["height"]) for row in rows.values()}
    assert len({row["label"] for row in rows.values()}) == 4, "three classes, and none for errors"


def test_a_worker_that_cannot_see_the_photos_does_not_call_them_gone(tmp_path: Path) -> None:
    save_untrained(str(tmp_path / "model"))
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.jpg").write_bytes(_good_photo())
    config = ScoreConfig(
        package=str(tmp_path / "model"), images=(str(photos),), out=str(tmp_path / "out"), dry_run=True
    )
    shard = list_inputs(config.images)[0].append_column("part", pa.array(["0"]))
    assert Scorer(config, "eager", cpus=1).score(shard)["errors"].to_pylist() == [0]
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(NotFoundError, match="photos"):
        Scorer(config, "eager", cpus=1).score(shard)
    photos.mkdir()
    with pytest.raises(NotFoundError, match="empty on"):
        Scorer(config, "eager", cpus=1).score(shard)


def test_a_photo_whose_folder_was_gone_when_it_was_planned_costs_its_own_row_alone(tmp_path: Path) -> None:
    save_untrained(str(tmp_path / "model"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(_good_photo())
    (tmp_path / "some.csv").write_text("uri,etag,bytes\na/1.jpg,,\nb/1.jpg,seen,3\n")
    shutil.rmtree(tmp_path / "b")
    images = (str(tmp_path / "some.csv"),)
    config = ScoreConfig(package=str(tmp_path / "model"), images=images, out=str(tmp_path / "out"), dry_run=True)
    shard = list_inputs(images)[0].append_column("part", pa.array(["0", "0"]))
    assert Scorer(config, "eager", cpus=1).score(shard)["errors"].to_pylist() == [1]


def test_a_list_that_names_a_missing_bucket_is_told_and_one_that_names_a_missing_object_is_not(
    aws: str, tmp_path: Path
) -> None:
    (tmp_path / "some.csv").write_text(f"uri\ns3://{aws}/gone.jpg\n")
    assert list_inputs([str(tmp_path / "some.csv")])[0].num_rows == 1
    (tmp_path / "some.csv").write_text(f"uri\ns3://{aws}/gone.jpg\ns3://{aws}-gone/1.jpg\n")
    with pytest.raises(NotFoundError, match=f"{aws}-gone.*no such bucket"):
        list_inputs([str(tmp_path / "some.csv")])


def test_a_split_without_photos_is_told(tmp_path: Path) -> None:
    config = ScoreConfig(package="model", images=(write_photos_and_index(tmp_path),), split="test", out="out")
    with pytest.raises(NoInputError, match="has no photo of the split test"):
        next(look(config, {}))


def test_photos_that_may_be_listed_but_not_read_are_told_before_a_plan_is_written(
    s3: S3Server, aws: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        open_storage(f"s3://{aws}/raw").write(f"{number}.jpg", _good_photo())

    def forbid(method: str, path: str, _: int) -> str:
        return "denied" if method == "GET" and "/raw/" in path else ""

    with trouble_before(s3.endpoint, forbid) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(AccessDeniedError, match="listed but not read"):
            next(look(ScoreConfig(package="model", images=(f"s3://{aws}/raw",), out="out"), {}))


def test_a_dry_run_says_how_long_it_would_take_and_writes_nothing(cluster: Cluster, scorable: str) -> None:
    asked = [*score_arguments(scorable, "dry"), "--workers", "1", "--dry-run"]
    ended, printed = cluster.run_each(
        "score", [*asked, "--cost-per-hour", "3600"], [*asked, "--previous", f"{scorable}/calm"]
    )
    assert [end["exit_code"] for end in ended] == [0, 0], printed
    assert f"{SCORED} photos, " in printed
    seconds = float(ended[0]["said"].split("would take about ")[1].split(" s")[0])
    cost = float(ended[0]["said"].split("and cost ")[1].split(",")[0])
    assert cost == pytest.approx(seconds, abs=0.6)
    assert "nothing is left to score" in ended[1]["said"]
    assert list(open_storage(f"{scorable}/dry").list()) == []


def test_a_folder_that_has_grown_costs_what_is_new(cluster: Cluster, scorable: str) -> None:
    first = _rows(f"{scorable}/calm")
    errors = sum(row["status"] == "error" for row in first.values())
    open_storage(f"{scorable}/more").write("plum/new one.jpg", _good_photo())
    arguments = [*score_arguments(scorable, "grown"), "--images", f"{scorable}/raw", f"{scorable}/more"]
    arguments += ["--workers", "1", "--previous", f"{scorable}/calm"]
    other = [*arguments, "--out", f"{scorable}/other", "--top-k", "1"]
    (ended, refused), printed = cluster.run_each("score", [*arguments, "--retry-errors"], other)
    assert ended["exit_code"] == 0, printed
    assert f"{SCORED - errors} of {SCORED + 1} rows are taken from {scorable}/calm" in printed
    second = _rows(f"{scorable}/grown")
    assert second.pop(f"{scorable}/more/plum/new one.jpg")["status"] == "ok"
    assert second == first
    assert (refused["exit_code"], "--previous" in refused["said"], "top_k" in refused["said"]) == (2, True, True)
    assert "Traceback" not in printed
    assert not open_storage(f"{scorable}/other").exists(PLAN)


def _good_photo() -> bytes:
    return next(data for data in sixty().values() if _decodes(data))


def _decodes(data: bytes) -> bool:
    try:
        return decode(data).width > 0
    except ImageError:
        return False


def test_a_list_is_scored_into_folders_with_embeddings(cluster: Cluster, scorable: str) -> None:
    raw = open_storage(f"{scorable}/raw")
    keys = sorted(entry.key for entry in raw.list())[::24]
    said = dict(zip([*keys, "gone.jpg"], itertools.cycle(["tomato", "plum"]), strict=False))
    lines = ["uri,label", *(f'"{raw.uri}/{key}",{label}' for key, label in said.items())]
    open_storage(f"{scorable}/lists").write("some.csv", "\n".join(lines).encode())
    places = ["--package", f"{scorable}/model", "--images", f"{scorable}/lists/some.csv", "--out", f"{scorable}/few"]
    code, printed = cluster.run("score", *places, "--workers", "1", "--partition-by", "folder", "--embeddings")
    assert code == 0, printed
    rows, parts = _rows(f"{scorable}/few"), verify(open_storage(f"{scorable}/few"))
    assert sorted(rows) == sorted(f"{raw.uri}/{key}" for key in said)
    assert rows[f"{raw.uri}/gone.jpg"]["error_code"] == "E_SRC_GONE"
    assert {len(row["embedding"]) for row in rows.values() if row["status"] == "ok"} == {512}
    assert {part.key.split("/")[1] for part in parts} == {"folder=tomato", "folder=plum"}
    [counted] = [part.confusion for part in parts if part.confusion]
    tomatoes = [key for key, label in said.items() if label == "tomato"]
    good = sum(rows[f"{raw.uri}/{key}"]["status"] == "ok" for key in tomatoes)
    assert {label: sum(row.values()) for label, row in counted.items()} == {"tomato": good}


def test_every_kind_of_bad_file_has_its_row_and_harms_no_other(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    photos = [data for data in sixty().values() if _decodes(data)]
    good = {f"22/{number:04d}.jpg": photos[number % len(photos)] for number in range(1000)}
    fill(root)
    (root / "22").mkdir()
    for key, data in good.items():
        (root / key).write_bytes(data)
    save_untrained(str(tmp_path / "model"))
    fixed = ["--package", str(tmp_path / "model"), "--engine", "eager", "--full-precision", "--shard-rows", "100"]
    job = cluster.start("score", *fixed, "--images", str(root), "--out", str(tmp_path / "out"))
    wait_for((tmp_path / "out" / PLAN).exists, job)
    (root / "17/deleted.jpg").unlink()  # the workers have yet to start
    (root / "17/replaced.jpg").write_bytes(photos[0])
    code, printed = end_of(job)
    assert code == 0, printed
    assert f"hidden files skipped: {len(HIDDEN)}" in printed
    rows = {uri.removeprefix(f"{root}/"): row for uri, row in _rows(str(tmp_path / "out")).items()}
    assert sorted(rows) == sorted([*FILES, *NEVER_OPENED, *good])
    wanted = {key: case if isinstance(case, str) else None for key, (_, case) in FILES.items()} | NEVER_OPENED
    del wanted["21/secret.jpg"]  # root may read it
    assert {key: rows[key]["error_code"] for key in wanted} == wanted
    predictor = Predictor(load_package(str(tmp_path / "model")), gpu=False, full_precision=True, batch_size=3)
    alone = dict(zip(photos, predictor.predict(photos), strict=True))
    for key, data in good.items():
        assert (rows[key]["label"], rows[key]["status"]) == (alone[data].label, "ok")
        assert rows[key]["top_scores"] == pytest.approx(alone[data].top_scores, abs=1e-5)


def _written(uri: str) -> list[tuple[str, datetime]]:
    """Every object and when it was written: equal bytes written again have the same etag, but not the same time."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [(item["Key"], item["LastModified"]) for page in pages for item in page["Contents"]]


def test_a_finished_job_run_again_writes_nothing(scorable: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, arguments = _written(f"{scorable}/calm"), score_arguments(scorable, "calm")
    assert run_job("score", arguments) == 0
    assert "complete already" in capsys.readouterr().out
    assert run_job("score", [*arguments, "--max-error-rate", "0.001"]) == 4
    assert "more than the 0.1% allowed" in capsys.readouterr().err
    assert _written(f"{scorable}/calm") == before
    assert run_job("score", [*arguments, "--top-k", "1"]) == 5
    assert "top_k" in capsys.readouterr().err


def test_a_store_that_ignores_if_none_match_gets_a_warning_and_a_verified_output(
    cluster: Cluster, weak_aws: str, weak_s3: S3Server
) -> None:
    root = f"s3://{weak_aws}"
    save_untrained(f"{root}/model")
    for number in range(7):
        open_storage(f"{root}/raw").write(f"{number}.jpg", _good_photo())
    own = weak_s3.environment | {"RAY_ADDRESS": "local", "RAY_TMPDIR": cluster.environment["FRUITRAY_CACHE"] + "-ray"}
    code, printed = cluster.run("score", *score_arguments(root, "scores"), **own)
    assert code == 0, printed
    assert "ignores If-None-Match" in printed
    assert len(verify(open_storage(f"{root}/scores"))) == 4
