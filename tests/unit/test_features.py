"""Behaviour of the kept embeddings, and of the recipes that train on them or on the photos."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from fruitray import backbones, features
from fruitray.augment import EIGHT, VARIANTS, fixed_variants
from fruitray.backbones import Classifier, build, freeze
from fruitray.batches import squares
from fruitray.config import FitConfig, ModelConfig
from fruitray.errors import GpuFullError, NotFoundError, OutputConflictError, UsageError
from fruitray.features import Work, blocks, embed, features_key, make_parts, missing_parts, read_features
from fruitray.fit import fit
from fruitray.index import Index, index_place, read_index
from fruitray.recipe import Recipe, make_recipe
from fruitray.storage import LocalStorage, open_storage
from fruitray.synthetic import LABELS, draw
from tests.tables import index_of, photo, singles
from tests.unit.runs import TRAIN, VAL, index_of_photos, keep_features, lively, write_photos_and_index

CPU = torch.device("cpu")


@pytest.fixture
def index_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An index of twelve training and six validation photos, in three and two blocks; the splits alternate in it."""
    monkeypatch.setattr(features, "BLOCK", 5)
    monkeypatch.setenv("FRUITRAY_CACHE", str(tmp_path / "cache"))
    return write_photos_and_index(tmp_path)


def network(seed: int = 0, **settings: Any) -> Classifier:
    """One without batch norm, so that its trunk computes the same in training as in evaluation."""
    return build(ModelConfig(**{"backbone": "cnn", "image_size": 64, "dropout": 0.3, **settings}), 3, seed)[0]


def kept(index_uri: str, model: Classifier, split: str = "train", variants: Sequence[str] = EIGHT) -> torch.Tensor:
    """(N, V, D) of what is kept."""
    index = read_index(index_uri)
    return read_features(index_uri, index, features_key(index, model), split, variants)


def parts(index_uri: str) -> list[Path]:
    return sorted(Path(index_uri).glob("features/*/*"))


def recipe(index_uri: str, model: Classifier, *, frozen: bool, **settings: Any) -> Recipe:
    config = FitConfig(**{"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "augment": "none", **settings})
    return make_recipe(index_uri, read_index(index_uri), model, config, frozen=frozen)


def trained(recipe: Recipe) -> list[float]:
    """Train by the recipe; the losses of each epoch, and its accuracy."""
    config = FitConfig(epochs=3, batch_size=4, learning_rate=0.01)
    epochs = fit(recipe.module, recipe.train, recipe.val, config, device=CPU)
    return [value for epoch in epochs for value in (epoch.train_loss, epoch.val_loss, epoch.accuracy)]


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


def test_real_weights_reach_the_same_accuracy_with_and_without_kept_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Path, shared_weights: Path
) -> None:
    """The trunk's batch norms must not learn from the photos, nor differ in training."""
    monkeypatch.setenv("FRUITRAY_CACHE", str(tmp_path / "cache"))
    for label in LABELS:
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number, path in enumerate(sorted((shared_data / "vuw-fruit" / label).iterdir())[:40]):
            shutil.copy(path, tmp_path / "photos" / label / f"{number}.jpg")
    photos = LocalStorage(str(tmp_path / "photos"))
    uri = index_of_photos(photos, tmp_path / "index", lambda key: int(Path(key).stem) >= 20)
    config = FitConfig(epochs=3, batch_size=8, learning_rate=1e-3, augment="eightfold", full_precision=True)
    accuracies = []  # in bfloat16 its last bit may tell a photo's class
    for cached in (True, False):
        model = network(backbone="mobilenet_v2", weights=str(shared_weights), image_size=96)
        model.full_precision = True
        if cached:
            keep_features(uri, model, "eightfold")
        plan = make_recipe(uri, read_index(uri), model, config, frozen=True, cached=cached)
        epochs = fit(plan.module, plan.train, plan.val, config, device=CPU)
        accuracies.append([epoch.accuracy for epoch in epochs])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=1e-3)
    assert accuracies[0][-1] > 0.45, "they were to learn"


