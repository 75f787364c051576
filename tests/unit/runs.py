"""What a run leaves behind, made in this process and small: photos with their index, kept embeddings, a network."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from fruitray.backbones import Classifier, build
from fruitray.batches import CPU
from fruitray.config import ModelConfig
from fruitray.features import features_key, make_parts, missing_parts
from fruitray.images import decode
from fruitray.index import SCHEMA, index_place, read_index, write_index
from fruitray.storage import LocalStorage, open_storage
from fruitray.synthetic import LABELS, draw

TRAIN, VAL = 12, 6
CONFIG = ModelConfig(backbone="cnn", image_size=64)


def write_photos_and_index(folder: Path, seed: int = 0) -> str:
    """Draw `TRAIN` training and `VAL` validation photos of three classes. The URI of their
    index, in which the splits alternate."""
    photos = LocalStorage(str(folder / "photos"))
    for number in range(TRAIN + VAL):
        path = folder / "photos" / LABELS[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(LABELS[number % 3], number + seed, (64, 64)).save(path)
    return index_of_photos(photos, folder / f"index-{seed}", lambda key: int(Path(key).stem) < TRAIN)


def index_of_photos(photos: LocalStorage, out: Path, trains: Callable[[str], bool]) -> str:
    """The URI of an index of `photos`; those train of whose key `trains` says so."""
    rows = [
        {
            "uri": photos.uri_of(entry.key),
            "label": entry.key.partition("/")[0],
            "status": "ok",
            "bytes": entry.size,
            "etag": entry.etag,
            "group": entry.key,
            "split": "train" if trains(entry.key) else "val",
        }
        for entry in photos.list()
    ]
    write_index(LocalStorage(str(out)), pa.Table.from_pylist(rows, SCHEMA), photos.uri)
    return str(out)


def keep_features(index_uri: str, model: Classifier, policy: str = "none", *, folds: bool = False) -> int:
    """What `cluster/embed.py` does, in this process; how many views the trunk saw."""
    index, seen = read_index(index_uri), Counter[str]()
    hook = model.trunk.register_forward_hook(lambda _, inputs, __: seen.update(views=len(inputs[0])))
    key = features_key(index, model)
    for work in missing_parts(index_uri, index, key, policy, folds=folds):
        make_parts(model, open_storage(index.images), index_place(index_uri)[0], key, work, CPU)
    hook.remove()
    return seen["views"]


def network(config: ModelConfig = CONFIG) -> Classifier:
    """A network whose answers differ widely from photo to photo, as those of a fresh one do not."""
    model, size = build(config, 3)[0].eval(), config.image_size
    assert isinstance(size, int)
    photos = [decode(jpeg(draw(LABELS[number % 3], number, (size, size)))) for number in range(9)]
    spread(model, torch.stack([torch.tensor(photo.pixels) for photo in photos]), 4)
    return model


def lively(config: ModelConfig) -> Classifier:
    """An untrained network whose embeddings and answers differ from photo to photo, by more than rounding makes them
    differ, even if batch norm holds it together."""
    model, size = build(config, 3)[0], config.image_size
    photos = torch.from_numpy(np.stack([draw(LABELS[n % 3], n, (size, size)) for n in range(9)])).permute(0, 3, 1, 2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # else the statistics of an untrained network let nothing through
    with torch.no_grad():
        model.train()(photos)
    spread(model.eval(), photos, 1)
    return model


def spread(model: Classifier, photos: torch.Tensor, deviation: float) -> None:
    """Scale the last layer so that over `photos` each logit has mean 0 and this standard deviation."""
    with torch.no_grad():
        logits, last = model(photos), model.head[-1]
        scale = deviation / logits.std(dim=0)
        last.weight *= scale[:, None]
        last.bias.copy_((last.bias - logits.mean(dim=0)) * scale)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """What is read again of a training's state that was kept."""
    file = io.BytesIO()
    torch.save(state, file)
    loaded: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()
