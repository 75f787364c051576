"""Jobs on three nodes, each of which may be lost at any moment; and what a dry run says of them before."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fruitray.commit import verify
from fruitray.package import load_package
from fruitray.s3server import S3Server
from fruitray.storage import open_storage
from tests.cluster import Cluster, end_of, ray_head, ray_node, wait_for

pytestmark = pytest.mark.chaos
NETWORK = ("--image-size", "64", "--augment", "mirror", "--patience", "999")


@pytest.fixture(scope="module")
def three(s3: S3Server) -> Iterator[tuple[Cluster, Callable[[], psutil.Process]]]:
    """A head without CPUs and three nodes with one each; and what adds another such node."""
    with ExitStack() as stack:
        head = stack.enter_context(ray_head(s3.environment, cpus=0))

        def add() -> psutil.Process:
            return stack.enter_context(ray_node(head, cpus=1))

        for _ in range(3):
            add()
        yield head, add


def _has(uri: str, word: str, count: int = 1) -> bool:
    """Whether so many objects there have the word in their key."""
    return sum(word in entry.key for entry in open_storage(uri).list()) >= count


def test_a_node_is_lost_in_every_phase_and_all_ends_verified(
    three: tuple[Cluster, Callable[[], psutil.Process]], place: str
) -> None:
    cluster, add = three
    index, raw, tune, model, scores = (f"{place}/{name}" for name in ("index", "raw", "tune", "model", "scores"))
    search = ("--backbones", "cnn", "--trials", "2", "--scheduler", "none", "--epochs", "120", *NETWORK)
    final = (
        "--backbone",
        "cnn_bn",
        "--workers",
        "2",
        "--epochs",
        "4",
        "--batch-size",
        "4",
        "--checkpoint-minutes",
        "0",
    )
    phases = {  # what is run, the word in a worker's command, and what it has done before its node is lost
        "tune": (("--index", index, "--out", tune, *search), "ImplicitFunc", lambda: _has(tune, "checkpoint.pt")),
        "train": (
            ("--index", index, "--out", model, *final, *NETWORK),
            "RayTrainWorker",
            lambda: _has(model, "checkpoints/"),
        ),
        "score": (
            ("--package", model, "--images", raw, "--out", scores, "--shard-rows", "2"),
            "MapWorker",
            lambda: _has(scores, "data/part-", 3),
        ),
    }
    for job, (arguments, word, under_way) in phases.items():
        running = cluster.start(job, *arguments)
        wait_for(under_way, running)
        workers = cluster.processes(word)
        nodes = {worker.ppid() for worker in workers}
        assert len(nodes) >= 2, f"{job} is on one node only"
        psutil.Process(nodes.pop()).kill()
        code, printed = end_of(running)
        assert code == 0, printed
        add()
    trials = pq.read_table(pa.BufferReader(open_storage(tune).read("trials.parquet"))).to_pylist()
    assert [(trial["epochs"], trial["error"]) for trial in trials] == [(120, None)] * 2
    assert load_package(model).description["epochs"] == 4
    assert sum(part.rows for part in verify(open_storage(scores))) == 60


def test_a_dry_run_says_whether_the_nodes_can_do_it_and_writes_nothing(
    three: tuple[Cluster, Callable[[], psutil.Process]], place: str
) -> None:
    cluster, _ = three
    index, out = f"{place}/index", f"{place}/dry"
    code, printed = cluster.run("prepare", "--images", f"{place}/raw", "--out", out, "--dry-run")
    assert (code, "4 nodes reach all of it and have room" in printed) == (0, True), printed
    tune = ("tune", "--index", index, "--out", out, "--backbones", "cnn", "--dry-run")
    code, printed = cluster.run(*tune, "--image-size", "300000")
    assert (code, "decoded photos need" in printed) == (75, True), printed
    train = ("train", "--index", index, "--out", out, "--backbone", "cnn", "--dry-run", "--workers", "9")
    code, printed = cluster.run(*train, FRUITRAY_GROWING_CLUSTER="1")
    assert (code, "6 of 9 workers wait for nodes" in printed, "have room" in printed) == (0, True, False), printed
    assert list(open_storage(out).list()) == []
