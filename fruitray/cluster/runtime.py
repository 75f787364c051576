"""What all jobs share: joining a cluster, opening places, claiming an output, streaming work over Ray Data."""

import json
import logging
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own screen; ours is `console.py`
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # else a search forgets trials that ended in its last seconds
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # every second is meant
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else Ctrl-C would end a search as if it were complete

import pyarrow as pa
import ray
import ray.data
from ray import ObjectRef
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fruitray.config import to_json
from fruitray.console import say
from fruitray.errors import OutputConflictError, UsageError
from fruitray.storage import LocalStorage, Storage, open_storage

warnings.filterwarnings("ignore", "`ray_remote_args_fn`")  # Ray has no other way yet to bound a worker's retries
logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that the door is locked


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or `ray start` on this machine names, else start one on this machine."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning")
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    settings.op_resource_reservation_enabled = False  # our streams have one step; half the CPUs were kept for others
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def own_cluster(folder: Path) -> Iterator[None]:
    """A Ray of this process alone while the context lasts; its files and its token (mode 0600) lie below `folder`.

    `folder` must have a short path: Ray's sockets lie in it.
    """
    token = folder / "ray-token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # with the mode unset, Ray takes a token it finds
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    ray.init(
        address="local",
        _temp_dir=str(folder / "ray"),
        object_store_memory=500_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def lines_from_workers() -> Iterator[Queue]:
    """Yields a queue to hand to workers: what they put into it is said on the driver's console."""
    queue = Queue(actor_options=_here())

    def listen() -> None:
        while (line := queue.get()) is not None:
            say(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield queue
    finally:
        queue.put(None)
        listener.join(timeout=10)
        queue.shutdown()


def beside_driver(function: Callable[..., Any]) -> Any:
    """`function` as a Ray task in a process of its own on the driver's node: what it holds, the driver need not."""
    return ray.remote(function).options(**_here())


def _here() -> dict[str, Any]:
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def open_input(uri: str) -> Storage:
    """The storage at `uri`, which must be there and readable."""
    storage = open_storage(uri)
    storage.check()
    return storage


def open_output(uri: str, images: Storage | None = None) -> Storage:
    """The storage at `uri`, to be written to; it must not lie within `images`, whose listing it would join."""
    storage = open_storage(uri)
    if images is not None and f"{storage.uri}/".startswith(f"{images.uri}/"):
        raise UsageError(f"--out {uri}: must not lie inside --images {images.uri}, or its files would become inputs")
    if not isinstance(storage, LocalStorage):
        storage.check()
    return storage


FREE = ("config", "workers", "gpu", "checkpoint_minutes", "cpus_per_trial", "gpus_per_trial")
"""Options that do not decide what comes out, so a job may be resumed with others."""
FREE_OF = {"prepare": ("previous", "probe", "weights", "image_size", "show_augment", "augment")}
"""Those of one job alone."""


def require_ours(out: Storage, name: str, config: Any, index_sha256: str = "") -> None:
    """Raise `OutputConflictError` if `out` was made by the job `name` with other settings, or of another index."""
    key = f"{name}.json"
    if not out.exists(key):
        return
    standing, wanted = _options(out.read(key)), _options(_saved(config, index_sha256))
    for option in wanted.keys() - {*FREE, *FREE_OF.get(name, ())}:
        if standing.get(option) != wanted[option]:
            reason = f"was made with {option} {standing.get(option)!r}, not {wanted[option]!r}; choose another --out"
            raise OutputConflictError(out.uri_of(key), reason)


def claim(out: Storage, name: str, config: Any, index_sha256: str = "") -> None:
    """Save the resolved config as `NAME.json`, which makes `out` this job's; see `require_ours`."""
    if out.exists(f"{name}.json") or not out.create(f"{name}.json", _saved(config, index_sha256)):
        require_ours(out, name, config, index_sha256)


def _saved(config: Any, index_sha256: str) -> bytes:
    return json.dumps({**json.loads(to_json(config)), "index_sha256": index_sha256}, indent=2, sort_keys=True).encode()


def _options(saved: bytes) -> dict[str, Any]:
    """A saved config as the command line has it: without the groups."""
    config: dict[str, Any] = json.loads(saved)
    groups = [name for name, value in config.items() if isinstance(value, dict)]
    return config | {option: value for name in groups for option, value in config.pop(name).items()}


ATTEMPTS = 10
"""How many workers may die over one table before the job does."""


def stream(tables: Sequence[pa.Table], work: Callable[..., pa.Table] | type[Any], **options: Any) -> Iterator[pa.Table]:
    """`work` over each table, one call per table, results as they come, in no promised order.

    A killed worker's table is done again elsewhere, up to `ATTEMPTS` times: what kills every worker ends the job.
    `options` are those of `Dataset.map_batches`.
    """
    done = _mapped(ray.data.from_arrow(list(tables)), work, **options)
    yield from done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def stream_references(
    tables: Sequence[ObjectRef], work: Callable[..., pa.Table] | type[Any], **options: Any
) -> Iterator[tuple[list[ObjectRef], int]]:
    """As `stream`, of tables that the driver never holds: yields references to results, and how many rows they have."""
    for bundle in _mapped(ray.data.from_arrow_refs(list(tables)), work, **options).iter_internal_ref_bundles():
        yield bundle.block_refs, bundle.num_rows()


def _mapped(dataset: ray.data.Dataset, work: Callable[..., pa.Table] | type[Any], **options: Any) -> ray.data.Dataset:
    # The workers of a class may hold every CPU, so no other step (read, repartition) may stand before them.
    retries = {"max_task_retries" if isinstance(work, type) else "max_retries": ATTEMPTS}
    return dataset.map_batches(
        work,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        ray_remote_args_fn=lambda: retries,
        **options,
    )


def worker_count(asked: int, *, gpu: bool) -> int:
    """How many workers to run: as asked, else one per CPU (or GPU) of the cluster."""
    kind = "GPU" if gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if not there or asked > there:
        raise UsageError(f"--workers {asked}: the cluster has {there} {kind}s at present, and each worker takes one")
    return asked or there


def cpus_per_gpu() -> int:
    """The CPUs that a worker with a GPU may take, on whichever node it runs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return max(1, min((int(node.get("CPU", 0) // node["GPU"]) for node in nodes), default=1))


def require_resources(cpus: float, gpus: float) -> None:
    """Raise `UsageError` if no node could ever hold a trial; it would wait without a word."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise UsageError(f"--cpus-per-trial {cpus} --gpus-per-trial {gpus}: no node of the cluster has that much")
