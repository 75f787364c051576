"""Embeddings of a frozen trunk: made once per (index, trunk, preprocessing, augmentation), kept beside the index."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fruitray.augment import DEGREES, EIGHT, SCALE, VARIANTS, fixed_variants
from fruitray.backbones import Classifier
from fruitray.batches import squares
from fruitray.index import Index, index_place
from fruitray.preprocess import stack
from fruitray.storage import Entry, Storage
from fruitray.weights import state_hash

EMBED_BATCH = 32


class View(NamedTuple):
    """A photo as it is embedded."""

    entry: Entry
    position: int
    """Among the photos of its split."""
    variant: int
    """Which of `augment.EIGHT`."""


def features_key(index: Index, model: Classifier, policy: str) -> str:
    """The object, beside the index, that holds exactly these embeddings."""
    trunk = [str(model.trunk), state_hash(model.trunk.state_dict())]  # one file may fit two architectures
    what = [index.sha256, trunk, asdict(model.preprocessing), VARIANTS[policy], SCALE, DEGREES]
    return f"features/{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.parquet"


def feature_rows(index: Index, policy: str) -> list[View]:
    """What is embedded, in order: each training photo in all variants of `policy`, then the validation photos as is."""
    training, validation = index.rows("train")[0], index.rows("val")[0]
    variants = range(len(VARIANTS[policy]))
    views = [View(entry, position, variant) for position, entry in enumerate(training) for variant in variants]
    return views + [View(entry, position, 0) for position, entry in enumerate(validation)]


def embed(model: Classifier, storage: Storage, rows: Sequence[View], device: torch.device) -> torch.Tensor:
    """(len(rows), D) float32 embeddings. Rows of one photo that follow one another read it once."""
    groups = [(entry, list(views)) for entry, views in groupby(rows, key=lambda view: view.entry)]
    photos = squares(storage, [entry for entry, _ in groups], model.preprocessing)
    shown = ((photo, view) for photo, (_, views) in zip(photos, groups, strict=True) for view in views)
    model = model.to(device).eval()
    with torch.inference_mode():
        return torch.cat([model.embed(_views(batch, device)).cpu() for batch in _batched(shown)])


def _views(batch: Sequence[tuple[torch.Tensor, View]], device: torch.device) -> torch.Tensor:
    """(B, 3, S, S) uint8, each photo in its variant."""
    photos, views = zip(*batch, strict=True)
    positions, variants = (np.array([view[column] for view in views]) for column in (1, 2))
    return fixed_variants(stack(photos).to(device), positions, variants)


def _batched(shown: Iterator[tuple[torch.Tensor, View]]) -> Iterator[list[tuple[torch.Tensor, View]]]:
    while batch := list(islice(shown, EMBED_BATCH)):
        yield batch


def write_features(index_uri: str, key: str, rows: Sequence[View], embeddings: torch.Tensor) -> None:
    """Keep the embeddings of `rows` beside the index; who comes second changes nothing."""
    columns = {"key": [view.entry.key for view in rows], "variant": [EIGHT[view.variant] for view in rows]}
    table = pa.table({**columns, "embedding": to_arrow(embeddings)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    index_place(index_uri)[0].create(key, sink.getvalue().to_pybytes())


def read_features(index_uri: str, key: str) -> torch.Tensor:
    """(rows, D) float32, in the order of `feature_rows`."""
    return from_arrow(pq.read_table(pa.BufferReader(index_place(index_uri)[0].read(key)))["embedding"])


def to_arrow(embeddings: torch.Tensor) -> pa.Array:
    """(N, D) float32 as an Arrow column of N fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.numpy().reshape(-1)), embeddings.shape[1])


def from_arrow(column: pa.ChunkedArray) -> torch.Tensor:
    """The (N, D) float32 tensor that `to_arrow` made a column of."""
    flat = np.asarray(column.combine_chunks().flatten())
    return torch.from_numpy(flat.reshape(len(column), -1).copy())


def has_features(index_uri: str, key: str) -> bool:
    """Whether these embeddings are kept already."""
    return index_place(index_uri)[0].exists(key)
