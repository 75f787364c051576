"""Score on two hosts, one of which is unplugged: nothing says good-bye, and nothing that was committed is lost.

The other host is a network namespace, with an address and a loopback of its own; making one takes root and `ip`.
"""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from fruitray.commit import verify
from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from tests.cluster import end_of, ray_head, ray_node, wait_for
from tests.integration.conftest import SCORED, score_arguments
from tests.trouble import trouble_before

pytestmark = pytest.mark.chaos
SOON = {"RAY_health_check_timeout_ms": "1000"}
"""A host that does not answer is given up after seconds, not minutes."""


def _ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode


@pytest.fixture
def cable() -> Iterator[tuple[str, str, str]]:
    """(its end here, the namespace at its other end, the first three numbers of both addresses: 1 here, 2 there)"""
    name = f"fr{secrets.token_hex(3)}"
    here, there, net = f"{name}a", f"{name}b", f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}"
    if shutil.which("ip") is None or os.geteuid() or _ip("netns", "add", name):
        pytest.skip("no network namespace can be made here: it takes root, and `ip`")
    try:
        inside = ("-n", name)
        failed = _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        failed = failed or _ip("addr", "add", f"{net}.1/30", "dev", here) or _ip("link", "set", here, "up")
        failed = failed or _ip(*inside, "addr", "add", f"{net}.2/30", "dev", there)
        failed = failed or _ip(*inside, "link", "set", there, "up") or _ip(*inside, "link", "set", "lo", "up")
        if failed:
            pytest.skip("no cable can be laid between network namespaces here")
        yield here, name, net
    finally:
        _ip("link", "del", here)
        _ip("netns", "del", name)


def test_a_host_that_is_unplugged_costs_no_row(s3: S3Server, scorable: str, cable: tuple[str, str, str]) -> None:
    end, name, net = cable
    out = open_storage(f"{scorable}/unplugged")
    inside = ("ip", "netns", "exec", name)
    with trouble_before(s3.endpoint, lambda *_: "", f"{net}.1") as (endpoint, _):
        storage = s3.environment | SOON | {"AWS_ENDPOINT_URL": endpoint, "NO_PROXY": f"{net}.1", "no_proxy": f"{net}.1"}
        with ray_head(storage, cpus=1, host=f"{net}.1") as head, ray_node(head, 1, host=f"{net}.2", inside=inside):
            job = head.start("score", *score_arguments(scorable, "unplugged"))
            wait_for(lambda: len(head.processes("Scorer")) == 2 and len(list(out.list("data/"))) > 2, job)
            assert _ip("link", "set", end, "down") == 0
            code, printed = end_of(job)
    assert code == 0, printed
    assert sum(part.rows for part in verify(out)) == SCORED
    assert [part.sha256 for part in verify(out)] == [part.sha256 for part in verify(open_storage(f"{scorable}/calm"))]
