"""What jobs ask of a cluster before they give it work."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from fruitray.cluster.placement import GROWS, require_room
from fruitray.cluster.runtime import claim, open_output, require_ours
from fruitray.config import TrainConfig, TuneConfig
from fruitray.errors import OutputConflictError, UsageError
from fruitray.storage import LocalStorage


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
