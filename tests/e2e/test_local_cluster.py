"""`infra/local/start.sh`: a cluster that lets in who has its token, and nobody else."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import boto3
import psutil
import pytest

from fruitray.commit import verify
from fruitray.s3server import HOST, free_ports
from fruitray.storage import open_storage
from tests.cluster import PATIENCE_S, ROOT, submit, wait_for
from tests.integration.conftest import SCORED, fill_scorable, score_arguments

GCS, DASHBOARD, S3 = 0, 1, 5
"""Places in a block of ports."""


def _free_block(size: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        first = 20_000 + secrets.randbelow(8_000)
        with socket.socket() as probe:
            try:
                for port in range(first, first + size):
                    with socket.socket() as probe:
                        probe.bind((HOST, port))
                return first
            except OSError:
                continue


@contextmanager
def _started(folder: Path, ports: int) -> Iterator[dict[str, str]]:
    """The environment that the script offers, while it runs; at the end Ctrl-C, after which nothing may be left."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    clean |= {"AWS_PROFILE": "theirs", "AWS_SESSION_TOKEN": "theirs", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    clean |= {"GCS_PORT": str(ports + GCS), "DASHBOARD_PORT": str(ports + DASHBOARD), "S3_PORT": str(ports + S3)}
    script = subprocess.Popen(
        [ROOT / "infra/local/start.sh", folder],
        env=clean | {"START_TEST": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert script.stdout is not None
    try:
        said = script.stdout.readline()
        assert "ready" in said, said + script.stdout.read()
        enter = said.partition("another terminal: ")[2].strip()
        shown = subprocess.run(["bash", "-c", f"{enter}; env -0"], env=clean, capture_output=True)
        yield dict(line.split("=", 1) for line in shown.stdout.decode().split("\0") if line)
    finally:
        os.killpg(script.pid, signal.SIGINT)
        script.wait(timeout=PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S  # the dashboard's helpers end when they notice that it has
        while left := _left(folder):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


def _left(folder: Path) -> list[str]:
    """Commands of processes that the script started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("START_TEST") == str(folder):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """(the script's folder, the environment that it offers)"""
    folder, ports = tmp_path_factory.mktemp("local") / "my cluster", _free_block(S3 + 8)
    with _started(folder, ports) as environment, pytest.MonkeyPatch.context() as here:
        _lead_to(environment, here)
        open_storage("s3://fruit").write("before", b"a restart")
    with _started(folder, ports) as environment:
        yield folder, environment


def _lead_to(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    gcs, dashboard = map(str, free_ports(2))
    with socket.create_server((HOST, 0)) as server:
        port = str(server.getsockname()[1])
        there = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        there |= {"GCS_PORT": gcs, "DASHBOARD_PORT": dashboard, "S3_PORT": port}
        script = [ROOT / "infra/local/start.sh", tmp_path / "cluster"]
        tried = subprocess.run(script, env=there, capture_output=True, text=True)
    assert tried.returncode == 1
    assert f"port {port} is taken" in tried.stderr
    assert not (tmp_path / "cluster").exists()


def test_what_was_stored_is_there_after_a_restart(
    started: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, environment = started
    _lead_to(environment, monkeypatch)
    assert open_storage("s3://fruit").read("before") == b"a restart"


def test_secrets_are_for_their_owner_alone(started: tuple[Path, dict[str, str]]) -> None:
    folder, _ = started
    for name in ("token", "keys", "s3.json", "environment", "s3"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name


def test_dashboard_and_photos_are_served_on_loopback_alone(started: tuple[Path, dict[str, str]]) -> None:
    _, environment = started
    for name in ("RAY_API_SERVER_ADDRESS", "AWS_ENDPOINT_URL"):
        port = int(environment[name].rsplit(":", 1)[1])
        there = [
            one.laddr.ip for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port
        ]
        assert set(there) == {HOST}, name


def test_who_has_no_token_is_refused(started: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    _, environment = started
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        request = urllib.request.Request(f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=headers)
        with pytest.raises(HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code in (401, 403)
    stranger = {
        name: value for name, value in environment.items() if name not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    }
    stranger |= {"HOME": str(tmp_path)}  # where Ray looks for a token, too
    code = "import ray, sys; ray.init(log_to_driver=False); print('in', ray.get(ray.remote(lambda: 1).remote()))"
    tried = subprocess.run(
        [sys.executable, "-c", code], env=stranger, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert tried.returncode != 0
    assert "in 1" not in tried.stdout


def test_to_join_a_cluster_a_job_needs_its_token_and_no_setting(started: tuple[Path, dict[str, str]]) -> None:
    _, environment = started
    code = "from fruitray.cluster import connection; import ray; connection.connect(); "
    code += "print('asks:', connection.asks_for_token(ray.get_runtime_context().gcs_address))"
    kept = {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}
    joined = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=PATIENCE_S)
    assert "asks: True" in joined.stdout, joined.stderr


_STOP = """
import time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient()
input()
client.stop_job("first")
while not client.get_job_status("first").is_terminal():
    time.sleep(0.1)
"""
"""What `ray job stop first` does, for one that has started when it is asked: that takes as long as the job may."""


def test_a_submitted_job_that_is_stopped_goes_on_when_submitted_again(
    started: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, environment = started
    _lead_to(environment, monkeypatch)
    root = "s3://fruit"
    fill_scorable(root)
    arguments = [*score_arguments(root, "scores"), "--workers", "1"]
    out, job = open_storage(f"{root}/scores"), ["--", "python", "-m", "jobs.score", *arguments]
    code, said = submit(environment, "--no-wait", "--submission-id", "first", *job)
    assert code == 0, said
    with subprocess.Popen([sys.executable, "-c", _STOP], env=environment, stdin=subprocess.PIPE) as stop:
        wait_for(lambda: any(out.list("data/")))
        stop.communicate(b"now", timeout=PATIENCE_S)
    assert stop.returncode == 0
    told = json.loads(out.read("status.json"))
    assert (told["state"], told["exit_code"], told["progress"]["total"]) == ("interrupted", 130, SCORED)
    assert not out.exists("_SUCCESS")
    code, said = submit(environment, *job)
    assert (code, "were committed before" in said) == (0, True), said
    assert len(verify(out)) == SCORED // 2
    assert json.loads(out.read("status.json"))["state"] == "succeeded"
