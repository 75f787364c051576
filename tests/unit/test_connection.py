"""Where a cluster is, who may join it, and what is said where none can be had."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from fruitray.cluster import connection
from fruitray.cluster.connection import OPEN, keep_token_private, left_behind, require_answer, require_token
from fruitray.cluster.placement import GROWS
from fruitray.errors import TryAgainError, UsageError


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
        monkeypatch.setattr(connection, "find_bootstrap_address", lambda _: address)
        assert left_behind() == ""
    assert left_behind() == address
    monkeypatch.setattr(connection, "find_bootstrap_address", lambda _: None)
    assert left_behind() == ""


def test_a_token_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token := tmp_path / "ray" / "token"))
    keep_token_private()
    assert (token.stat().st_mode & 0o777, len(made := token.read_text())) == (0o600, 64)
    token.chmod(0o644)
    keep_token_private()
    assert (token.stat().st_mode & 0o777, token.read_text()) == (0o600, made)


@pytest.mark.parametrize("imports", ["import ray, fruitray.cluster", "import fruitray.cluster, ray"])
def test_where_there_is_a_token_ray_starts_whatever_was_imported_first(imports: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(64 * "a")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="fr-", ignore_cleanup_errors=True) as scratch:  # sockets need a short path
        init = (
            f"ray.init('local', num_cpus=1, object_store_memory=10**8, include_dashboard=False, _temp_dir='{scratch}')"
        )
        done = subprocess.run(
            [sys.executable, "-c", f"{imports}; {init}; print(ray.get(ray.put('started')))"],
            env=environment | {"RAY_AUTH_TOKEN_PATH": str(token)},
            capture_output=True,
            text=True,
        )
    assert done.stdout.strip() == "started", done.stderr


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("ray://head:10001", UsageError, "ray job submit"),
        ("http://127.0.0.1:8265", UsageError, "HOST:PORT of the head"),
        ("head", UsageError, "must be HOST:PORT"),
        ("127.0.0.1:1", TryAgainError, "nothing answers"),
        ("[::1]:1", TryAgainError, "nothing answers"),
    ],
)
def test_a_cluster_that_cannot_be_led_is_told_at_once(address: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        require_answer(address)


def test_what_ray_says_of_a_cluster_that_it_cannot_start_or_join_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Exception("The current node\ntimed out during startup.")  # as Ray does

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "find_bootstrap_address", lambda _: None)
    monkeypatch.setattr(connection, "keep_token_private", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(TryAgainError, match="not be started on this machine: The current node timed out"):
        connection.connect()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", address := f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(TryAgainError, match=f"not be joined at RAY_ADDRESS={address}: The current node timed out"):
            connection.connect()
