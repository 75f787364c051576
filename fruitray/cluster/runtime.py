"""What all jobs share: opening places, claiming an output, streaming work over Ray Data."""

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import ray
import ray.data
from ray import ObjectRef
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fruitray import status
from fruitray.cluster import ATTEMPTS
from fruitray.config import to_json
from fruitray.console import reached, say
from fruitray.errors import OutputConflictError, TryAgainError, UsageError, find_ours
from fruitray.storage import LocalStorage, Storage, open_storage

warnings.filterwarnings("ignore", "`ray_remote_args_fn`")  # Ray has no other way yet to bound a worker's retries


@contextmanager
def lines_from_workers() -> Iterator[Queue]:
    """Yields a queue to hand to workers: lines that they put into it are said on the driver's console, counts are what
    its progress has reached."""
    queue = Queue(actor_options=_here())

    def listen() -> None:
        while (told := queue.get()) is not None:
            if isinstance(told, str):
                say(told)
            else:
                reached(told)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield queue
    finally:
        queue.put(None)
        listener.join(timeout=10)
        queue.shutdown()


def beside_driver(function: Callable[..., Any], **options: Any) -> Any:
    """`function` as a Ray task in a process of its own on the driver's node: what it holds, the driver need not."""
    return ray.remote(function).options(**{"max_retries": ATTEMPTS, **_here(), **options})


def answer_of(task: ObjectRef) -> Any:
    """What the task answers, or raises.

    Raises:
        TryAgainError: its worker died each time.
    """
    with _deaths_told():
        return ray.get(task)


def _here() -> dict[str, Any]:
    return on_node(ray.get_runtime_context().get_node_id())


def on_node(node: str) -> dict[str, Any]:
    """Options of a task or actor that runs on that node and no other, and takes none of its CPUs."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def open_input(uri: str) -> Storage:
    """The storage at `uri`, which must be there and readable."""
    storage = open_storage(uri)
    storage.check()
    return storage


def open_output(uri: str, images: Storage | None = None) -> Storage:
    """The storage at `uri`, to be written to; it must not lie within the `images`, whose listing it would join."""
    storage = open_storage(uri)
    if images is not None and is_within(storage, images):
        raise UsageError(f"--out {uri}: must not lie inside {images.uri}, or its files would become photos")
    if not isinstance(storage, LocalStorage):
        storage.check()
    return storage


def place_for_ray(out: Storage) -> str:
    """Where Ray itself keeps what it needs below `out`, in which it reads of a bucket's name what a URI would mean.

    Raises:
        UsageError: it would look elsewhere than we do.
    """
    if isinstance(out, LocalStorage):
        return f"{out.uri}/_ray"
    from fruitray.s3 import endpoint  # on use: boto3 is slow to load

    if endpoint() != endpoint(configured=False):
        here = f"the endpoint_url of ~/.aws/config, {endpoint()}"
        raise UsageError(f"--out {out.uri}: Ray does not read {here}; set AWS_ENDPOINT_URL to it, also for the cluster")
    return f"{quote(out.uri, safe=':/')}/_ray"


def is_within(storage: Storage, other: Storage) -> bool:
    """Whether `storage` lies within `other`, or is the same, by whatever links it is named."""
    place, around = (
        os.path.realpath(one.uri) if isinstance(one, LocalStorage) else one.uri for one in (storage, other)
    )
    return f"{place}/".startswith(f"{around.rstrip('/')}/")


KEEPERS = ("prepare", "tune", "train", "score")
"""Jobs that keep their config as JOB.json in their --out."""
FREE = ("config", "workers", "gpu", "checkpoint_minutes", "report", "dry_run")
"""Options that do not decide what comes out, so a job may be resumed with others."""
FREE_OF = {"prepare": ("previous", "probe", "weights", "image_size", "show_augment", "augment")}
"""Those of one job alone."""


def require_alone(out: Storage, name: str) -> None:
    """Raise `OutputConflictError` if another job than `name` has its output in `out`: files of theirs share names."""
    for other in KEEPERS:
        if other != name and out.exists(f"{other}.json"):
            raise OutputConflictError(out.uri_of(f"{other}.json"), "is another job's; choose another --out")


def require_ours(out: Storage, name: str, config: Any, index_sha256: str = "") -> None:
    """Raise `OutputConflictError` if `out` was made by the job `name` with other settings, or of another index."""
    require_alone(out, name)
    key = f"{name}.json"
    if not out.exists(key):
        return
    kept = (out.read(key), to_json(config, index_sha256=index_sha256))
    standing, wanted = (_options(out.uri_of(key), saved) for saved in kept)
    for option in wanted.keys() - {*FREE, *FREE_OF.get(name, ())}:
        if standing.get(option) != wanted[option]:
            reason = f"was made with {option} {standing.get(option)!r}, not {wanted[option]!r}; choose another --out"
            raise OutputConflictError(out.uri_of(key), reason)


def claim(out: Storage, name: str, config: Any, index_sha256: str = "") -> None:
    """Save the resolved config as `NAME.json`, which makes `out` this job's; see `require_ours`. Begin its status."""
    if out.exists(f"{name}.json") or not out.create(f"{name}.json", to_json(config, index_sha256=index_sha256)):
        require_ours(out, name, config, index_sha256)
    status.begin(out)


def _options(uri: str, saved: bytes) -> dict[str, Any]:
    """A config that was saved at `uri`, as the command line has it: without the groups."""
    try:
        config = dict(json.loads(saved))
    except (ValueError, TypeError) as error:
        raise OutputConflictError(uri, "is not what fruitray writes there; choose another --out") from error
    groups = [name for name, value in config.items() if isinstance(value, dict)]
    return config | {option: value for name in groups for option, value in config.pop(name).items()}


def stream(tables: Sequence[pa.Table], work: Callable[..., pa.Table] | type[Any], **options: Any) -> Iterator[pa.Table]:
    """`work` over each table, one call per table, results as they come, in no promised order.

    A killed worker's table is done again elsewhere, up to `ATTEMPTS` times: what kills every worker ends the job.
    `options` are those of `Dataset.map_batches`.

    Raises:
        TryAgainError: the same table's worker died each time.
    """
    with _deaths_told():
        done = _mapped(ray.data.from_arrow(list(tables)), work, **options)
        yield from done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def stream_references(
    tables: Sequence[ObjectRef], work: Callable[..., pa.Table]
) -> Iterator[tuple[list[ObjectRef], int]]:
    """As `stream`, of tables that the driver never holds: yields references to results, and how many rows they have."""
    with _deaths_told():
        for bundle in _mapped(ray.data.from_arrow_refs(list(tables)), work).iter_internal_ref_bundles():
            yield bundle.block_refs, bundle.num_rows()


_DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)


@contextmanager
def _deaths_told() -> Iterator[None]:
    """Say in one sentence that workers keep dying; what a worker raised is raised as it is."""
    try:
        yield
    except _DEATHS as error:
        if find_ours(error) or getattr(error, "actor_init_failed", False):
            raise
        raise workers_died(error) from error


def workers_died(error: Exception) -> TryAgainError:
    """What to raise when they did too often."""
    reason = f"its workers died again and again ({type(error).__name__}); give the same command again"
    return TryAgainError("the cluster", f"{reason}; if they keep dying, see whether memory is short")


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