def test_a_recipe_on_embeddings_leaves_the_trunk_alone(index_uri: str) -> None:
    model, before = network(), network().trunk.state_dict()
    keep_features(index_uri, model)
    trained(recipe(index_uri, model, frozen=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trunk.state_dict().items())


def test_every_variant_is_embedded_and_keeps_its_label(index_uri: str) -> None:
    model = network()
    keep_features(index_uri, model, "mirror")
    photos = recipe(index_uri, model, frozen=False)
    embedded = recipe(index_uri, model, frozen=True, augment="mirror")
    squares, labels = photos.train.inputs[photos.train.rows], photos.train.labels[photos.train.rows]
    shown = torch.stack([squares, squares.flip(3)], 1).flatten(0, 1)
    with torch.inference_mode():
        close(embedded.train.inputs, model.eval().embed(shown))
        close(embedded.val.inputs, model.embed(photos.val.inputs[photos.val.rows]))
    assert embedded.train.labels.tolist() == labels.repeat_interleave(2).tolist()
    assert embedded.val.labels.tolist() == photos.val.labels[photos.val.rows].tolist()
    assert not torch.allclose(embedded.train.inputs[::2], embedded.train.inputs[1::2], atol=0.02)


def test_a_recipe_on_photos_holds_each_split_in_index_order(index_uri: str) -> None:
    index, made = read_index(index_uri), recipe(index_uri, network(), frozen=False, augment="mirror")
    assert made.train.inputs.shape == (TRAIN + VAL, 3, 64, 64)
    assert (made.train.examples, made.val.examples) == (TRAIN, VAL)
    assert sorted([*made.train.rows.tolist(), *made.val.rows.tolist()]) == list(range(TRAIN + VAL))
    assert made.train.labels[made.train.rows].tolist() == index.rows("train")[1]
    assert made.val.labels[made.val.rows].tolist() == index.rows("val")[1]
    assert (made.train.policy, made.val.policy) == ("mirror", "none")
    assert made.train.shuffle
    assert not made.val.shuffle


def test_full_precision_trains_in_float32(index_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "fast_in_bfloat16", lambda device: True)
    for precise in (True, False):
        made = recipe(index_uri, network(), frozen=False, full_precision=precise)
        given: list[torch.dtype] = []
        made.model.trunk.register_forward_hook(lambda _, __, embedding, given=given: given.append(embedding.dtype))
        trained(made)
        assert set(given) == {torch.float32 if precise else torch.bfloat16}


def test_the_key_names_all_that_the_embeddings_follow_from(tmp_path: Path, index_uri: str) -> None:
    index, model = read_index(index_uri), network()
    other = Classifier(model.trunk, model.head, replace(model.preprocessing, mean=(0.4, 0.5, 0.5)))
    precise = network()
    precise.full_precision = True
    leaky = network()
    leaky.trunk[1] = nn.LeakyReLU()  # the same tensors, another function
    keys = [
        features_key(index, model),
        features_key(index, network(seed=1)),
        features_key(index, other),
        features_key(index, precise),
        features_key(index, leaky),
        features_key(read_index(write_photos_and_index(tmp_path / "other", seed=50)), model),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_depend_on_the_head(index_uri: str) -> None:
    index, model, other = read_index(index_uri), network(), network()
    nn.init.zeros_(other.head[-1].weight)
    assert features_key(index, model) == features_key(index, other)


@pytest.mark.parametrize(
    "steps",
    [
        {"eightfold": 8 * TRAIN + VAL, "flips": 0, "mirror": 0, "none": 0},
        {"none": TRAIN + VAL, "mirror": TRAIN, "eightfold": 6 * TRAIN},
    ],
)
def test_policies_share_what_they_have_in_common(index_uri: str, steps: dict[str, int]) -> None:
    assert {policy: keep_features(index_uri, network(), policy) for policy in steps} == steps


def test_folds_train_on_every_photo_so_they_need_all_variants_of_each(index_uri: str) -> None:
    model = network()
    assert keep_features(index_uri, model, "mirror") == 2 * TRAIN + VAL
    assert keep_features(index_uri, model, "mirror", folds=True) == VAL
    assert keep_features(index_uri, model, "none", folds=True) == 0
    assert kept(index_uri, model, "val", VARIANTS["mirror"]).shape == (VAL, 2, 120)


def test_what_is_lost_is_made_again_bit_by_bit_and_nothing_else(index_uri: str) -> None:
    model = network(backbone="mobilenet_v2", weights="none")
    keep_features(index_uri, model, "eightfold")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in parts(index_uri)}
    assert len(before) == 3 * 8 + 2
    lost = list(before)[::5]
    for path in lost:
        path.unlink()
    views = sum(pq.ParquetFile(pa.BufferReader(before[path][0])).metadata.num_rows for path in lost)
    assert keep_features(index_uri, model, "eightfold") == views
    assert {path: path.read_bytes() for path in parts(index_uri)} == {path: data for path, (data, _) in before.items()}
    assert all(path.stat().st_mtime_ns == before[path][1] for path in before.keys() - lost)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_row_is_the_photo_of_its_position_in_its_variant(index_uri: str, split: str) -> None:
    index, model = read_index(index_uri), network()
    keep_features(index_uri, model, "eightfold", folds=True)
    pool, found = index.pool(), kept(index_uri, model, split)
    positions = [position for position, its in enumerate(pool.splits) if its == split]
    assert found.shape == (len(positions), 8, 120)
    assert found.dtype == torch.float32
    assert positions != list(range(len(positions)))
    photos = open_storage(index.images)
    for row, position in enumerate(positions):
        [square] = squares(photos, [pool.entries[position]], model.preprocessing)
        shown = fixed_variants(square.expand(8, -1, -1, -1), np.full(8, position), np.arange(8))
        with torch.inference_mode():
            close(found[row], model.eval().embed(shown))


def test_variants_come_back_in_the_order_asked_for(index_uri: str) -> None:
    model = network()
    keep_features(index_uri, model, "flips")
    found = kept(index_uri, model, variants=VARIANTS["flips"])
    assert torch.equal(kept(index_uri, model, variants=("v", "original")), found[:, [2, 0]])


@pytest.mark.parametrize("place", ["", "/", "/index.parquet"])
def test_an_index_is_named_by_folder_or_file(index_uri: str, place: str) -> None:
    assert keep_features(index_uri + place, network()) == TRAIN + VAL
    assert kept(index_uri + place, network(), "val", VARIANTS["none"]).shape == (VAL, 1, 120)
    assert len(parts(index_uri)) == 5


def test_an_embedding_hardly_depends_on_its_batch(index_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(ModelConfig(backbone="mobilenet_v2", weights="none", image_size=64)).train()
    photos = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)
    found = []
    for size in (1, 3, 64):
        monkeypatch.setattr(features, "EMBED_BATCH", size)
        found.append(embed(model, photos, range(7), "turned", CPU))
    close(found[0], found[1])
    close(found[0], found[2])
    assert found[0].std(dim=0).mean() > 0.1, "photos that all look alike show nothing"


def test_what_does_not_fit_into_the_memory_of_a_gpu_is_embedded_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU to fill: what is tried is a network that ends as PyTorch says it would."""
    model, room = network(), 3
    photos, whole = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8), model.embed

    def crowded(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(batch)

    expected = embed(model, photos, range(7), "turned", CPU)
    monkeypatch.setattr(model, "embed", crowded)
    close(embed(model, photos, range(7), "turned", CPU), expected)
    room = 0
    with pytest.raises(GpuFullError):
        embed(model, photos, range(7), "turned", CPU)


def test_a_photo_is_read_once_for_all_its_variants_and_not_at_all_for_none(
    index_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, model, read = read_index(index_uri), network(), list[str]()
    photos, beside, key = open_storage(index.images), index_place(index_uri)[0], features_key(index, model)
    original = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, key, *rest: read.append(key) or original(self, key, *rest))
    work = missing_parts(index_uri, index, key, "eightfold")
    assert [make_parts(model, photos, beside, key, each, CPU) for each in work] == [40, 40, 16, 5, 1]
    assert len(read) == len(set(read)) == TRAIN + VAL
    assert [make_parts(model, photos, beside, key, each, CPU) for each in work] == [0] * 5
    assert len(read) == TRAIN + VAL


def test_of_two_who_make_a_part_at_once_the_first_one_stands(index_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(index_uri)
    photos, beside = open_storage(index.images), index_place(index_uri)[0]
    work = Work(next(blocks(index.pool(), "train")), ["original"])
    monkeypatch.setattr(LocalStorage, "exists", lambda *_: False)  # what both had found
    assert make_parts(network(), photos, beside, "features/k", work, CPU) == 5
    first = parts(index_uri)[0].read_bytes()
    assert make_parts(network(seed=1), photos, beside, "features/k", work, CPU) == 5
    assert [path.read_bytes() for path in parts(index_uri)] == [first]


def _flip_a_bit(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 8
    part.write_bytes(data)


def _rewrite(part: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(part)), part)


def _as_lists(table: pa.Table) -> pa.Table:
    return table.set_column(1, "embedding", table["embedding"].cast(pa.list_(pa.float32())))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bit": _flip_a_bit,
    "empty": lambda part: part.write_bytes(b""),
    "cut": lambda part: part.write_bytes(part.read_bytes()[:-100]),
    "text": lambda part: part.write_text("no Parquet"),
    "fewer rows": lambda part: _rewrite(part, lambda table: table.slice(1)),
    "other order": lambda part: _rewrite(part, lambda table: table.take([1, 0, 2, 3, 4])),
    "other photos": lambda part: shutil.copy(str(part).replace("000001", "000000"), part),
    "no keys": lambda part: _rewrite(part, lambda table: table.drop_columns("key")),
    "no embeddings": lambda part: _rewrite(part, lambda table: table.drop_columns("embedding")),
    "lists": lambda part: _rewrite(part, _as_lists),
    "numbers": lambda part: _rewrite(part, lambda table: table.set_column(1, "embedding", pa.array(range(5)))),
    "narrower": lambda part: _rewrite(
        part, lambda table: table.set_column(1, "embedding", pa.array([[0.5]] * 5, pa.list_(pa.float32(), 1)))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_part_that_is_not_what_it_should_be_is_named(index_uri: str, damage: str) -> None:
    model = network()
    keep_features(index_uri, model)
    [part] = [path for path in parts(index_uri) if path.name == "train-original-000001.parquet"]
    DAMAGES[damage](part)
    with pytest.raises(OutputConflictError, match=str(part)):
        kept(index_uri, model, variants=VARIANTS["none"])


def test_a_part_that_is_absent_is_named(index_uri: str) -> None:
    model = network()
    keep_features(index_uri, model)
    [part] = [path for path in parts(index_uri) if path.name == "train-original-000001.parquet"]
    part.unlink()
    with pytest.raises(NotFoundError, match=str(part)):
        kept(index_uri, model, variants=VARIANTS["none"])


def test_the_reports_eightfold_set_is_of_training_photos_alone(tmp_path: Path) -> None:
    """4,141 photos, copies among them, give 26,496 + 829; what validates is in no variant of what trains."""
    near = [photo("tomato", look, change) for look in range(1, 31) for change in (1, 2)]
    rows = [*singles("cherry", 1300), *singles("strawberry", 1400), *singles("tomato", 1381), *near]
    index = Index(index_of(rows), "/p", "")
    seen = {split: Counter[str]() for split in ("train", "val")}
    groups = dict(zip(index.table["uri"].to_pylist(), index.table["group"].to_pylist(), strict=True))
    shown = {split: set[str]() for split in seen}
    for block, variants in missing_parts(str(tmp_path), index, "features/k", "eightfold"):
        seen[block.split].update({variant: len(block.entries) for variant in variants})
        shown[block.split] |= {groups[f"/p/{entry.key}"] or entry.key for entry in block.entries}
    assert seen == {"train": dict.fromkeys(EIGHT, 3312), "val": {"original": 829}}
    assert sum(seen["train"].values()) == 26_496
    assert not shown["train"] & shown["val"]


def test_validation_holds_originals_only(index_uri: str) -> None:
    model = network()
    keep_features(index_uri, model, "eightfold")
    keep_features(index_uri, model, "none")
    plain, eightfold = (recipe(index_uri, model, frozen=True, augment=policy) for policy in ("none", "eightfold"))
    close(eightfold.val.inputs, plain.val.inputs)
    photos = recipe(index_uri, model, frozen=False, augment="eightfold").val
    assert (photos.policy, photos.examples) == ("none", VAL)


def test_a_photo_that_changed_is_not_embedded(index_uri: str) -> None:
    index = read_index(index_uri)
    victim = index.pool().entries[4].key
    draw("cherry", 99, (64, 64)).save(open_storage(index.images).uri_of(victim))
    with pytest.raises(OutputConflictError, match=victim):
        keep_features(index_uri, network())


def test_a_recipe_without_its_embeddings_is_an_error(index_uri: str) -> None:
    with pytest.raises(NotFoundError, match="features"):
        recipe(index_uri, network(), frozen=True)


def test_training_photos_may_be_smaller_than_those_of_validation(index_uri: str) -> None:
    made = recipe(index_uri, network(backbone="cnn_bn"), frozen=False, train_size=32)
    assert {batch.inputs.shape[2:] for batch in made.train.epoch(1)} == {(32, 32)}
    assert {batch.inputs.shape[2:] for batch in made.val.epoch(0)} == {(64, 64)}
    with pytest.raises(UsageError, match="train-size 65: the network validates at 64"):
        recipe(index_uri, network(backbone="cnn_bn"), frozen=False, train_size=65)
    with pytest.raises(UsageError, match="train-size 48: the network cannot take it: "):
        recipe(index_uri, network(backbone="cnn"), frozen=False, train_size=48)  # it has weights for each place


def test_a_batch_too_small_for_the_workers_is_refused(index_uri: str) -> None:
    config = FitConfig(batch_size=2, augment="none")
    with pytest.raises(UsageError, match="batch-size 2"):
        make_recipe(index_uri, read_index(index_uri), network(), config, frozen=False, rank=0, world=3)
