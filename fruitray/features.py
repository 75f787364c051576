"""Embeddings of a frozen trunk, kept beside the index in parts that are made once and shared.

    features/KEY/SPLIT-VARIANT-BLOCK.parquet    create-only: key, embedding; a row per photo of the block

KEY follows from all that an embedding follows from. A policy only says which variants it needs, so policies share
parts; what a killed job had made stays; and jobs at the same work take turns.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from fruitray.augment import DEGREES, EIGHT, SCALE, VARIANTS, fixed_variants
from fruitray.backbones import Classifier
from fruitray.batches import squares
from fruitray.errors import OutputConflictError
from fruitray.index import Index, Pool, index_place
from fruitray.memory import full_gpu_told, in_halves, keep_freed_memory
from fruitray.preprocess import stack
from fruitray.storage import Entry, Storage
from fruitray.tables import parquet, read_parquet
from fruitray.weights import state_hash

BLOCK = 128
"""Photos in a part: what a worker holds, and what it loses when it is killed."""
EMBED_BATCH = 32
"""Views per forward pass."""
READERS = 16
"""Parts that are read at once."""


@dataclass(frozen=True, slots=True)
class Block:
    """At most `BLOCK` photos of one split, in the pool's order; all of them but a split's last one are full."""

    split: str
    number: int
    entries: list[Entry]
    positions: list[int]

    def part(self, key: str, variant: str) -> str:
        """The object, beside the index, that holds these photos as `variant`."""
        return f"{key}/{self.split}-{variant}-{self.number:06}.parquet"


class Work(NamedTuple):
    """A block, and those of its parts that are to be made."""

    block: Block
    variants: list[str]

    @property
    def views(self) -> int:
        """How many embeddings that takes."""
        return len(self.block.entries) * len(self.variants)


def features_key(index: Index, model: Classifier) -> str:
    """The folder, beside the index, of all embeddings of these photos by this trunk."""
    trunk = [str(model.trunk), state_hash(model.trunk.state_dict())]  # one file may fit two architectures
    shown = [asdict(model.preprocessing), model.preprocessing.enough, SCALE, DEGREES]
    what = [index.sha256, trunk, model.full_precision, shown, BLOCK]
    return f"features/{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}"


def blocks(pool: Pool, split: str) -> Iterator[Block]:
    """The photos of `split`, cut into blocks."""
    positions = [position for position, its in enumerate(pool.splits) if its == split]
    for number, start in enumerate(range(0, len(positions), BLOCK)):
        chosen = positions[start : start + BLOCK]
        yield Block(split, number, [pool.entries[position] for position in chosen], chosen)


def missing_parts(index_uri: str, index: Index, key: str, policy: str, *, folds: bool = False) -> list[Work]:
    """What is still to be made for `policy`: training photos are needed in all its variants, validation photos as they
    are or, where `folds` will train on them, too, in all as well."""
    there = {entry.key for entry in index_place(index_uri)[0].list(f"{key}/")}
    pool, work = index.pool(), []
    for split in ("train", "val"):
        needed = VARIANTS[policy] if folds or split == "train" else VARIANTS["none"]
        for block in blocks(pool, split):
            missing = [variant for variant in needed if block.part(key, variant) not in there]
            work += [Work(block, missing)] if missing else []
    return work


def make_parts(model: Classifier, photos: Storage, beside: Storage, key: str, work: Work, device: torch.device) -> int:
    """Embed and keep what nobody has made by now; how many views that were. The photos are read once, or not at all.

    Raises:
        OutputConflictError: a photo is no longer what the index says.
    """
    block, decoded, made = work.block, None, 0
    for variant in work.variants:
        part = block.part(key, variant)
        if beside.exists(part):
            continue
        if decoded is None:
            decoded = stack(list(squares(photos, block.entries, model.preprocessing)))
        embeddings = embed(model, decoded, block.positions, variant, device)
        beside.create(part, _to_parquet(block, embeddings))
        made += len(embeddings)
    return made


def embed(
    model: Classifier, photos: torch.Tensor, positions: Sequence[int], variant: str, device: torch.device
) -> torch.Tensor:
    """(N, 3, S, S) uint8 photos, by their positions in the pool, each as `variant` -> (N, D) float32 embeddings."""
    keep_freed_memory()
    embedded = []
    with torch.inference_mode(), full_gpu_told():
        model = model.to(device).eval()
        for start in range(0, len(photos), EMBED_BATCH):
            places = np.array(positions[start : start + EMBED_BATCH])
            batch = photos[start : start + EMBED_BATCH].to(device)
            shown = fixed_variants(batch, places, np.full(len(places), EIGHT.index(variant)))
            embedded.append(in_halves(model.embed, shown, torch.cat).cpu())
        return torch.cat(embedded)


def _to_parquet(block: Block, embeddings: torch.Tensor) -> bytes:
    column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.numpy().reshape(-1)), embeddings.shape[1])
    table = pa.table({"key": [entry.key for entry in block.entries], "embedding": column})
    return parquet(table, use_dictionary=False)


def read_features(index_uri: str, index: Index, key: str, split: str, variants: Sequence[str]) -> torch.Tensor:
    """(N, V, D) float32: the photos of `split` in the pool's order, each in all of `variants`.

    Raises:
        NotFoundError: a part was not made, see `cluster/embed.py`.
        OutputConflictError: a part is damaged, or holds other photos.
    """
    beside, cut = index_place(index_uri)[0], list(blocks(index.pool(), split))
    wanted = [(block, column, block.part(key, name)) for block in cut for column, name in enumerate(variants)]
    features = np.empty((sum(len(block.entries) for block in cut), len(variants), 0), np.float32)
    with ThreadPoolExecutor(READERS) as threads:
        parts = threads.map(lambda each: _read_part(beside, each[2], each[0]), wanted)
        for (block, column, part), embeddings in zip(wanted, parts, strict=True):
            if not features.size:  # the first one says how wide they are
                features = np.empty((*features.shape[:2], embeddings.shape[1]), np.float32)
            if embeddings.shape[1] != features.shape[2]:
                raise _foreign(beside.uri_of(part))
            start = block.number * BLOCK
            features[start : start + len(embeddings), column] = embeddings
    return torch.from_numpy(features)


def _read_part(beside: Storage, part: str, block: Block) -> NDArray[np.float32]:
    """(photos of the block, D)."""
    data = beside.read(part)
    try:
        table = read_parquet(beside.uri_of(part), data)
        keys, column = table["key"].to_pylist(), table["embedding"].combine_chunks()
        embeddings: NDArray[np.float32] = np.asarray(column.flatten()).reshape(len(keys), column.type.list_size)
    except (OutputConflictError, pa.ArrowException, KeyError, ValueError, AttributeError) as error:  # of any type
        raise _foreign(beside.uri_of(part)) from error
    if keys != [entry.key for entry in block.entries] or embeddings.dtype != np.float32:
        raise _foreign(beside.uri_of(part))
    return embeddings


def _foreign(uri: str) -> OutputConflictError:
    return OutputConflictError(uri, "is damaged, or not the embeddings of the indexed photos; delete it and run again")
