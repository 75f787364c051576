"""Joining a cluster, or starting one on this machine: where it is, and who else may come in."""

import logging
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import ray
import ray.data
from ray._private.services import canonicalize_bootstrap_address_or_die, find_bootstrap_address

from fruitray.cluster import token_path
from fruitray.cluster.placement import GROWS
from fruitray.console import say
from fruitray.errors import TryAgainError, UsageError, one_line

logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that the door is locked

HERE = ("", "local")
"""What RAY_ADDRESS says where a job may start a Ray of its own."""
HOST_PORT = re.compile(r"([\w.-]+|\[[\da-fA-F:]+\]):(\d+)")
OPEN = "FRUITRAY_OPEN_CLUSTER"
"""Set where the network keeps strangers out of a cluster that asks for no token."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or `ray start` on this machine names, else start one on this machine.

    Raises:
        UsageError: it has several nodes, and asks for no token; or is to be led from afar, through Ray's client; or
            RAY_ADDRESS is no address.
        TryAgainError: nothing answers there, or lets this job in; or none could be started here.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        require_answer(address)
        if address in HERE:
            keep_token_private()
        if not address and (left := left_behind()):
            say(f"the Ray that was started here, at {left}, does not answer any more: this job starts one for itself")
            address = "local"
        _join(address)
        nodes = sum(node["Alive"] for node in ray.nodes())
        require_token(nodes, asks=asks_for_token(ray.get_runtime_context().gcs_address))
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = False
    settings.raise_original_map_exception = True  # else an error of ours is lost inside one of Ray Data's
    settings.op_resource_reservation_enabled = False  # our streams have one step; half the CPUs were kept for others
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error, it raises, too


def _join(address: str, **options: Any) -> None:
    """Raises `TryAgainError` with what Ray says."""
    try:
        ray.init(address or None, log_to_driver=False, logging_level="warning", **options)
    except Exception as error:  # Ray has none of its own for it
        what = f"joined at RAY_ADDRESS={address}" if address not in HERE else "started on this machine"
        raise TryAgainError("the cluster", f"it could not be {what}: {one_line(error)}") from error


def require_answer(address: str) -> None:
    """Raise where no job can be led at `address`: at once, where Ray itself would try for many minutes.

    Raises:
        UsageError: it is no address, or one that leads there from afar.
        TryAgainError: nothing answers there.
    """
    if "://" in address:
        raise UsageError(
            f"RAY_ADDRESS={address}: a job is led from a node of its cluster, where this is HOST:PORT of the head, or "
            "not set; from elsewhere, hand it over by "
            "`ray job submit --address http://HEAD:8265 --working-dir . -- python -m jobs.NAME ...`"
        )
    if address == "auto":
        try:
            address = canonicalize_bootstrap_address_or_die(address)
        except ConnectionError as error:  # none, or several
            raise TryAgainError("the cluster", f"RAY_ADDRESS=auto: {error}") from error
    if address not in HERE and not HOST_PORT.fullmatch(address):
        raise UsageError(f"RAY_ADDRESS={address}: it must be HOST:PORT of a cluster's head, auto, local, or empty")
    if silence := _silent(address):
        raise TryAgainError("the cluster", f"nothing answers at RAY_ADDRESS={address} ({silence})") from silence


def left_behind() -> str:
    """The address that the last `ray start` on this machine has left in a file, if nothing answers there: Ray itself
    would try for many minutes."""
    address = find_bootstrap_address(None) or ""
    return address if _silent(address) else ""


def _silent(address: str) -> OSError | None:
    """Why nothing can be said to `address`, if that is HOST:PORT."""
    try:
        if there := HOST_PORT.fullmatch(address):
            socket.create_connection((there[1].strip("[]"), int(there[2])), timeout=5).close()
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
    _join("local", _temp_dir=str(folder / "ray"), object_store_memory=500_000_000, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()
