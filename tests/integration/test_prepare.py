"""Behaviour of `prepare` on a real Ray, over folders and a real S3 server."""

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from fruitray.cluster.prepare import _finish, _list
from fruitray.config import PrepareConfig
from fruitray.errors import TryAgainError
from fruitray.storage import open_storage
from fruitray.synthetic import LABELS, photo_set
from tests.cluster import Cluster, end_of

PHOTOS = photo_set(30)
"""90 drawn photos, two of them corrupt."""


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


def test_a_bucket_gets_the_index_of_the_folder(prepared: Path, tmp_path: Path, cluster: Cluster, aws: str) -> None:
    bucket = open_storage(f"s3://{aws}/raw")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: bucket.write(*item), PHOTOS.items()))
    prepare(cluster, f"s3://{aws}/raw", f"s3://{aws}/index")
    (tmp_path / "index.parquet").write_bytes(open_storage(f"s3://{aws}/index").read("index.parquet"))
    folder, copy = (index(place).drop_columns(["uri", "etag"]) for place in (prepared / "index", tmp_path))
    assert folder.equals(copy)


def test_a_grown_folder_keeps_every_split_and_reads_new_files_only(raw: Path, tmp_path: Path, cluster: Cluster) -> None:
    out = tmp_path / "index"
    prepare(cluster, raw, out, "--folds", "3")
    before = index(out)
    for path in sorted(raw.rglob("*.*")):  # what is read again would now be an error
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    write(raw, {f"{key}.new": data for key, data in photo_set(33).items() if key not in PHOTOS})
    printed = prepare(cluster, raw, out, "--folds", "3")
    after = index(out)
    new = after.num_rows - before.num_rows
    assert 0 < new <= 12
    assert f"{after.num_rows} files, {new} read now" in printed
    old = after.filter(pa.array([not uri.endswith(".new") for uri in after["uri"].to_pylist()]))
    assert old.drop_columns(["odd"]).equals(before.drop_columns(["odd"]))
    used = after.filter(pa.compute.is_valid(after["split"]))
    assert used["split"].to_pylist().count("val") == -(-used.num_rows // 5)
    assert "0 read now" in prepare(cluster, raw, out, "--folds", "3")
    assert index(out).equals(after)


@pytest.mark.parametrize(
    ("options", "exit_code", "said"),
    [
        (("--previous", "nowhere"), 6, "nowhere/index.parquet"),
        (("--probe", "efficientnet_b99"), 2, "efficientnet_b99"),
        (("--probe", "mobilenet_v2", "--weights", "nowhere"), 6, "nowhere/mobilenet_v2.safetensors"),
    ],
)
def test_a_request_that_makes_no_sense_fails_before_a_photo_is_read(
    raw: Path, tmp_path: Path, cluster: Cluster, options: tuple[str, ...], exit_code: int, said: str
) -> None:
    code, printed = cluster.run("prepare", "--images", str(raw), "--out", str(tmp_path / "index"), *options)
    assert (code, said in printed, "photos/s" in printed) == (exit_code, True, False), printed
    assert not (tmp_path / "index").exists()


def test_a_class_of_unreadable_photos_is_refused_and_the_audit_kept(
    raw: Path, tmp_path: Path, cluster: Cluster
) -> None:
    write(raw, {f"kiwi/{number}.jpg": b"no photo" for number in range(3)})
    code, printed = cluster.run("prepare", "--images", str(raw), "--out", str(tmp_path / "index"))
    assert (code, "kiwi: 0 train + 0 val, 3 not usable" in printed, "E_NOT_IMAGE" in printed) == (2, True, True)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["audit.json", "status.json"]
    told = json.loads((tmp_path / "index" / "status.json").read_text())
    assert (told["job"], told["state"], told["exit_code"]) == ("prepare", "failed", 2)
    assert told["said"] in printed


def test_what_another_prepare_has_written_meanwhile_is_not_overwritten(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda tables: tables)
    out = tmp_path / "index"
    config = PrepareConfig(images=str(prepared / "raw"), out=str(out))
    before, known, *_ = _list(replace(config, previous=str(prepared / "index")))
    out.mkdir()
    (out / "index.parquet").write_bytes(b"another's")
    with pytest.raises(TryAgainError, match="another prepare"):
        _finish(config, before, [known], {"read": 0, "skipped_hidden": 0})
    assert (out / "index.parquet").read_bytes() == b"another's"
    shutil.copy(prepared / "index" / "index.parquet", out)
    _finish(config, before, [known], {"read": 0, "skipped_hidden": 0})  # as when its worker died after it had written


def test_an_earlier_index_elsewhere_spares_the_reading(prepared: Path, tmp_path: Path, cluster: Cluster) -> None:
    printed = prepare(cluster, prepared / "raw", tmp_path, "--previous", str(prepared / "index"))
    assert "0 read now" in printed
    assert index(prepared / "index").equals(index(tmp_path))


def test_other_rules_are_refused_where_an_index_stands(prepared: Path, cluster: Cluster) -> None:
    places = ("--images", str(prepared / "raw"), "--out", str(prepared / "index"))
    code, printed = cluster.run("prepare", *places, "--size", "majority")
    assert (code, "size 'any', not 'majority'" in printed) == (5, True)


def test_a_photo_put_into_two_classes_is_left_out_and_listed(raw: Path, tmp_path: Path, cluster: Cluster) -> None:
    victim = next(key for key in sorted(PHOTOS) if key.startswith(LABELS[0]))
    shutil.copy(raw / victim, raw / LABELS[1] / "wrong.jpg")
    printed = prepare(cluster, raw, tmp_path / "index")
    audit = json.loads((tmp_path / "index" / "audit.json").read_text())
    assert {Path(row["uri"]).name for row in audit["conflicts"]} == {Path(victim).name, "wrong.jpg"}
    assert "2 left out as they lie in two classes" in printed


def test_a_probe_ranks_every_label_and_a_policy_is_drawn(
    prepared: Path, tmp_path: Path, cluster: Cluster, weights: Path
) -> None:
    out = tmp_path / "index"
    out.mkdir()
    shutil.copy(prepared / "index" / "index.parquet", out)
    before = (out / "index.parquet").read_bytes()
    probe = ("--probe", "mobilenet_v2", "--weights", str(weights), "--image-size", "64")
    printed = prepare(cluster, prepared / "raw", out, *probe, "--show-augment", "3", "--augment", "report+cutmix")
    assert "the probe agrees with" in printed
    suspects, used = pq.read_table(out / "suspects.parquet"), index(out).filter(pa.compute.field("split").is_valid())
    assert sorted(suspects["uri"].to_pylist()) == used["uri"].to_pylist()
    assert suspects["rank"].to_pylist() == list(range(1, used.num_rows + 1))
    with Image.open(out / "augment.png") as sheet:
        assert sheet.size == (9 * 162, 3 * 162)
    assert (out / "index.parquet").read_bytes() == before


def test_flipped_labels_of_real_photos_are_among_the_first_suspects(
    tmp_path: Path, cluster: Cluster, shared_data: Path, shared_weights: Path
) -> None:
    """Of the 2% that are flipped, 80% at least stand in the first 4%, beside the set's own wrong labels."""
    pytest.importorskip("timm")
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


def test_the_real_photos_are_known(tmp_path: Path, cluster: Cluster, shared_data: Path) -> None:
    """The numbers that the photos' README gives."""
    printed = prepare(cluster, shared_data / "vuw-fruit", tmp_path / "index", "--size", "300x300")
    audit = json.loads((tmp_path / "index" / "audit.json").read_text())
    names = ("cherry", "strawberry", "tomato")
    assert (audit["files"], audit["photos"]) == (4500, 4500)
    assert audit["sizes"][0] == {"size": "300x300", **dict.fromkeys(names, 1480), "all": 4440}
    (size,) = (line for line in audit["odd"] if line["odd"] == "size")
    assert size == {"odd": "size", **dict.fromkeys(names, 20), "all": 60}
    (grey,) = (line for line in audit["modes"] if line["mode"] == "L")
    assert grey["all"] == 1
    (left_out,) = (line for line in audit["excluded"] if line["excluded"] == "size")
    assert left_out["all"] == 60
    used = sum(line["train"] + line["val"] for line in audit["classes"])
    assert used == 4440 - sum(line["all"] for line in audit["excluded"] if line["excluded"] != "size")
    for said in ("4,500 files", "300x300", "groups of duplicates"):
        assert said in printed
