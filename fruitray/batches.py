"""Index rows -> tensors: photos decoded and resized once per machine, then batches that every worker agrees on."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fruitray.augment import augment, copies, mix, mixes
from fruitray.console import progress
from fruitray.errors import ImageError, OutputConflictError, TryAgainError, UsageError
from fruitray.images import decode, fetch
from fruitray.machine import make_cache_folder, versions
from fruitray.preprocess import Preprocessing
from fruitray.storage import Entry, Storage
from fruitray.transforms import Numbers

CPU = torch.device("cpu")


def squares(storage: Storage, entries: Sequence[Entry], preprocessing: Preprocessing) -> Iterator[torch.Tensor]:
    """Each indexed photo as (3, S, S) uint8, in order.

    Raises:
        OutputConflictError: a photo is no longer what the index says.
        NotFoundError: none is there, as where their folder is not mounted.
    """
    for entry, data in zip(entries, fetch(storage, entries), strict=True):
        try:
            if isinstance(data, ImageError):
                if data.code == "E_SRC_GONE":
                    storage.check_again()
                raise data
            yield preprocessing.resize(decode(data, preprocessing.enough).pixels)
        except ImageError as error:
            reason = f"not as indexed, run prepare again: {error}"
            raise OutputConflictError(storage.uri_of(entry.key), reason) from error


def decoded_photos(storage: Storage, entries: Sequence[Entry], preprocessing: Preprocessing) -> torch.Tensor:
    """All photos as one (N, 3, S, S) uint8 tensor, channels last, backed by a file that the machine's processes share.

    The file is made by the first who asks while the others wait, named by what is in it, and takes N * 3 * S * S bytes.

    Raises:
        OutputConflictError: a photo is no longer what the index says.
        UsageError: the folder for the file cannot be used, or the file, which another user made.
        TryAgainError: its disk is full.
    """
    photos = [(entry.key, entry.etag) for entry in entries]
    what = [storage.uri, asdict(preprocessing), preprocessing.enough, photos, versions()]
    path = make_cache_folder() / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.npy"
    try:
        if not path.exists():
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _decode_into(path, storage, entries, preprocessing)
        return torch.from_numpy(np.load(path, mmap_mode="c")).permute(0, 3, 1, 2)
    except PermissionError as error:
        raise UsageError(f"FRUITRAY_CACHE {path.parent}: {error.filename}: {error.strerror}") from error


def _decode_into(path: Path, storage: Storage, entries: Sequence[Entry], preprocessing: Preprocessing) -> None:
    """Write `path`, which appears only when complete: (N, S, S, 3) uint8."""
    temporary = path.with_suffix(".tmp")  # which also takes the place of what a killed process has left
    shape = (len(entries), preprocessing.size, preprocessing.size, 3)
    try:
        if shutil.disk_usage(path.parent).free < math.prod(shape):
            raise _full(path.parent, math.prod(shape))
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(temporary)
        with progress("decode", len(entries), "photos") as advance:
            for row, square in enumerate(squares(storage, entries, preprocessing)):
                array[row] = square.permute(1, 2, 0).numpy()
                advance(1)
        array.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Have the disk keep the room that a file is going to take: when a mapped file is written, a disk that is full by
    then, as by another such file, kills this process without a word."""
    with open(path, "rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise _full(path.parent, path.stat().st_size) from error


def _full(folder: Path, size: int) -> TryAgainError:
    free = shutil.disk_usage(folder).free
    return TryAgainError(
        str(folder), f"decoded photos need {size >> 20} MiB, {free >> 20} are free; see FRUITRAY_CACHE"
    )


def near(inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`inputs` in the memory of the GPU that `device` is, if they take at most an eighth of what is free there (the
    rest is for the network, and for others who share it); else where they are."""
    if device.type == "cuda" and 8 * inputs.nbytes <= torch.cuda.mem_get_info(device)[0]:
        return inputs.to(device)
    return inputs


class Batch(NamedTuple):
    """One worker's share of a global batch."""

    inputs: torch.Tensor
    """(B, 3, S, S) uint8 or (B, D) float32."""
    labels: torch.Tensor
    """(B,) int64, or (B, C) float32 shares where the policy blends photos."""
    together: int
    """How many examples all workers' shares hold."""
    examples: torch.Tensor
    """(B,) int64, on the CPU: the examples' numbers in the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Examples in batches: the same global batches whatever the number of workers, of which this is number `rank`."""

    inputs: torch.Tensor
    """(N, 3, S, S) uint8 photos, or (N, D) float32 embeddings."""
    labels: torch.Tensor
    """(N,) int64 class numbers."""
    rows: torch.Tensor
    """(M,) int64: which of the N are shown, in order."""
    classes: int
    batch_size: int
    """At most so many examples per global batch; an epoch is cut evenly, so no batch is much smaller."""
    shuffle: bool = False
    policy: str = "none"
    """Augmentation of photos, see `augment.py`."""
    size: int | None = None
    """Side in pixels of the photos that come out; None: as they are."""
    seed: int = 0
    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    """Where the batches are to be, and photos are augmented; `inputs` may be there already, see `near`."""

    def __len__(self) -> int:
        return -(-self.examples // self.batch_size)

    @property
    def examples(self) -> int:
        """How many an epoch shows: one per row, or as many as the policy makes of each."""
        return len(self.rows) * copies(self.policy)

    def epoch(self, number: int, done: int = 0) -> Iterator[Batch]:
        """This worker's share of each batch of epoch `number` but the first `done`.

        Order and augmentation of each photo depend on (seed, number), and on its place among the N, alone.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, number))
        order = torch.randperm(self.examples, generator=generator) if self.shuffle else torch.arange(self.examples)
        for chosen in order.tensor_split(len(self))[done:]:
            mine, partners = (those[self.rank :: self.world] for those in (chosen, chosen.roll(1)))
            shown = self._mixed(mine, partners, number) if mixes(self.policy) else self._shown(mine, number)
            yield Batch(*shown, len(chosen), mine)

    def _photos(self, examples: torch.Tensor) -> tuple[torch.Tensor, Numbers]:
        """Where the `examples` stand among the N, and the numbers that `augment.py` knows them by."""
        each = copies(self.policy)
        rows = self.rows[examples // each]
        return rows, (rows * each + examples % each).numpy()

    def _shown(self, examples: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `examples`, augmented, and their labels."""
        rows, known = self._photos(examples)
        inputs = self.inputs[rows.to(self.inputs.device)].to(self.device)
        labels = self.labels[rows].to(self.device)
        if self.policy != "none" or self.size:
            inputs = augment(inputs, self.policy, self.seed, number, known, self.size)
        return inputs, labels

    def _mixed(self, examples: torch.Tensor, partners: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each example blended with its partner, which may be another worker's, and what is left of both labels."""
        needed, places = torch.unique(torch.cat([examples, partners]), return_inverse=True)
        inputs, labels = self._shown(needed, number)
        targets = F.one_hot(labels, self.classes).float()
        first, second = places.to(self.device).tensor_split(2)
        known = self._photos(examples)[1]
        mixed, left = mix(inputs[first], inputs[second], self.policy, self.seed, number, known)
        share = torch.from_numpy(left).to(self.device, torch.float32)[:, None]
        return mixed, targets[first] * share + targets[second] * (1 - share)


def epoch_seed(seed: int, number: int) -> int:
    """Seed of all that is random in epoch `number`."""
    return (seed * 100_003 + number) % 2**63
