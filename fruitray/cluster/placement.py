"""What the cluster has room for: how many workers, how many CPUs beside each GPU, and who would wait for ever."""

import os

import ray

from fruitray.console import say
from fruitray.errors import UsageError

GROWS = "FRUITRAY_GROWING_CLUSTER"
"""Set where nodes come when work waits for them: then what has no room yet waits, too."""


def room(cpus: float, gpus: float) -> int:
    """How many workers that take so much each the nodes can hold, when nobody else works there."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {kind: amount for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return sum(min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in wanted.items()) for node in there)


def require_room(workers: int, *, cpus: float, gpus: float) -> None:
    """Raise `UsageError` if the cluster could never hold them: they would wait without a word."""
    there = room(cpus, gpus)
    if there < workers and not os.environ.get(GROWS):
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount)
        raise UsageError(
            f"{workers} workers are wanted, with {wanted} each, and the nodes of this cluster have room for {there}; "
            + ("asked for no GPUs they take CPUs alone; " if gpus else "")
            + f"{GROWS}=1 says that more nodes come when they are needed"
        )


def needs(*, gpu: bool) -> dict[str, float]:
    """What decides how many workers of score, or of an embedding, there can be: each has a CPU, or a GPU."""
    return {"cpus": 0, "gpus": 1} if gpu else {"cpus": 1, "gpus": 0}


def worker_count(asked: int, *, gpu: bool) -> int:
    """How many workers to run: as asked, else as many as there is room for."""
    each = needs(gpu=gpu)
    require_room(asked or 1, **each)
    return asked or room(**each) or 1


def cpus_per_gpu() -> int:
    """The CPUs that a worker with a GPU may take, on whichever node it runs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return max(1, min((int(node.get("CPU", 0) // node["GPU"]) for node in nodes), default=1))


def seek_room(job: str, workers: int, *, cpus: float, gpus: float) -> bool:
    """Say who waits; answers whether the nodes that are there hold all.

    Raises:
        UsageError: as `require_room`.
    """
    require_room(workers, cpus=cpus, gpus=gpus)
    return say_who_waits(job, workers, cpus=cpus, gpus=gpus)


def say_who_waits(job: str, workers: int, *, cpus: float, gpus: float) -> bool:
    """Say who cannot start now: others may hold what is there, and nodes may have to come. Whether none have to."""
    if (there := room(cpus, gpus)) < workers:
        say(f"{job}: {workers - there} of {workers} workers wait for nodes that are not there yet")
    free = ray.available_resources()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if free.get(kind, 0) < min(workers, there) * each:
            say(f"{job}: other jobs hold {kind}s, {free.get(kind, 0):g} are free now; workers wait for them")
    return there >= workers
