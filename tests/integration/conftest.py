"""What several integration tests need beside a cluster and a storage."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from fruitray.backbones import build
from fruitray.batches import CPU
from fruitray.config import FitConfig, ModelConfig
from fruitray.final import history_row
from fruitray.fit import fit
from fruitray.index import Index, read_index, write_index
from fruitray.package import save_package
from fruitray.recipe import make_recipe
from fruitray.s3server import S3Server
from fruitray.steps import use_threads
from fruitray.storage import open_storage
from fruitray.synthetic import LABELS, draw
from tests.cluster import Cluster, Nodes, ray_head
from tests.conftest import new_bucket
from tests.unit.photos import sixty
from tests.unit.runs import jpeg, spread


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights files, untrained: what counts here is the path they take."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, options in {"mobilenet_v2": {}, "resnet18": {"zero_init_residual": True}}.items():
        save_file(torchvision.models.get_model(name, **options).state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def drawn(s3: S3Server, cluster: Cluster) -> tuple[dict[str, bytes], Index]:
    """60 photos by key, and what `prepare` says of them."""
    photos = sixty()
    with pytest.MonkeyPatch.context() as environment:
        root = f"s3://{new_bucket(s3, environment)}"
        _write(f"{root}/raw", photos)
        code, printed = cluster.run("prepare", "--images", f"{root}/raw", "--out", f"{root}/index")
        assert code == 0, printed
        return photos, read_index(f"{root}/index")


@pytest.fixture
def place(aws: str, drawn: tuple[dict[str, bytes], Index]) -> str:
    """A prefix with 60 photos below raw/ and their index below index/."""
    photos, index = drawn
    root = f"s3://{aws}"
    _write(f"{root}/raw", photos)
    uris = pc.replace_substring(index.table["uri"], index.images, f"{root}/raw")
    table = index.table.set_column(index.table.column_names.index("uri"), "uri", uris)
    write_index(open_storage(f"{root}/index"), table, f"{root}/raw")
    return root


def _write(uri: str, photos: dict[str, bytes]) -> None:
    storage = open_storage(uri)
    for key, data in photos.items():
        storage.write(key, data)


@pytest.fixture(scope="module")
def nodes(s3: S3Server) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(stack.enter_context(ray_head(s3.environment, cpus=0)), stack)


def trained_here(cluster: Cluster, model: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """(history, weights) of the training that `train` has done into `model`, once more: by this process alone."""
    with pytest.MonkeyPatch.context() as environment, ThreadPoolExecutor(1) as thread:  # which may compute as it likes
        environment.setenv("FRUITRAY_CACHE", cluster.environment["FRUITRAY_CACHE"])
        return thread.submit(_train_here, json.loads(open_storage(model).read("train.json"))).result()


def _train_here(config: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    use_threads(2)
    index, fit_config = read_index(config["index"]), FitConfig(**config["fit"])
    network, _ = build(ModelConfig(**config["model"]), len(index.classes), fit_config.seed)
    recipe = make_recipe(config["index"], index, network, fit_config, frozen=False)
    epochs = fit(recipe.module, recipe.train, recipe.val, fit_config, device=CPU)
    return [history_row(epoch) for epoch in epochs], network.state_dict()


SCORED = 240
"""Photos that `scorable` has."""
LARGE = (1200, 900)
"""Pixels of one of them, which is decoded at a quarter of that."""


@pytest.fixture(scope="session")
def calm(s3: S3Server, cluster: Cluster) -> str:
    """A prefix with a package of an untrained network below model/, photos below raw/, and below calm/ what `score`
    makes of them when nothing disturbs it."""
    with pytest.MonkeyPatch.context() as environment:
        root = f"s3://{new_bucket(s3, environment)}"
        fill_scorable(root)
        code, printed = cluster.run("score", *score_arguments(root, "calm"))
        assert code == 0, printed
        return root


@pytest.fixture
def scorable(aws: str, calm: str) -> str:
    """The prefix of `calm`; outputs of this test need names of their own. `aws` leads there."""
    return calm


def score_arguments(root: str, out: str) -> list[str]:
    """Of a run with small shards on two workers."""
    places = ["--package", f"{root}/model", "--images", f"{root}/raw", "--out", f"{root}/{out}"]
    return [*places, "--shard-rows", "2", "--workers", "2", "--engine", "eager"]


def fill_scorable(root: str) -> None:
    """Write a package, and `SCORED` photos of three classes, some of them corrupt, one of them large."""
    save_untrained(f"{root}/model")
    raw, photos = open_storage(f"{root}/raw"), list(sixty().items())
    raw.write("cherry/large.jpg", jpeg(draw("cherry", 0, LARGE)))
    for number in range(1, SCORED):
        key, data = photos[number % len(photos)]
        folder, _, name = key.rpartition("/")
        raw.write(f"{folder}/{number:03d} {name}", data)


def save_untrained(uri: str) -> None:
    """A package of a network that nobody has trained, but whose answers differ from photo to photo, as those of a fresh
    one do not: its batch norms have seen photos, and its head is scaled to what comes out of them."""
    config = ModelConfig(backbone="cnn_bn", image_size=96)
    model, _ = build(config, classes=3)
    drawn = [np.asarray(draw(LABELS[number % 3], number, (96, 96))) for number in range(30)]
    squares = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    for norm in [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
        norm.momentum = None  # an average over all that it sees
    with torch.no_grad():
        model.train()(squares)
    spread(model.eval(), squares, 0.5)
    save_package(open_storage(uri), model, config, ("cherry", "strawberry", "tomato"), {})
