"""Behaviour of the kept embeddings, and of the recipes that train on them or on the photos."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from fruitray.backbones import Classifier, build, freeze
from fruitray.config import FitConfig, ModelConfig
from fruitray.errors import NotFoundError, OutputConflictError, UsageError
from fruitray.features import embed, feature_rows, features_key, has_features, read_features, write_features
from fruitray.fit import fit
from fruitray.index import SCHEMA, Index, read_index, write_index
from fruitray.recipe import Recipe, make_recipe
from fruitray.storage import LocalStorage, open_storage
from fruitray.synthetic import LABELS, draw
from tests.tables import index_of, photo, singles

CPU = torch.device("cpu")
TRAIN, VAL = 12, 6


@pytest.fixture
def index_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An index of twelve training and six validation photos."""
    monkeypatch.setenv("FRUITRAY_CACHE", str(tmp_path / "cache"))
    return write_photos_and_index(tmp_path)


def write_photos_and_index(folder: Path, seed: int = 0) -> str:
    photos = LocalStorage(str(folder / "photos"))
    for number in range(TRAIN + VAL):
        path = folder / "photos" / LABELS[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(LABELS[number % 3], number + seed, (64, 64)).save(path)
    rows = [
        {
            "uri": photos.uri_of(entry.key),
            "label": entry.key.partition("/")[0],
            "bytes": entry.size,
            "etag": entry.etag,
            "split": "train" if int(Path(entry.key).stem) < TRAIN else "val",
        }
        for entry in photos.list()
    ]
    out = folder / f"index-{seed}"
    write_index(LocalStorage(str(out)), pa.Table.from_pylist(rows, SCHEMA), photos.uri)
    return str(out)


def network(seed: int = 0, **settings: Any) -> Classifier:
    """One without batch norm, so that its trunk computes the same in training as in evaluation."""
    return build(ModelConfig(**{"backbone": "cnn", "image_size": 64, "dropout": 0.3, **settings}), 3, seed)[0]


def keep_features(index_uri: str, model: Classifier, policy: str = "none") -> None:
    """What `cluster/embed.py` does, in this process."""
    index = read_index(index_uri)
    rows = feature_rows(index, policy)
    embeddings = embed(model, open_storage(index.images), rows, CPU)
    write_features(index_uri, features_key(index, model, policy), rows, embeddings)


def recipe(index_uri: str, model: Classifier, *, frozen: bool, **settings: Any) -> Recipe:
    config = FitConfig(**{"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "augment": "none", **settings})
    return make_recipe(index_uri, read_index(index_uri), model, config, frozen=frozen)


def trained(recipe: Recipe) -> list[float]:
    """Train by the recipe; the losses of each epoch."""
    config = FitConfig(epochs=3, batch_size=4, learning_rate=0.01)
    epochs = fit(recipe.module, recipe.train, recipe.val, config, device=CPU)
    return [loss for epoch in epochs for loss in (epoch.train_loss, epoch.val_loss)]


def logits(model: Classifier, photos: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(photos)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for bfloat16, in which the trunk may compute, and which depends on the batch's size."""
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("policy", ["none", "eightfold"])
def test_training_the_head_on_embeddings_equals_training_it_through_the_frozen_trunk(
    index_uri: str, policy: str
) -> None:
    short, long = network(), network()
    keep_features(index_uri, short, policy)
    freeze(long)
    through_trunk = recipe(index_uri, long, frozen=False, augment=policy)
    on_embeddings = recipe(index_uri, short, frozen=True, augment=policy)
    assert on_embeddings.train.examples == through_trunk.train.examples
    assert trained(on_embeddings) == pytest.approx(trained(through_trunk), rel=0.02)
    photos = through_trunk.val.inputs
    close(logits(short, photos), logits(long, photos))
    assert not torch.allclose(logits(short, photos), logits(network(), photos), atol=0.1), "nothing was learned"


def test_a_recipe_on_embeddings_leaves_the_trunk_alone(index_uri: str) -> None:
    model, before = network(), network().trunk.state_dict()
    keep_features(index_uri, model)
    trained(recipe(index_uri, model, frozen=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trunk.state_dict().items())


def test_every_variant_is_embedded_and_keeps_its_label(index_uri: str) -> None:
    model = network()
    keep_features(index_uri, model, "mirror")
    photos = recipe(index_uri, model, frozen=False)
    kept = recipe(index_uri, model, frozen=True, augment="mirror")
    shown = torch.stack([photos.train.inputs, photos.train.inputs.flip(3)], 1).flatten(0, 1)
    with torch.inference_mode():
        close(kept.train.inputs, model.eval().embed(shown))
        close(kept.val.inputs, model.embed(photos.val.inputs))
    assert kept.train.labels.tolist() == photos.train.labels.repeat_interleave(2).tolist()
    assert kept.val.labels.tolist() == photos.val.labels.tolist()
    assert not torch.allclose(kept.train.inputs[::2], kept.train.inputs[1::2], atol=0.02)


def test_a_recipe_on_photos_holds_each_split_in_index_order(index_uri: str) -> None:
    index, made = read_index(index_uri), recipe(index_uri, network(), frozen=False, augment="mirror")
    assert made.train.inputs.shape == (TRAIN, 3, 64, 64)
    assert made.val.inputs.shape == (VAL, 3, 64, 64)
    assert made.train.labels.tolist() == index.rows("train")[1]
    assert (made.train.policy, made.val.policy) == ("mirror", "none")
    assert made.train.shuffle
    assert not made.val.shuffle


def test_the_key_names_all_that_the_embeddings_follow_from(tmp_path: Path, index_uri: str) -> None:
    index, model = read_index(index_uri), network()
    other = Classifier(model.trunk, model.head, replace(model.preprocessing, mean=(0.4, 0.5, 0.5)))
    leaky = network()
    leaky.trunk[1] = nn.LeakyReLU()  # the same tensors, another function
    keys = [
        features_key(index, model, "none"),
        *(features_key(index, model, policy) for policy in ("mirror", "flips", "eightfold")),
        features_key(index, network(seed=1), "none"),
        features_key(index, other, "none"),
        features_key(index, leaky, "none"),
        features_key(read_index(write_photos_and_index(tmp_path / "other", seed=50)), model, "none"),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_depend_on_the_head(index_uri: str) -> None:
    index, model, other = read_index(index_uri), network(), network()
    nn.init.zeros_(other.head[-1].weight)
    assert features_key(index, model, "none") == features_key(index, other, "none")


@pytest.mark.parametrize("place", ["", "/", "/index.parquet"])
def test_embeddings_come_back_bit_by_bit(index_uri: str, place: str) -> None:
    rows = feature_rows(read_index(index_uri), "mirror")
    embeddings = torch.randn(len(rows), 7)
    assert not has_features(index_uri + place, "features/a.parquet")
    write_features(index_uri + place, "features/a.parquet", rows, embeddings)
    assert has_features(index_uri + place, "features/a.parquet")
    assert torch.equal(read_features(index_uri + place, "features/a.parquet"), embeddings)


def test_who_writes_second_changes_nothing(index_uri: str) -> None:
    rows = feature_rows(read_index(index_uri), "none")
    first = torch.randn(len(rows), 7)
    for embeddings in (first, torch.zeros(len(rows), 7)):
        write_features(index_uri, "features/a.parquet", rows, embeddings)
    assert torch.equal(read_features(index_uri, "features/a.parquet"), first)


def test_embedding_in_parts_equals_embedding_at_once(index_uri: str) -> None:
    index, model = read_index(index_uri), network(backbone="mobilenet_v2", weights="none").train()
    rows, photos = feature_rows(index, "mirror"), open_storage(index.images)
    parts = torch.cat([embed(model, photos, rows[start : start + 7], CPU) for start in range(0, len(rows), 7)])
    close(parts, embed(model, photos, rows, CPU))


def test_a_photo_is_read_once_for_all_its_variants(index_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index, read = read_index(index_uri), []
    original = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, key, *rest: read.append(key) or original(self, key, *rest))
    embeddings = embed(network(), open_storage(index.images), feature_rows(index, "eightfold"), CPU)
    assert len(embeddings) == 8 * TRAIN + VAL
    assert len(read) == len(set(read)) == TRAIN + VAL


def test_the_reports_eightfold_set_is_of_training_photos_alone() -> None:
    """4,141 photos, copies among them, give 26,496 + 829; what validates is in no variant of what trains."""
    near = [photo("tomato", look, change) for look in range(1, 31) for change in (1, 2)]
    rows = [*singles("cherry", 1300), *singles("strawberry", 1400), *singles("tomato", 1381), *near]
    index = Index(index_of(rows), "/p", "")
    views = feature_rows(index, "eightfold")
    training, validation = views[:26_496], views[26_496:]
    assert Counter(view.variant for view in training) == dict.fromkeys(range(8), 3312)
    assert [view.variant for view in validation] == [0] * 829
    groups = dict(zip(index.table["uri"].to_pylist(), index.table["group"].to_pylist(), strict=True))
    trained, validated = (
        {groups[f"/p/{view.entry.key}"] or view.entry.key for view in side} for side in (training, validation)
    )
    assert trained
    assert validated
    assert not trained & validated


def test_validation_holds_originals_only(index_uri: str) -> None:
    model = network()
    keep_features(index_uri, model, "eightfold")
    keep_features(index_uri, model, "none")
    plain, eightfold = (recipe(index_uri, model, frozen=True, augment=policy) for policy in ("none", "eightfold"))
    close(eightfold.val.inputs, plain.val.inputs)
    photos = recipe(index_uri, model, frozen=False, augment="eightfold").val
    assert (photos.policy, photos.examples, len(photos.inputs)) == ("none", VAL, VAL)


def test_a_photo_that_changed_is_not_embedded(index_uri: str) -> None:
    index: Index = read_index(index_uri)
    rows, photos = feature_rows(index, "none"), open_storage(index.images)
    victim = rows[4][0].key
    draw("cherry", 99, (64, 64)).save(photos.uri_of(victim))
    with pytest.raises(OutputConflictError, match=victim):
        embed(network(), photos, rows, CPU)


def test_a_recipe_without_its_embeddings_is_an_error(index_uri: str) -> None:
    with pytest.raises(NotFoundError, match="features"):
        recipe(index_uri, network(), frozen=True)


def test_a_batch_too_small_for_the_workers_is_refused(index_uri: str) -> None:
    config = FitConfig(batch_size=2, augment="none")
    with pytest.raises(UsageError, match="batch-size 2"):
        make_recipe(index_uri, read_index(index_uri), network(), config, frozen=False, rank=0, world=3)
