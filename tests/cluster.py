"""A real Ray cluster for the tests, as a person starts one (`ray start --head`), and jobs run on it as processes."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fruitray.s3server import HOST, find_binary, free_ports

ROOT = Path(__file__).resolve().parents[1]
RAY = find_binary("ray") or "ray"
PATIENCE_S = 900
"""Longer than anything takes, also where others work beside: what is only slow has not failed."""
QUICKER = {
    "RAY_worker_niceness": "0",  # else a test's workers wait for another test's driver
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_agent_register_timeout_ms": "600000",  # else a node whose agents take 30 s to start, beside others, ends
}
"""What a person's cluster has no need of: here a node's death is noticed sooner, and tests run side by side."""
PORTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
PORTS += ("node-manager", "object-manager")
"""Of a node, which ends where it does not hear within 15 s of its agents', if not given (ray-project/ray#65983)."""

STARTED = "Ray runtime started"
"""What `ray start` prints when the cluster knows the node."""
DRAWING = ("prepare", "tune", "train", "score")
"""Jobs that draw a page at their end."""
SMALL = ("--object-store-memory=500000000", "--include-log-monitor=False")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running head node. `environment` leads a process to it, with the token and the cluster's storage; its files lie
    in `folder`; jobs can be submitted to the address `dashboard`, where it has one."""

    environment: dict[str, str]
    folder: Path
    dashboard: str

    def start(
        self, job: str, *arguments: str, folder: Path = ROOT, page: bool = False, **environment: str
    ) -> subprocess.Popen[str]:
        """`python -m jobs.JOB arguments` in `folder`, a driver of its own session; a `page` takes seconds."""
        quick = ("--no-report",) if job in DRAWING and not page else ()
        return self._start(["-m", f"jobs.{job}", *arguments, *quick], folder, environment)

    def run_each(self, job: str, *runs: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
        """(what each run said at its end, all they printed) of a job, time after time in one process, without pages."""
        code, printed = end_of(
            self.start_program(_EACH, job, json.dumps([[*run, "--no-report", "--json"] for run in runs]))
        )
        assert code == 0, printed
        return [json.loads(line) for line in printed.splitlines() if line.startswith("{")], printed

    def start_program(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """A driver that is no job of ours: `python -c program arguments`."""
        return self._start(["-c", program, *arguments], ROOT, {})

    def start_apart(self, job: str, *arguments: str, cpus: int, **environment: str) -> subprocess.Popen[str]:
        """As `start`, on a Ray of its own with so many CPUs, which finds the same storage unless told otherwise."""
        scratch = self.folder / secrets.token_hex(2)
        return self._start(
            ["-c", _APART, str(cpus), str(scratch), job, *arguments], ROOT, {"RAY_ADDRESS": "local", **environment}
        )

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

    def submit(self, job: str, *arguments: str) -> tuple[int, str]:
        """(exit code, log) of `ray job submit --working-dir . -- python -m jobs.JOB arguments`."""
        environment = self.environment | {"RAY_ADDRESS": self.dashboard}
        return submit(environment, "--", "python", "-m", f"jobs.{job}", *arguments)

    def run(
        self, job: str, *arguments: str, folder: Path = ROOT, page: bool = False, **environment: str
    ) -> tuple[int, str]:
        """(exit code, all it printed) of a job."""
        return end_of(self.start(job, *arguments, folder=folder, page=page, **environment))


def end_of(job: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, all it printed) of a job that was started."""
    printed, _ = job.communicate(timeout=PATIENCE_S)
    return job.returncode, printed


