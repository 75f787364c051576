"""A real Ray cluster for the tests, as a person starts one (`ray start --head`), and jobs run on it as processes."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from fruitray.s3server import HOST, find_binary, free_ports

ROOT = Path(__file__).resolve().parents[1]
READY_WITHIN_S = 60


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running head node. `environment` leads a process to it, with the token and the cluster's storage."""

    environment: dict[str, str]
    dashboard: str

    def start(self, job: str, *arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
        """`python -m jobs.JOB arguments` in `folder`, as a driver of its own session."""
        return self._start(["-m", f"jobs.{job}", *arguments], folder, environment)

    def start_apart(self, job: str, *arguments: str, cpus: int) -> subprocess.Popen[str]:
        """As `start`, on a Ray of its own with so many CPUs, which finds the same storage."""
        scratch = Path(self.environment["FRUITRAY_CACHE"]).parent / secrets.token_hex(2)
        return self._start(["-c", _APART, str(cpus), str(scratch), job, *arguments], ROOT, {"RAY_ADDRESS": "local"})

    def _start(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=self.environment | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self, word: str) -> list[psutil.Process]:
        """Those with `word` in their command, of this cluster alone: other clusters may run on this machine."""
        token = self.environment["RAY_AUTH_TOKEN_PATH"]
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if word in "".join(process.cmdline()) and process.environ().get("RAY_AUTH_TOKEN_PATH") == token:
                    found.append(process)
        return found

    def run(self, job: str, *arguments: str, folder: Path = ROOT, **environment: str) -> tuple[int, str]:
        """(exit code, all it printed) of a job."""
        process = self.start(job, *arguments, folder=folder, **environment)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed


_APART = (
    "import ray, sys; from fruitray.cli import run_job; "
    "ray.init(address='local', num_cpus=int(sys.argv[1]), object_store_memory=500_000_000, _temp_dir=sys.argv[2]); "
    "sys.exit(run_job(sys.argv[3], sys.argv[4:]))"
)


@contextmanager
def ray_head(folder: Path, storage: Mapping[str, str], cpus: int = 2) -> Iterator[Cluster]:
    """A head node; its files lie in `folder`, whose path must be short."""
    gcs, dashboard, *agents = free_ports(10)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    environment |= {
        **storage,
        "FRUITRAY_CACHE": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export", "node-manager")
    ports = [f"--{name}-port={port}" for name, port in zip((*names, "object-manager"), agents, strict=False)]
    command = [find_binary("ray") or "ray", "start", "--head", "--block", f"--port={gcs}", f"--num-cpus={cpus}"]
    command += [f"--node-ip-address={HOST}", f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}", *ports]
    command += ["--object-store-memory=500000000", f"--temp-dir={folder / 'ray'}"]
    with _daemon(command, environment, folder) as head:
        there = environment | {"RAY_ADDRESS": f"{HOST}:{gcs}"}
        cluster = Cluster(there, f"http://{HOST}:{dashboard}")
        _wait_until_ready(folder, cluster, head)
        yield cluster


@contextmanager
def ray_node(folder: Path, cluster: Cluster, cpus: int = 2) -> Iterator[psutil.Process]:
    """Another node of `cluster`, with files in `folder`; yields its raylet."""
    before = {process.pid for process in cluster.processes("/raylet/raylet")}
    command = [find_binary("ray") or "ray", "start", "--block", f"--address={cluster.environment['RAY_ADDRESS']}"]
    command += [f"--num-cpus={cpus}", f"--node-ip-address={HOST}", "--object-store-memory=500000000"]
    with _daemon(command, cluster.environment, folder):
        deadline = time.monotonic() + READY_WITHIN_S
        while not (there := [one for one in cluster.processes("/raylet/raylet") if one.pid not in before]):
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield there[0]


class Nodes:
    """A head without CPUs, and a node that works, and can be replaced."""

    def __init__(self, cluster: Cluster, stack: ExitStack, folder: Path) -> None:
        self.cluster, self._stack, self._folder = cluster, stack, folder
        self.raylet = self.add()

    def add(self) -> psutil.Process:
        return self._stack.enter_context(ray_node(self._folder, self.cluster))

    def replace(self) -> None:
        self.raylet.kill()
        self.raylet = self.add()


@contextmanager
def _daemon(command: list[str], environment: Mapping[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end, with all that it started."""
    with (folder / "log").open("ab") as log:
        daemon = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield daemon
    finally:
        with suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        daemon.wait()


def _wait_until_ready(folder: Path, cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    check = [find_binary("ray") or "ray", "job", "list"]  # the dashboard, which takes jobs, is up last
    environment = cluster.environment | {"RAY_ADDRESS": cluster.dashboard}
    while head.poll() is None and time.monotonic() < deadline:
        if subprocess.run(check, env=environment, capture_output=True).returncode == 0:
            return
        time.sleep(0.5)
    raise RuntimeError(f"ray did not start: {(folder / 'log').read_text()[-2000:]}")
