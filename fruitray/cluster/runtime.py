"""What all jobs share: joining a cluster, opening places, claiming an output, streaming work over Ray Data."""

import json
import logging
import os
import re
import secrets
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import ray
import ray.data
from ray import ObjectRef
from ray._private.services import find_bootstrap_address
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fruitray import status
from fruitray.cluster import token_path
from fruitray.cluster.placement import GROWS
from fruitray.config import to_json
from fruitray.console import reached, say
from fruitray.errors import OutputConflictError, TryAgainError, UsageError, find_ours
from fruitray.storage import LocalStorage, Storage, open_storage

warnings.filterwarnings("ignore", "`ray_remote_args_fn`")  # Ray has no other way yet to bound a worker's retries
logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that the door is locked

ATTEMPTS = 10
"""How many workers may die over one task, or one table of a stream, before the job does."""
OPEN = "FRUITRAY_OPEN_CLUSTER"
"""Set where the network keeps strangers out of a cluster that asks for no token."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or `ray start` on this machine names, else start one on this machine.

    Raises:
        UsageError: it has several nodes, and asks for no token; or is to be led from afar, through Ray's client.
        TryAgainError: nothing answers there.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        require_answer(address)
        if not address:
            keep_token_private()
        if not address and (left := left_behind()):
            say(f"the Ray that was started here, at {left}, does not answer any more: this job starts one for itself")
            address = "local"
        ray.init(address or None, log_to_driver=False, logging_level="warning")
        nodes = sum(node["Alive"] for node in ray.nodes())
        require_token(nodes, asks=asks_for_token(ray.get_runtime_context().gcs_address))
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    settings.raise_original_map_exception = True  # else an error of ours is lost inside one of Ray Data's
    settings.op_resource_reservation_enabled = False  # our streams have one step; half the CPUs were kept for others
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error, it raises, too


def require_answer(address: str) -> None:
    """Raise where no job can be led at `address`: at once, where Ray itself would try for many minutes."""
    if address.startswith("ray://"):
        raise UsageError(
            f"RAY_ADDRESS={address}: a job is led from a node of its cluster; hand it over by `ray job submit "
            "--address http://HEAD:8265 --working-dir . -- python -m jobs.NAME ...`"
        )
    if error := _silent(address):
        raise TryAgainError("the cluster", f"nothing answers at RAY_ADDRESS={address} ({error})") from error


def left_behind() -> str:
    """The address that the last `ray start` on this machine has left in a file, if nothing answers there: Ray itself
    would try for many minutes."""
    address = find_bootstrap_address(None) or ""
    return address if _silent(address) else ""


def _silent(address: str) -> OSError | None:
    """Why nothing can be said to `address`, if that is HOST:PORT."""
    there = re.fullmatch(r"([\w.-]+):(\d+)", address)
    try:
        if there:
            socket.create_connection((there[1], int(there[2])), timeout=5).close()
    except OSError as error:
        return error
    return None


def keep_token_private() -> None:
    """Make the token that Ray's own cluster on this machine asks for, where there is none, and let nobody else read it:
    Ray would make it for all to read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(token_path())
    with suppress(OSError):  # of another, or no home: Ray says what it has to
        if path.exists():
            path.chmod(0o600)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))


def asks_for_token(address: str) -> bool:
    """Whether the head at `address` answers nobody who shows no token."""
    if os.environ.get("RAY_USE_TLS") == "1":  # to ask would take a certificate, which strangers do not have either
        return True
    asked = "/ray.rpc.NodeInfoGcsService/CheckAlive"
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(asked, request_serializer=bytes, response_deserializer=bytes)(b"", timeout=10)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def require_token(nodes: int, *, asks: bool) -> None:
    """Raise `UsageError` on a cluster that has several nodes, or grows, and asks for no token, unless `OPEN` says that
    it may be so."""
    alone = nodes < 2 and not os.environ.get(GROWS)
    if alone or asks or os.environ.get(OPEN):
        return
    raise UsageError(
        f"this cluster of {nodes} nodes asks for no token, so whoever reaches it runs code on it: set "
        f"RAY_AUTH_MODE=token on every node (infra/README.md), or {OPEN}=1 where its network keeps strangers out"
    )


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
    """The storage at `uri`, to be written to; it must not lie within `images`, whose listing it would join."""
    storage = open_storage(uri)
    if images is not None and f"{storage.uri}/".startswith(f"{images.uri}/"):
        raise UsageError(f"--out {uri}: must not lie inside --images {images.uri}, or its files would become inputs")
    if not isinstance(storage, LocalStorage):
        storage.check()
    return storage


FREE = ("config", "workers", "gpu", "checkpoint_minutes", "report", "dry_run")
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
    """Save the resolved config as `NAME.json`, which makes `out` this job's; see `require_ours`. Begin its status."""
    if out.exists(f"{name}.json") or not out.create(f"{name}.json", _saved(config, index_sha256)):
        require_ours(out, name, config, index_sha256)
    status.begin(out)


def _saved(config: Any, index_sha256: str) -> bytes:
    return json.dumps({**json.loads(to_json(config)), "index_sha256": index_sha256}, indent=2, sort_keys=True).encode()


def _options(saved: bytes) -> dict[str, Any]:
    """A saved config as the command line has it: without the groups."""
    config: dict[str, Any] = json.loads(saved)
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
    tables: Sequence[ObjectRef], work: Callable[..., pa.Table] | type[Any], **options: Any
) -> Iterator[tuple[list[ObjectRef], int]]:
    """As `stream`, of tables that the driver never holds: yields references to results, and how many rows they have."""
    with _deaths_told():
        for bundle in _mapped(ray.data.from_arrow_refs(list(tables)), work, **options).iter_internal_ref_bundles():
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
    reason = f"its workers died again and again ({type(error).__name__}); the same command goes on from here"
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