def wait_for(what: Callable[[], Any], job: subprocess.Popen[str] | None = None) -> Any:
    """Until `what` answers something true, which is answered here; `job` must not have ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert job is None or job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def submit(environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """(exit code, log) of `ray job submit --working-dir . arguments`, where `environment` leads."""
    command = [RAY, "job", "submit", "--working-dir", ".", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode, done.stdout + done.stderr


_EACH = (
    "import json, sys; from fruitray.cli import run_job; [run_job(sys.argv[1], run) for run in json.loads(sys.argv[2])]"
)
_APART = (
    "import ray, sys; from fruitray.cli import run_job; "
    "ray.init(address='local', num_cpus=int(sys.argv[1]), object_store_memory=500_000_000, _temp_dir=sys.argv[2], "
    "include_dashboard=False); sys.exit(run_job(sys.argv[3], sys.argv[4:]))"
)


@contextmanager
def ray_head(
    storage: Mapping[str, str], cpus: int = 2, *, dashboard: bool = False, host: str = HOST
) -> Iterator[Cluster]:
    """A head node at this machine's address `host`, whose workers find `storage`."""
    with tempfile.TemporaryDirectory(prefix="fr-", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # Ray's sockets need a short path, pytest's folders have long ones
        gcs, port, *ports = free_ports(2 + len(PORTS))
        environment = _environment(folder, storage)
        command = [RAY, "start", "--head", "--block", f"--port={gcs}", f"--num-cpus={cpus}", *_given(ports), *SMALL]
        command += [f"--node-ip-address={host}", f"--dashboard-host={HOST}", f"--dashboard-port={port}"]
        command += [f"--include-dashboard={dashboard}", f"--temp-dir={folder / 'ray'}"]
        with _daemon(command, environment, folder / "log") as head:
            there = environment | {"RAY_ADDRESS": f"{host}:{gcs}"}
            cluster = Cluster(there, folder, f"http://{HOST}:{port}" if dashboard else "")
            _wait_until_ready(cluster, head)
            yield cluster


def _given(ports: Sequence[int]) -> list[str]:
    return [f"--{name}-port={port}" for name, port in zip(PORTS, ports, strict=True)]


def _environment(folder: Path, storage: Mapping[str, str]) -> dict[str, str]:
    """Of the nodes and the drivers of a cluster with its files in `folder`."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    return environment | {
        **storage,
        "FRUITRAY_CACHE": str(folder / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        **QUICKER,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


@contextmanager
def ray_node(
    cluster: Cluster, cpus: int = 2, *, host: str = HOST, inside: Sequence[str] = ()
) -> Iterator[psutil.Process]:
    """Another node of `cluster`, at the address `host`, started by way of the command `inside`; yields its raylet."""
    before = {process.pid for process in cluster.processes("/raylet/raylet")}
    command = [*inside, RAY, "start", "--block", f"--address={cluster.environment['RAY_ADDRESS']}"]
    command += [f"--num-cpus={cpus}", f"--node-ip-address={host}", *_given(free_ports(len(PORTS))), *SMALL]
    log = cluster.folder / f"log-{secrets.token_hex(2)}"
    with _daemon(command, cluster.environment, log):
        deadline = time.monotonic() + PATIENCE_S
        while STARTED not in log.read_text():
            assert time.monotonic() < deadline, log.read_text() + (cluster.folder / "log").read_text()
            time.sleep(0.2)
        yield next(one for one in cluster.processes("/raylet/raylet") if one.pid not in before)


class Nodes:
    """A head without CPUs, and a node that works, and can be replaced."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        self.cluster, self._stack = cluster, stack
        self.raylet = self.add()

    def add(self, cpus: int = 2) -> psutil.Process:
        return self._stack.enter_context(ray_node(self.cluster, cpus))

    def replace(self) -> None:
        self.raylet.kill()
        self.raylet = self.add()


@contextmanager
def _daemon(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end, with all that it started."""
    with log.open("ab") as file:
        daemon = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield daemon
    finally:
        with suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        daemon.wait()


def _wait_until_ready(cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while head.poll() is None and time.monotonic() < deadline:
        if _is_ready(cluster):
            return
        time.sleep(0.5)
    raise RuntimeError(f"ray did not start: {(cluster.folder / 'log').read_text()[-2000:]}")


def _is_ready(cluster: Cluster) -> bool:
    """Whether it takes what it is for: jobs, where it has a dashboard, which is up last, else drivers."""
    environment, check = cluster.environment, ["health-check"]
    if cluster.dashboard:
        environment, check = environment | {"RAY_ADDRESS": cluster.dashboard}, ["job", "list"]
    elif not cluster.processes("/raylet/raylet"):
        return False
    return subprocess.run([RAY, *check], env=environment, capture_output=True).returncode == 0
