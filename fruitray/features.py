"""Embeddings of a frozen trunk: made once per (index, trunk, preprocessing, augmentation), kept beside the index."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fruitray.augment import VARIANTS, variant
from fruitray.backbones import Classifier
from fruitray.batches import squares
from fruitray.index import Index, index_place
from fruitray.preprocess import stack
from fruitray.storage import Entry, Storage
from fruitray.weights import state_hash

EMBED_BATCH = 32


def features_key(index: Index, model: Classifier, policy: str) -> str:
    """The object, beside the index, that holds exactly these embeddings."""
    trunk = [str(model.trunk), state_hash(model.trunk.state_dict())]  # one file may fit two architectures
    what = [index.sha256, trunk, asdict(model.preprocessing), VARIANTS[policy]]
    return f"features/{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.parquet"


def feature_rows(index: Index, policy: str) -> list[tuple[Entry, str]]:
    """What is embedded, in order: the training photos in each variant of `policy`, then the validation photos as is."""
    training = [(entry, name) for name in VARIANTS[policy] for entry in index.rows("train")[0]]
    return training + [(entry, "original") for entry in index.rows("val")[0]]


def embed(model: Classifier, storage: Storage, rows: Sequence[tuple[Entry, str]], device: torch.device) -> torch.Tensor:
    """(len(rows), D) float32 embeddings."""
    photos = squares(storage, [entry for entry, _ in rows], model.preprocessing)
    shown = (variant(square[None], name)[0] for square, (_, name) in zip(photos, rows, strict=True))
    model = model.to(device).eval()
    with torch.inference_mode():
        return torch.cat([model.embed(stack(batch).to(device)).cpu() for batch in _batched(shown)])


def _batched(photos: Iterator[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    for photo in photos:
        batch.append(photo)
        if len(batch) == EMBED_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def write_features(index_uri: str, key: str, rows: Sequence[tuple[Entry, str]], embeddings: torch.Tensor) -> None:
    """Keep the embeddings of `rows` beside the index; who comes second changes nothing."""
    columns = {"key": [entry.key for entry, _ in rows], "variant": [name for _, name in rows]}
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
