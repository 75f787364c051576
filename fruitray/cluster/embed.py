"""What is made once before many train: the initial model of a backbone, and the embeddings of its frozen trunk."""

import hashlib
import json
import random
from dataclasses import asdict

import pyarrow as pa
import ray.data
import torch

from fruitray.backbones import allow_tf32, build, reserved_device
from fruitray.cluster.placement import worker_count
from fruitray.cluster.runtime import open_input, stream
from fruitray.config import FitConfig, ModelConfig
from fruitray.console import progress, say
from fruitray.features import Block, Work, features_key, make_parts, missing_parts
from fruitray.index import Index, index_place
from fruitray.package import DESCRIPTION, Package, load_package, save_package
from fruitray.storage import Entry, Storage, open_storage
from fruitray.weights import state_hash


def initial_model(out: Storage, config: ModelConfig, classes: tuple[str, ...], seed: int) -> Package:
    """The package below `out` that every run of this backbone starts from; built and stored by the first who asks.

    Runs that differ in dropout, or in what is frozen, start from the same one.
    """
    start = [config.backbone, config.weights, config.hidden, config.image_size, config.crop, classes, seed]
    digest = hashlib.sha256(json.dumps(start).encode()).hexdigest()
    place = open_storage(out.uri_of(f"initial/{config.backbone}/{digest[:8]}"))
    if not place.exists(DESCRIPTION):
        model, weights = build(config, len(classes), seed)
        origin = {"source": weights.source, "sha256": weights.sha256}
        facts = {"initial_weights": origin, "state_hash": state_hash(model.state_dict())}
        save_package(place, model, config, classes, facts)
    return load_package(place.uri)


def ensure_features(
    index_uri: str, index: Index, package: Package, fit: FitConfig, *, folds: bool = False, gpu: bool = False
) -> None:
    """Embed the index's photos with the package's trunk, as far as `fit` needs it and nobody has done it.

    `folds`: for cross-validation, where validation photos are trained on, too.
    """
    package.model.full_precision = fit.full_precision
    key = features_key(index, package.model)
    work = _shuffled(missing_parts(index_uri, index, key, fit.augment, folds=folds))
    if not work:
        return
    views, made = sum(each.views for each in work), 0
    with progress(f"embed with {package.description['model']['backbone']}", views, "views") as advance:
        for done in stream(
            [pa.Table.from_pylist([{"block": asdict(each.block), "variants": each.variants}]) for each in work],
            _Embedder,
            fn_constructor_args=(package.uri, index.images, index_uri, key, gpu, fit.full_precision),
            compute=ray.data.ActorPoolStrategy(size=min(worker_count(0, gpu=gpu), len(work))),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
        ):
            made += sum(done["made"].to_pylist())
            advance(sum(done["views"].to_pylist()))
    if made < views:
        say(f"embed: {views - made:,} of these views were made by another job, or by a worker that was lost")


def _shuffled(work: list[Work]) -> list[Work]:
    """In an order of this job's own: two that kept the same one would, where they meet, do everything twice."""
    draw = random.SystemRandom()
    return [Work(block, draw.sample(variants, len(variants))) for block, variants in draw.sample(work, len(work))]


class _Embedder:
    """One worker: a block and variants in, their parts kept, counts out."""

    def __init__(
        self, package_uri: str, images: str, index_uri: str, key: str, gpu: bool, full_precision: bool
    ) -> None:
        torch.set_num_threads(1)
        self._model = load_package(package_uri).model
        self._model.full_precision = full_precision
        self._photos, self._beside, self._key = open_input(images), index_place(index_uri)[0], key
        self._device = reserved_device(gpu=gpu)
        if self._device.type == "cuda":
            allow_tf32(not full_precision)

    def __call__(self, task: pa.Table) -> pa.Table:
        [row] = task.to_pylist()
        entries = [Entry(**entry) for entry in row["block"].pop("entries")]
        work = Work(Block(entries=entries, **row["block"]), row["variants"])
        made = make_parts(self._model, self._photos, self._beside, self._key, work, self._device)
        return pa.table({"views": [work.views], "made": [made]})
