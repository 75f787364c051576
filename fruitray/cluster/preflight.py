"""What `--dry-run` says, in seconds, of a cluster that is about to be given a job: what each node has and sees.

Every node is asked, by a task that takes none of its CPUs: whether it reaches the job's places in storage, how long
they take to answer, its free disk, its clock, its versions. Where a job would wait without a word, or fail on one node
only, it says so instead.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray

from fruitray.cluster.connection import connect
from fruitray.cluster.placement import seek_room
from fruitray.cluster.runtime import on_node
from fruitray.console import show_table
from fruitray.errors import FruitrayError, TryAgainError, UsageError
from fruitray.index import Index
from fruitray.machine import cache_disk, versions
from fruitray.storage import LocalStorage, open_storage

ANSWER_S = 60
"""A node that has not answered by then is told as one that does not."""
CLOCK_S = 60
"""Stores refuse requests from clocks that are wrong by a quarter of an hour; tokens and certificates may sooner."""
USUAL_SIDE = 300
"""Pixels of a photo's side where the backbone decides."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a node says of itself."""

    slowest_ms: float
    """Of its places in storage, until they answer."""
    refused: FruitrayError | None
    disk: int
    """Bytes that are free for decoded photos."""
    versions: dict[str, str]
    clock: float
    """Seconds since the epoch, as it says this."""


def preflight(
    job: str, reads: Sequence[str], writes: str, *, workers: int = 1, cpus: float, gpus: float = 0, disk: int = 0
) -> str:
    """Show what the nodes have and see of the folders and prefixes that a job `reads` and `writes`; its `workers` take
    `cpus` and `gpus` each, and each node that has CPUs keeps `disk` bytes of decoded photos.

    Raises:
        UsageError: they have no room, or run other versions.
        TryAgainError: a node does not answer, its disk is too full, or its clock is wrong.
        StorageError: a node does not reach a place.
    """
    connect()
    there, rows, faults = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}, [], []
    places = [*reads, *([] if isinstance(open_storage(writes), LocalStorage) else [writes])]  # a folder is made
    for node, seen, off in _ask(list(there), places):
        name, has = there[node]["NodeManagerHostname"], there[node]["Resources"]
        faults += _faults(name, seen, off, disk if has.get("CPU", 0) >= 1 else 0)
        rows.append(
            {
                "node": name,
                "CPUs": int(has.get("CPU", 0)),
                "GPUs": int(has.get("GPU", 0)),
                "memory (GiB)": has.get("memory", 0) / 2**30,
                "free disk (GiB)": seen.disk / 2**30,
                "storage (ms)": round(seen.slowest_ms),
                "clock (s)": round(off, 1),
            }
        )
    show_table("nodes", rows)
    if faults:
        raise faults[0]
    held = " and have room for it" if seek_room(job, workers, cpus=cpus, gpus=gpus) else ""
    return f"{job}: {len(rows)} nodes reach all of it{held}; nothing was written"


def decoded_size(index: Index, side: int | None) -> int:
    """Bytes that each node keeps of an index's photos, decoded to squares of `side` pixels; about, where it is None."""
    return len(index.table) * 3 * (side or USUAL_SIDE) ** 2


def _ask(nodes: Sequence[str], places: Sequence[str]) -> Iterator[tuple[str, Seen, float]]:
    """(id, what it says, seconds by which its clock is ahead) of each node, as they answer."""
    asked = {ray.remote(_look).options(**on_node(node)).remote(places): node for node in nodes}
    deadline = time.monotonic() + ANSWER_S
    while asked:
        ready, _ = ray.wait(list(asked), timeout=max(0, deadline - time.monotonic()))
        if not ready:
            raise TryAgainError("the cluster", f"{len(asked)} of {len(nodes)} nodes do not answer within {ANSWER_S} s")
        seen = ray.get(ready[0])
        yield asked.pop(ready[0]), seen, seen.clock - time.time()


def _look(places: Sequence[str]) -> Seen:
    slowest, refused = 0.0, None
    for place in places:
        start = time.perf_counter()
        try:
            open_storage(place).check()
        except FruitrayError as error:
            refused = refused or error
        slowest = max(slowest, 1000 * (time.perf_counter() - start))
    there = cache_disk()
    free = shutil.disk_usage(there).free if os.access(there, os.W_OK) else 0
    return Seen(slowest, refused, free, versions(), time.time())


def _faults(node: str, seen: Seen, off: float, disk: int) -> list[FruitrayError]:
    """Why this node cannot do its part."""
    faults: list[FruitrayError] = [seen.refused] if seen.refused else []
    if abs(off) > CLOCK_S:
        faults.append(TryAgainError(node, f"its clock is {off:+.0f} s off this machine's"))
    if disk > seen.disk:
        faults.append(TryAgainError(node, f"decoded photos need {disk >> 20} MiB there, {seen.disk >> 20} are free"))
    ours = versions()
    other = [f"{name} {found}, here {ours[name]}" for name, found in seen.versions.items() if found != ours[name]]
    return [*faults, UsageError(f"{node} runs other versions: {'; '.join(other)}")] if other else faults
