"""Behaviour of `prepare` on a real Ray, over folders and a real S3 server."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
import ray

from fruitray.cli import run_job
from fruitray.cluster.prepare import _finish, _list
from fruitray.config import PrepareConfig
from fruitray.errors import TryAgainError
from fruitray.index import Index
from fruitray.synthetic import LABELS, photo_set
from tests.cluster import Cluster, end_of
from tests.unit.photos import sixty

PHOTOS = sixty()
"""60 drawn photos, two of them corrupt."""


def write(root: Path, photos: dict[str, bytes]) -> None:
    for key, data in photos.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)


def index(out: Path) -> pa.Table:
    return pq.read_table(out / "index.parquet")


def prepare(cluster: Cluster, images: Path | str, out: Path | str, *options: str) -> str:
    """What a successful prepare prints."""
    code, printed = cluster.run("prepare", "--images", str(images), "--out", str(out), *options)
    assert code == 0, printed
    return printed


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write(tmp_path / "raw", PHOTOS)
    return tmp_path / "raw"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """A folder with `PHOTOS` below raw/ and their index below index/; both stay as they are."""
    folder = tmp_path_factory.mktemp("prepared")
    write(folder / "raw", PHOTOS)
    prepare(cluster, folder / "raw", folder / "index")
    return folder


@pytest.mark.chaos
def test_one_worker_and_four_write_the_same_index(raw: Path, tmp_path: Path, cluster: Cluster) -> None:
    """Of so many photos that there are several tasks."""
    write(raw, photo_set(120))
    written = []
    for cpus in (1, 4):
        out = tmp_path / str(cpus)
        job = cluster.start_apart("prepare", "--images", str(raw), "--out", str(out), cpus=cpus)
        code, printed = end_of(job)
        assert code == 0, printed
        written.append((out / "index.parquet").read_bytes())
    assert written[0] == written[1]


def test_a_bucket_gets_the_index_of_the_folder(prepared: Path, drawn: tuple[dict[str, bytes], Index]) -> None:
    photos, of_bucket = drawn
    assert photos == PHOTOS
    folder, bucket = (table.drop_columns(["uri", "etag"]) for table in (index(prepared / "index"), of_bucket.table))
    assert folder.equals(bucket)


def test_a_grown_folder_keeps_every_split_and_reads_new_files_only(raw: Path, tmp_path: Path, cluster: Cluster) -> None:
    out = tmp_path / "index"
    prepare(cluster, raw, out, "--folds", "3")
    before = index(out)
    for path in sorted(raw.rglob("*.*")):  # what is read again would now be an error
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    write(raw, {f"{key}.new": data for key, data in photo_set(8, seed=1).items()})
    printed = prepare(cluster, raw, out, "--folds", "3")
    after = index(out)
    new = after.num_rows - before.num_rows
    assert new == 24
    assert f"{after.num_rows} files, {new} read now" in printed
    old = after.filter(pa.array([not uri.endswith(".new") for uri in after["uri"].to_pylist()]))
    assert old.drop_columns(["odd"]).equals(before.drop_columns(["odd"]))
    used = after.filter(pa.compute.is_valid(after["split"]))
    assert used["split"].to_pylist().count("val") == -(-used.num_rows // 5)
    assert "0 read now" in prepare(cluster, raw, out, "--folds", "3")
    assert index(out).equals(after)


def test_requests_that_make_no_sense_fail_before_a_photo_is_read(raw: Path, tmp_path: Path, cluster: Cluster) -> None:
    asked = {
        ("--previous", "nowhere"): (6, "nowhere/index.parquet"),
        ("--probe", "efficientnet_b99"): (2, "efficientnet_b99"),
        ("--probe", "mobilenet_v2", "--weights", "nowhere"): (6, "nowhere/mobilenet_v2.safetensors"),
    }
    places = ("--images", str(raw), "--out", str(tmp_path / "index"))
    ended, printed = cluster.run_each("prepare", *([*places, *options] for options in asked))
    for end, (exit_code, said) in zip(ended, asked.values(), strict=True):
        assert (end["exit_code"], said in end["said"]) == (exit_code, True), end
    assert "photos/s" not in printed
    assert not (tmp_path / "index").exists()


def test_a_class_of_unreadable_photos_is_refused_and_the_audit_kept(
    raw: Path, tmp_path: Path, cluster: Cluster
) -> None:
    write(raw, {f"kiwi/{number}.jpg": b"no photo" for number in range(3)})
    victim = next(key for key in sorted(PHOTOS) if key.startswith(LABELS[0]))
    shutil.copy(raw / victim, raw / LABELS[1] / "wrong.jpg")
    code, printed = cluster.run("prepare", "--images", str(raw), "--out", str(tmp_path / "index"))
    assert (code, "kiwi: 0 train + 0 val, 3 not usable" in printed, "E_NOT_IMAGE" in printed) == (2, True, True)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["audit.json", "status.json"]
    audit = json.loads((tmp_path / "index" / "audit.json").read_text())
    assert {Path(row["uri"]).name for row in audit["conflicts"]} == {Path(victim).name, "wrong.jpg"}
    for said in ("2 left out as they lie in two classes", "groups of duplicates", "photos by size"):
        assert said in printed
    told = json.loads((tmp_path / "index" / "status.json").read_text())
    assert (told["job"], told["state"], told["exit_code"]) == ("prepare", "failed", 2)
    assert told["said"] in printed


def test_an_earlier_index_elsewhere_spares_the_reading_and_what_another_has_written_stays(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda tables: tables)
    out = tmp_path / "index"
    config = PrepareConfig(images=str(prepared / "raw"), out=str(out))
    before, known, counts = _list(replace(config, previous=str(prepared / "index")))
    assert counts["read"] == 0
    _finish(config, before, [known], counts)
    assert index(out).equals(index(prepared / "index"))
    (out / "index.parquet").write_bytes(b"another's")
    with pytest.raises(TryAgainError, match="another prepare"):
        _finish(config, before, [known], counts)
    assert (out / "index.parquet").read_bytes() == b"another's"
    shutil.copy(prepared / "index" / "index.parquet", out)
    _finish(config, before, [known], counts)  # as when its worker died after it had written


def test_other_rules_are_refused_where_an_index_stands(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("--images", str(prepared / "raw"), "--out", str(prepared / "index"))
    assert run_job("prepare", [*places, "--size", "majority"]) == 5
    assert "size 'any', not 'majority'" in capsys.readouterr().err


@pytest.mark.chaos
def test_flipped_labels_of_real_photos_are_among_the_first_suspects(
    tmp_path: Path, cluster: Cluster, shared_data: Path, shared_weights: Path
) -> None:
    """Of the 2% that are flipped, 80% at least stand in the first 4%, beside the set's own wrong labels."""
    draw = random.Random(0)
    files = draw.sample(sorted((shared_data / "vuw-fruit").rglob("*.jpg")), 1500)
    flipped = set(draw.sample(files, len(files) // 50))
    names = sorted({file.parent.name for file in files})
    for file in files:
        others = [name for name in names if name != file.parent.name]
        label = others[len(file.name) % 2] if file in flipped else file.parent.name
        (tmp_path / "raw" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "raw" / label)
    probe = ("--probe", "timm/tf_efficientnetv2_b0", "--weights", str(shared_weights))
    prepare(cluster, tmp_path / "raw", tmp_path / "index", *probe)
    first = pq.read_table(tmp_path / "index" / "suspects.parquet")["uri"].to_pylist()[: 2 * len(flipped)]
    found = {Path(uri).name for uri in first} & {file.name for file in flipped}
    assert len(found) >= 0.8 * len(flipped)


@pytest.mark.chaos
def test_all_real_photos_are_indexed(tmp_path: Path, cluster: Cluster, shared_data: Path) -> None:
    """Their numbers are told by `tests/unit/test_split.py`."""
    printed = prepare(cluster, shared_data / "vuw-fruit", tmp_path / "index", "--size", "300x300")
    for said in ("4,500 files", "300x300", "groups of duplicates"):
        assert said in printed
