"""What jobs ask of a cluster before they give it work."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray
from pyarrow.fs import FileSystem

from fruitray.cluster import prepare
from fruitray.cluster.placement import GROWS, require_room
from fruitray.cluster.runtime import claim, open_output, place_for_ray, require_ours
from fruitray.config import PrepareConfig, TrainConfig, TuneConfig
from fruitray.errors import OutputConflictError, UsageError
from fruitray.s3 import endpoint
from fruitray.storage import LocalStorage, open_storage


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of four: a head without CPUs, two nodes with 4 CPUs and a GPU, and one that is gone."""
    worker = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
    there = [{"Alive": True, "Resources": {"memory": 1.0}}, worker, worker, worker | {"Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    monkeypatch.delenv(GROWS, raising=False)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(
    ("cpus", "gpus", "room"), [(1, 0, 8), (3, 0, 2), (5, 0, 0), (1, 0.5, 4), (1, 1, 2), (4, 0.1, 2), (0, 1, 2)]
)
def test_workers_that_never_had_room_are_refused_unless_nodes_come(
    cpus: float, gpus: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_room(room, cpus=cpus, gpus=gpus)
    with pytest.raises(UsageError, match=f"{room + 1} workers are wanted.* have room for {room};"):
        require_room(room + 1, cpus=cpus, gpus=gpus)
    monkeypatch.setenv(GROWS, "1")
    require_room(room + 1, cpus=cpus, gpus=gpus)


def test_an_output_is_refused_to_another_job_with_other_options(tmp_path: Path) -> None:
    out, config = LocalStorage(str(tmp_path)), TrainConfig(index="i", out=str(tmp_path))
    claim(out, "train", config, "a")
    claim(out, "train", replace(config, workers=2), "a")
    with pytest.raises(OutputConflictError, match="seed 0, not 1"):
        claim(out, "train", replace(config, fit=replace(config.fit, seed=1)), "a")
    with pytest.raises(OutputConflictError, match="index_sha256"):
        claim(out, "train", config, "b")


@pytest.mark.parametrize("saved", [b"[1]", b"{", b"7", b"\xff"])
def test_a_file_of_that_name_that_is_not_ours_is_told(tmp_path: Path, saved: bytes) -> None:
    (tmp_path / "train.json").write_bytes(saved)
    with pytest.raises(OutputConflictError, match="not what fruitray writes"):
        claim(LocalStorage(str(tmp_path)), "train", TrainConfig(index="i", out=str(tmp_path)), "a")


def test_an_output_may_not_lie_inside_the_photos_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for out, images in (("photos/index", "link"), ("link/index", "photos"), ("link", "photos")):
        with pytest.raises(UsageError, match="must not lie inside"):
            open_output(str(tmp_path / out), LocalStorage(str(tmp_path / images)))
    with pytest.raises(UsageError, match="must not lie inside"):
        open_output(str(tmp_path), LocalStorage("/"))
    open_output(str(tmp_path / "photos-index"), LocalStorage(str(tmp_path / "photos")))


def test_one_folder_holds_the_output_of_one_job(tmp_path: Path) -> None:
    out = LocalStorage(str(tmp_path))
    claim(out, "train", TrainConfig(index="i", out=str(tmp_path)), "a")
    with pytest.raises(OutputConflictError, match=r"train\.json: is another job's"):
        require_ours(out, "tune", TuneConfig(index="i", out=str(tmp_path)), "a")


@pytest.mark.parametrize("name", ["a b", "Äpfel", "run#1", "why?", "a%20b", "[x]", "a+b", "a&b=c", "~x"])
def test_ray_keeps_its_own_below_the_same_name_as_we_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _, path = FileSystem.from_uri(place_for_ray(open_storage(f"s3://bucket/{name}/tune")))
    assert path == f"bucket/{name}/tune/_ray"


def test_an_endpoint_that_only_a_profile_names_is_told_and_refused_where_ray_would_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://127.0.0.1:9\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    out = open_storage("s3://bucket/tune")
    assert endpoint() == "http://127.0.0.1:9"
    with pytest.raises(UsageError, match="set AWS_ENDPOINT_URL"):
        place_for_ray(out)
    assert place_for_ray(LocalStorage(str(tmp_path))) == f"{tmp_path}/_ray"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert place_for_ray(out) == "s3://bucket/tune/_ray"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (tmp_path / "config").write_text("")
    assert (endpoint(), place_for_ray(out)) == ("AWS", "s3://bucket/tune/_ray")


@pytest.mark.parametrize(("probe", "gpu", "gpus"), [("resnet50", True, 1), ("resnet50", False, 0), (None, True, 0)])
def test_a_probe_on_gpus_is_asked_for_before_photos_are_read(
    probe: str | None, gpu: bool, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/photo.jpg").write_bytes(b"not read")
    monkeypatch.setattr(prepare, "preflight", lambda *_, gpus, **__: f"asked for {gpus}")
    config = PrepareConfig(images=f"{tmp_path}/images", out=f"{tmp_path}/out", dry_run=True, probe=probe, gpu=gpu)
    assert prepare.run(config) == f"asked for {gpus}"
