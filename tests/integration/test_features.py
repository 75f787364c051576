"""Embedding on a real cluster: what a killed job had made stays, and jobs at the same work take turns."""

import io
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fruitray.s3server import S3Server
from fruitray.storage import Storage, open_storage
from tests.cluster import Cluster, end_of, wait_for
from tests.conftest import new_bucket
from tests.unit.photos import sixty

BLOCK = 128
COPIES = 16
"""Of each of 58 photos: drawing takes longer than embedding."""
USED = 58 * COPIES


@pytest.fixture(scope="module")
def indexed(s3: S3Server, cluster: Cluster) -> Iterator[str]:
    """A prefix with photos below raw/ and their index below index/."""
    with pytest.MonkeyPatch.context() as environment:
        root = f"s3://{new_bucket(s3, environment)}"
        bucket = open_storage(root)
        drawn = [(Path(key), data) for key, data in sixty().items()]
        files = [(f"raw/{key.parent}/{copy}-{key.name}", data) for key, data in drawn for copy in range(COPIES)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda file: bucket.write(*file), files))
        code, printed = cluster.run("prepare", *places(root))
        assert code == 0, printed
        yield root


@pytest.fixture
def place(indexed: str) -> str:
    """`indexed`, with nothing embedded."""
    beside = open_storage(f"{indexed}/index")
    for entry in list(beside.list("features/")):
        beside.delete(entry.key)
    return indexed


def places(root: str) -> tuple[str, ...]:
    return ("--images", f"{root}/raw", "--out", f"{root}/index", "--duplicates", "keep-all")


def probe(root: str, weights: Path) -> tuple[str, ...]:
    return (*places(root), "--probe", "mobilenet_v2", "--weights", str(weights), "--image-size", "160")


def kept(beside: Storage) -> dict[str, int]:
    """The parts that stand, and the rows of each."""
    parts = {entry.key: beside.read(entry.key) for entry in beside.list("features/")}
    return {key: pq.ParquetFile(io.BytesIO(data)).metadata.num_rows for key, data in parts.items()}


def embedded(printed: str) -> int:
    """How many views a job says that it embedded."""
    done = re.findall(r"embed with mobilenet_v2: ([\d,]+) of ", printed)
    others = re.findall(r"embed: ([\d,]+) of these views were made by another", printed)
    count, less = (int(said[-1].replace(",", "")) if said else 0 for said in (done, others))
    return count - less


def test_a_killed_job_loses_only_the_blocks_in_progress(cluster: Cluster, place: str, weights: Path) -> None:
    """Run again, it ranks every label, and draws a policy."""
    command, beside = probe(place, weights), open_storage(f"{place}/index")
    index = beside.read("index.parquet")
    job = cluster.start("prepare", *command)
    wait_for(lambda: len(kept(beside)) >= 3, job)
    os.killpg(job.pid, signal.SIGKILL)
    end_of(job)
    there = kept(beside)
    assert 0 < sum(there.values()) < USED - 2 * BLOCK
    code, printed = cluster.run("prepare", *command, "--show-augment", "3", "--augment", "report+cutmix")
    assert code == 0, printed
    spared = USED - embedded(printed)
    assert sum(there.values()) <= spared <= sum(there.values()) + 2 * BLOCK, "two workers may have ended a block each"
    assert sum(kept(beside).values()) == USED
    assert "the probe agrees with" in printed
    suspects, used = (pq.read_table(io.BytesIO(data)) for data in (beside.read("suspects.parquet"), index))
    used = used.filter(pc.field("split").is_valid())
    assert sorted(suspects["uri"].to_pylist()) == used["uri"].to_pylist()
    assert suspects["rank"].to_pylist() == list(range(1, USED + 1))
    with Image.open(io.BytesIO(beside.read("augment.png"))) as sheet:
        assert sheet.size == (9 * 162, 3 * 162)
    assert beside.read("index.parquet") == index


@pytest.mark.chaos
def test_two_jobs_at_once_share_the_work(cluster: Cluster, place: str, weights: Path) -> None:
    """On two clusters, so that neither waits for the other's CPUs. Some blocks are in both jobs' hands at once."""
    command, beside = probe(place, weights), open_storage(f"{place}/index")
    jobs = [cluster.start_apart("prepare", *command, cpus=1) for _ in range(2)]
    codes, printed = zip(*map(end_of, jobs), strict=True)
    assert codes == (0, 0), printed
    assert sum(kept(beside).values()) == USED
    assert USED <= sum(map(embedded, printed)) < 2 * USED - 2 * BLOCK, printed
