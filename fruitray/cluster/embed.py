"""What is made once before many train: the initial model of a backbone, and the embeddings of its frozen trunk."""

import hashlib
import json
from typing import Any

import pyarrow as pa
import ray.data
import torch

from fruitray.backbones import build, pick_device
from fruitray.cluster.runtime import open_input, stream, worker_count
from fruitray.config import ModelConfig
from fruitray.console import progress
from fruitray.features import (
    View,
    embed,
    feature_rows,
    features_key,
    from_arrow,
    has_features,
    to_arrow,
    write_features,
)
from fruitray.index import Index
from fruitray.package import DESCRIPTION, Package, load_package, save_package
from fruitray.storage import Entry, Storage, open_storage
from fruitray.weights import state_hash

CHUNK = 128


def initial_model(out: Storage, config: ModelConfig, classes: tuple[str, ...], seed: int) -> Package:
    """The package below `out` that every run of this backbone starts from; built and stored by the first who asks.

    Runs that differ in dropout, or in what is frozen, start from the same one.
    """
    start = [config.backbone, config.weights, config.image_size, classes, seed]
    digest = hashlib.sha256(json.dumps(start).encode()).hexdigest()
    place = open_storage(out.uri_of(f"initial/{config.backbone}/{digest[:8]}"))
    if not place.exists(DESCRIPTION):
        model, weights = build(config, len(classes), seed)
        origin = {"source": weights.source, "sha256": weights.sha256}
        facts = {"initial_weights": origin, "state_hash": state_hash(model.state_dict())}
        save_package(place, model, config, classes, facts)
    return load_package(place.uri)


def ensure_features(index_uri: str, index: Index, package: Package, policy: str, *, gpu: bool = False) -> None:
    """Embed the index's photos with the package's trunk, in parallel, unless that is done already."""
    key = features_key(index, package.model, policy)
    if has_features(index_uri, key):
        return
    rows = feature_rows(index, policy)
    columns = {
        "row": range(len(rows)),
        **{name: [getattr(view.entry, name) for view in rows] for name in ("key", "size", "etag")},
        **{name: [getattr(view, name) for view in rows] for name in ("position", "variant")},
    }
    table = pa.table({name: list(values) for name, values in columns.items()})
    chunks = [table.slice(start, CHUNK) for start in range(0, table.num_rows, CHUNK)]
    workers = worker_count(0, gpu=gpu)
    done = []
    with progress(f"embed with {package.description['model']['backbone']}", len(rows), "photos") as advance:
        for result in stream(
            chunks,
            _Embedder,
            fn_constructor_args=(package.uri, index.images, gpu),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(chunks))),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
        ):
            done.append(result)
            advance(result.num_rows)
    embeddings = from_arrow(pa.concat_tables(done).sort_by("row")["embedding"])
    write_features(index_uri, key, rows, embeddings)


class _Embedder:
    """One worker: chunks of rows in, their embeddings out."""

    def __init__(self, package_uri: str, images: str, gpu: bool) -> None:
        torch.set_num_threads(1)
        self._model = load_package(package_uri).model
        self._images, self._device = open_input(images), pick_device(gpu=gpu)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = chunk.to_pylist()
        views = [View(Entry(row["key"], row["size"], row["etag"]), row["position"], row["variant"]) for row in rows]
        embeddings = embed(self._model, self._images, views, self._device)
        return pa.table({"row": chunk["row"], "embedding": to_arrow(embeddings)})
