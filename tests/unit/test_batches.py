"""Behaviour of the batches: who sees which example when, and the decoded photos that a machine's processes share."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fruitray.batches import Batches, decoded_photos
from fruitray.errors import OutputConflictError
from fruitray.preprocess import Preprocessing
from fruitray.storage import Entry, LocalStorage
from fruitray.synthetic import LABELS, draw

EXAMPLES, SIZE = 23, 16


def batches(**settings: Any) -> Batches:
    """Example i has input and label i."""
    numbers = torch.arange(EXAMPLES)
    return Batches(**{"inputs": numbers[:, None].float(), "labels": numbers, "batch_size": 5, **settings})


def seen(batches: Batches, number: int = 1) -> list[list[int]]:
    """The labels of each batch of an epoch."""
    return [labels.tolist() for _, labels, _ in batches.epoch(number)]


def mirrored(number: int = 1, **settings: Any) -> dict[int, bool]:
    """For each example whether the `mirror` policy showed it mirrored in epoch `number`."""
    photos = torch.zeros(EXAMPLES, 3, 2, 2, dtype=torch.uint8)
    photos[..., 0] = 255  # the left half is bright
    shown = batches(inputs=photos, policy="mirror", **settings).epoch(number)
    return {
        label: was
        for inputs, labels, _ in shown
        for label, was in zip(labels.tolist(), (inputs[:, 0, 0, 1] > 0).tolist(), strict=True)
    }


class CountingStorage(LocalStorage):
    """A folder that remembers what was read."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.reads: list[str] = []

    def read(self, key: str, etag: str = "") -> bytes:
        self.reads.append(key)
        return super().read(key, etag)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FRUITRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path, cache: Path) -> CountingStorage:
    """Six small photos."""
    for number in range(6):
        write_photo(tmp_path / "photos" / f"{number}.png", number)
    return CountingStorage(str(tmp_path / "photos"))


def write_photo(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    draw(LABELS[seed % 3], seed, (40, 30)).save(path)


def entries(storage: LocalStorage) -> list[Entry]:
    return list(storage.list())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_shows_each_example_once(world: int, shuffle: bool) -> None:
    shares = [seen(batches(rank=rank, world=world, shuffle=shuffle)) for rank in range(world)]
    assert sorted(label for share in shares for labels in share for label in labels) == list(range(EXAMPLES))


@pytest.mark.parametrize("world", [2, 3])
def test_the_global_batches_do_not_depend_on_the_number_of_workers(world: int) -> None:
    alone = seen(batches(shuffle=True))
    shares = [seen(batches(rank=rank, world=world, shuffle=True)) for rank in range(world)]
    together = [sorted(label for labels in step for label in labels) for step in zip(*shares, strict=True)]
    assert together == [sorted(labels) for labels in alone]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_worker_knows_the_size_of_the_global_batch(world: int) -> None:
    alone = [len(labels) for labels in seen(batches())]
    for rank in range(world):
        assert [together for _, _, together in batches(rank=rank, world=world).epoch(1)] == alone


def test_inputs_stay_with_their_labels() -> None:
    for inputs, labels, _ in batches(shuffle=True).epoch(1):
        assert inputs[:, 0].tolist() == labels.tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 22, 23, 100])
def test_an_epoch_is_cut_evenly(batch_size: int) -> None:
    cut = batches(batch_size=batch_size)
    sizes = [len(labels) for labels in seen(cut)]
    assert len(sizes) == len(cut)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_unshuffled_examples_come_in_order() -> None:
    assert [label for labels in seen(batches()) for label in labels] == list(range(EXAMPLES))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**62])
def test_the_order_follows_from_seed_and_epoch_alone(seed: int) -> None:
    first = seen(batches(shuffle=True, seed=seed), 3)
    torch.rand(1)
    assert seen(batches(shuffle=True, seed=seed), 3) == first
    assert seen(batches(shuffle=True, seed=seed), 4) != first
    assert seen(batches(shuffle=True, seed=seed + 1), 3) != first


