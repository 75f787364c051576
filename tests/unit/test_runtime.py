"""What jobs ask of a cluster before they give it work."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from fruitray.cluster import runtime
from fruitray.cluster.placement import GROWS, require_room
from fruitray.cluster.runtime import OPEN, claim, keep_token_private, left_behind, require_answer, require_token
from fruitray.config import TrainConfig
from fruitray.errors import OutputConflictError, TryAgainError, UsageError
from fruitray.storage import LocalStorage


def test_several_nodes_without_a_token_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (OPEN, GROWS):
        monkeypatch.delenv(name, raising=False)
    require_token(1, asks=False)
    require_token(2, asks=True)
    with pytest.raises(UsageError, match=f"RAY_AUTH_MODE=token.*{OPEN}=1"):
        require_token(2, asks=False)
    monkeypatch.setenv(GROWS, "1")
    with pytest.raises(UsageError, match="asks for no token"):
        require_token(1, asks=False)
    monkeypatch.setenv(OPEN, "1")
    require_token(2, asks=False)


def test_a_cluster_that_ended_without_a_word_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(runtime, "find_bootstrap_address", lambda _: address)
        assert left_behind() == ""
    assert left_behind() == address
    monkeypatch.setattr(runtime, "find_bootstrap_address", lambda _: None)
    assert left_behind() == ""


def test_a_token_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token := tmp_path / "ray" / "token"))
    keep_token_private()
    assert (token.stat().st_mode & 0o777, len(made := token.read_text())) == (0o600, 64)
    token.chmod(0o644)
    keep_token_private()
    assert (token.stat().st_mode & 0o777, token.read_text()) == (0o600, made)


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [("ray://head:10001", UsageError, "ray job submit"), ("127.0.0.1:1", TryAgainError, "nothing answers")],
)
def test_a_cluster_that_cannot_be_led_is_told_at_once(address: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        require_answer(address)


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
