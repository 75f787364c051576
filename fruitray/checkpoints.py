"""Checkpoints of one training run in storage, committed by a last small object that names their hash.

    checkpoints/000012-00000384-5f0c91b2.pt      12 epochs and 384 steps: what torch made of the state
    checkpoints/000012-00000384-5f0c91b2.json    its SHA-256 and size; without this, or with another hash, it is none

The token at the end keeps two workers apart of which one was taken for dead. Old checkpoints are deleted when a newer
one is committed.
"""

import hashlib
import io
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fruitray.errors import NotFoundError, TryAgainError
from fruitray.storage import Storage

KEPT = 2
"""How many are kept: where the newest turns out to be damaged there is one before it."""
SHARE = 0.03
"""Of the time since the last one, what a checkpoint that nobody asked for may take."""
_FOLDER = "checkpoints/"


def to_bytes(state: dict[str, Any]) -> bytes:
    """`state` as `torch.save` writes it; what it writes to a disk that is full by itself ends in no `OSError`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def save_checkpoint(storage: Storage, state: dict[str, Any]) -> str:
    """Store `state`, whose `number` epochs and `step` steps say how new it is; answers its name."""
    name = f"{_FOLDER}{state['number']:06}-{state['step']:08}-{secrets.token_hex(4)}"
    data = to_bytes(state)
    storage.write(f"{name}.pt", data)
    said = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    storage.write(f"{name}.json", json.dumps(said).encode())
    _prune(storage)
    return name


def committed_checkpoints(storage: Storage) -> Iterator[str]:
    """Their names, newest first; whether they are still whole takes reading them, see `newest_checkpoint`."""
    keys = sorted((entry.key for entry in storage.list(_FOLDER)), reverse=True)
    return (key.removesuffix(".json") for key in keys if key.endswith(".json"))


def newest_checkpoint(storage: Storage, tell: Callable[[str], object]) -> str | None:
    """The name of the newest one that is whole; `tell` is told what is wrong with newer ones, which are deleted: they
    would take the place of others.

    Raises:
        StorageError: one may be whole, but cannot be had.
    """
    names = list(committed_checkpoints(storage))
    for place, name in enumerate(names, start=1):
        _, damage = _read(storage, name)
        if damage is None:
            return name
        then = "going on from the one before it" if place < len(names) else "there is none before it"
        tell(f"checkpoint {storage.uri_of(name)}.pt {damage}: {then}")
        for ending in ("json", "pt"):
            storage.delete(f"{name}.{ending}")
    return None


def load_checkpoint(storage: Storage, name: str) -> dict[str, Any]:
    """The state, its tensors on the CPU; nothing but plain data and tensors is ever unpickled.

    Raises:
        TryAgainError: it is not whole any more.
    """
    data, damage = _read(storage, name)
    if damage:
        raise TryAgainError(f"{storage.uri_of(name)}.pt", damage)
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def delete_checkpoints(storage: Storage) -> None:
    """Remove them all: the training is done."""
    for entry in [*storage.list(_FOLDER)]:
        storage.delete(entry.key)
    storage.sweep(_FOLDER)


class Pace:
    """How often to save: a large network, or one whose storage is slow, has fewer checkpoints."""

    def __init__(self) -> None:
        self._last, self._cost_s = time.monotonic(), 0.3  # a guess, until one was saved

    def since(self) -> float:
        """Seconds since the last one."""
        return time.monotonic() - self._last

    def cheap(self) -> bool:
        """Whether another likely takes no more than `SHARE` of the time since the last."""
        return self._cost_s <= SHARE * self.since()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the saving of one."""
        start = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost_s = self._last - start


class Keeper:
    """When to save a checkpoint: every `interval_s`, and in between where one is cheap."""

    def __init__(self, storage: Storage, interval_s: float) -> None:
        self._storage, self._interval_s, self._pace = storage, interval_s, Pace()

    def due(self) -> bool:
        """Whether the interval is over."""
        return self._pace.since() >= self._interval_s

    def keep(self, state: dict[str, Any], *, now: bool) -> None:
        """Save `state`, if `now`, if one is due, or if it is cheap."""
        if now or self.due() or self._pace.cheap():
            with self._pace.saving():
                save_checkpoint(self._storage, state)


def _read(storage: Storage, name: str) -> tuple[bytes, str | None]:
    """Its state as bytes, and what is wrong with it."""
    try:
        said, data = json.loads(storage.read(f"{name}.json")), storage.read(f"{name}.pt")
    except (NotFoundError, ValueError) as error:
        return b"", f"cannot be read ({error})"
    if not isinstance(said, dict) or hashlib.sha256(data).hexdigest() != said.get("sha256"):
        return b"", "does not have the SHA-256 it was written with"
    return data, None


def _prune(storage: Storage) -> None:
    """Delete all that is older than the `KEPT` newest, the commit before the state; leftovers of broken uploads too."""
    kept = list(committed_checkpoints(storage))[:KEPT]
    old = [entry.key for entry in storage.list(_FOLDER) if entry.key < min(kept, default="")]
    for key in sorted(old, key=lambda key: not key.endswith(".json")):
        storage.delete(key)