def test_mirroring_follows_from_seed_and_epoch_alone() -> None:
    first = mirrored(3, shuffle=True)
    assert mirrored(3, shuffle=True) == first
    assert mirrored(4, shuffle=True) != first
    assert mirrored(3, shuffle=True, seed=1) != first


@pytest.mark.parametrize("world", [2, 3])
def test_mirroring_does_not_depend_on_the_number_of_workers(world: int) -> None:
    shares = [mirrored(3, shuffle=True, rank=rank, world=world) for rank in range(world)]
    assert {label: was for share in shares for label, was in share.items()} == mirrored(3, shuffle=True)


def test_about_half_of_the_photos_are_mirrored() -> None:
    shown = [was for number in range(40) for was in mirrored(number).values()]
    assert 0.4 < sum(shown) / len(shown) < 0.6


def test_mirroring_leaves_the_kept_photos_alone() -> None:
    photos = torch.arange(EXAMPLES * 12, dtype=torch.uint8).reshape(EXAMPLES, 3, 2, 2)
    before = photos.clone()
    for inputs, labels, _ in batches(inputs=photos, policy="mirror").epoch(1):
        for photo, label in zip(inputs, labels, strict=True):
            assert any(torch.equal(photo, seen) for seen in (before[label], before[label].flip(2)))
    assert torch.equal(photos, before)


def test_decoded_photos_are_the_resized_photos_in_order(photos: CountingStorage) -> None:
    preprocessing = Preprocessing(size=SIZE)
    found = decoded_photos(photos, entries(photos), preprocessing)
    for number, square in enumerate(found):
        with Image.open(Path(photos.uri) / f"{number}.png") as image:
            assert torch.equal(square, preprocessing.resize(np.asarray(image).transpose(2, 0, 1)))
    assert found.shape == (6, 3, SIZE, SIZE)


def test_photos_are_decoded_once_per_machine(photos: CountingStorage) -> None:
    listed = entries(photos)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: decoded_photos(photos, listed, Preprocessing(size=SIZE)), range(3))
    assert sorted(photos.reads) == [entry.key for entry in listed]
    assert all(torch.equal(first, other) for other in others)


def test_one_process_cannot_spoil_the_photos_of_another(photos: CountingStorage) -> None:
    listed = entries(photos)
    first = decoded_photos(photos, listed, Preprocessing(size=SIZE))
    before = first.clone()
    first.zero_()
    assert torch.equal(decoded_photos(photos, listed, Preprocessing(size=SIZE)), before)


def test_another_preprocessing_is_decoded_anew(photos: CountingStorage) -> None:
    listed = entries(photos)
    whole = decoded_photos(photos, listed, Preprocessing(size=SIZE, crop=0.0))
    centre = decoded_photos(photos, listed, Preprocessing(size=SIZE, crop=0.5))
    assert not torch.equal(whole, centre)


def test_a_new_version_of_a_photo_is_decoded_anew(photos: CountingStorage) -> None:
    before = decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))
    write_photo(Path(photos.uri) / "2.png", 99)
    after = decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [True, True, False, *[True] * 3]


@pytest.mark.parametrize("fault", ["replaced", "deleted"])
def test_a_photo_that_is_not_as_indexed_is_named(photos: CountingStorage, cache: Path, fault: str) -> None:
    listed, victim = entries(photos), Path(photos.uri) / "4.png"
    victim.unlink()
    if fault == "replaced":
        write_photo(victim, 99)
    with pytest.raises(OutputConflictError, match=r"4\.png.*run prepare again"):
        decoded_photos(photos, listed, Preprocessing(size=SIZE))
    assert not [path for path in cache.iterdir() if path.stat().st_size], "half a cache is left"


def test_a_photo_that_does_not_decode_is_named(photos: CountingStorage) -> None:
    whole = io.BytesIO()
    draw("cherry", 1, (40, 30)).save(whole, "PNG")
    (Path(photos.uri) / "4.png").write_bytes(whole.getvalue()[:200])
    with pytest.raises(OutputConflictError, match=r"4\.png.*E_TRUNCATED"):
        decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))
