"""Behaviour of the batches: who sees which example when, and the decoded photos that a machine's processes share."""

import errno
import io
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from fruitray.batches import Batches, decoded_photos, near
from fruitray.errors import NotFoundError, OutputConflictError, TryAgainError, UsageError
from fruitray.preprocess import Preprocessing
from fruitray.storage import Entry, LocalStorage
from fruitray.synthetic import LABELS, draw

EXAMPLES, SIZE = 23, 16


def batches(**settings: Any) -> Batches:
    """Example i has input and label i."""
    numbers = torch.arange(EXAMPLES)
    plain = {"inputs": numbers[:, None].float(), "labels": numbers, "rows": numbers, "classes": EXAMPLES}
    return Batches(**{**plain, "batch_size": 5, **settings})


def seen(batches: Batches, number: int = 1) -> list[list[int]]:
    """The labels of each batch of an epoch."""
    return [labels.tolist() for _, labels, *_ in batches.epoch(number)]


def mirrored(number: int = 1, **settings: Any) -> dict[int, bool]:
    """For each example whether the `mirror` policy showed it mirrored in epoch `number`."""
    photos = torch.zeros(EXAMPLES, 3, 2, 2, dtype=torch.uint8)
    photos[..., 0] = 255  # the left half is bright
    shown = batches(inputs=photos, policy="mirror", **settings).epoch(number)
    return {
        label: was
        for inputs, labels, *_ in shown
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


def test_where_the_photos_are_not_mounted_nobody_is_told_to_prepare_again(photos: CountingStorage) -> None:
    listed = entries(photos)
    for path in Path(photos.uri).iterdir():
        path.unlink()
    with pytest.raises(NotFoundError, match="is it not mounted"):
        decoded_photos(photos, listed, Preprocessing(size=SIZE))


def test_photos_that_another_has_decoded_are_only_read(photos: CountingStorage, cache: Path) -> None:
    mine = decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))
    [lock] = cache.glob("*.lock")
    lock.unlink()
    lock.mkdir()  # nobody opens it any more
    assert torch.equal(decoded_photos(photos, entries(photos), Preprocessing(size=SIZE)), mine)


def test_photos_that_another_has_decoded_for_himself_are_told(
    photos: CountingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(UsageError, match=r"FRUITRAY_CACHE .*\.npy: Permission denied"):
        decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))


def test_a_cache_that_cannot_be_used_is_told(
    photos: CountingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRUITRAY_CACHE", "/proc/nowhere")
    with pytest.raises(UsageError, match="FRUITRAY_CACHE /proc/nowhere"):
        decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))


def test_a_cache_that_another_account_may_have_made_is_not_trusted(
    photos: CountingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the temporary folder, where all may write and names can be guessed."""
    monkeypatch.delenv("FRUITRAY_CACHE")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))
    [made] = tmp_path.glob("fruitray-cache-*")
    assert made.stat().st_mode & 0o777 == 0o700
    for open_to_others in (0o777, 0o720):
        made.chmod(open_to_others)
        with pytest.raises(UsageError, match="others may write there"):
            decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))
    shutil.rmtree(made)
    (tmp_path / "elsewhere").mkdir()
    made.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="others may write there"):
        decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))


def test_a_disk_that_fills_up_is_told_and_what_a_killed_process_left_is_written_over(
    photos: CountingStorage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TryAgainError, match="FRUITRAY_CACHE"):
            decoded_photos(photos, entries(photos), Preprocessing(size=SIZE))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    [lock] = cache.iterdir()
    lock.with_suffix(".tmp").write_bytes(b"left")
    assert decoded_photos(photos, entries(photos), Preprocessing(size=SIZE)).shape == (6, 3, SIZE, SIZE)
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".npy"]


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
        assert [together for _, _, together, _ in batches(rank=rank, world=world).epoch(1)] == alone


def test_inputs_stay_with_their_labels() -> None:
    for inputs, labels, *_ in batches(shuffle=True).epoch(1):
        assert inputs[:, 0].tolist() == labels.tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 22, 23, 100])
def test_an_epoch_is_cut_evenly(batch_size: int) -> None:
    cut = batches(batch_size=batch_size)
    sizes = [len(labels) for labels in seen(cut)]
    assert len(sizes) == len(cut)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("policy", ["none", "flips+erase", "eightfold", "report+mixup"])
def test_of_many_photos_those_of_the_rows_are_shown_as_if_all_were(policy: str) -> None:
    """What a photo becomes does not depend on which others are trained on, unless it is mixed with them."""
    rows = torch.tensor([3, 8, 9, 20])
    some = photo_batches(policy, rows=rows, batch_size=100)
    shown = list(some.epoch(1))
    assert torch.cat([batch.examples for batch in shown]).sort().values.tolist() == list(range(some.examples))
    if "mixup" not in policy:
        assert set(seen_photos(some)) <= set(seen_photos(photo_batches(policy)))
    labels = torch.cat([batch.labels for batch in shown])
    present = labels.sum(0).nonzero()[:, 0] if "mixup" in policy else labels.unique()
    assert present.tolist() == rows.tolist()


@pytest.mark.parametrize("world", [1, 3])
def test_a_batch_names_its_examples(world: int) -> None:
    for rank in range(world):
        for batch in batches(rank=rank, world=world, shuffle=True).epoch(2):
            assert batch.examples.tolist() == batch.labels.tolist()


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
    for inputs, labels, *_ in batches(inputs=photos, policy="mirror").epoch(1):
        for photo, label in zip(inputs, labels, strict=True):
            assert any(torch.equal(photo, seen) for seen in (before[label], before[label].flip(2)))
    assert torch.equal(photos, before)


MIXED = ("mixup", "cutmix", "mirror+mixup+cutmix", "eightfold+mixup")


def photo_batches(policy: str, **settings: Any) -> Batches:
    """Random photos, each of a class of its own, so that a target tells who is in it."""
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(256, (EXAMPLES, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return batches(**{"inputs": photos, "policy": policy, "shuffle": True, **settings})


def seen_photos(batches: Batches, number: int = 1) -> list[tuple[bytes, bytes]]:
    """Every photo of an epoch with its label, as bytes, in no order."""
    shown = [pair for inputs, labels, *_ in batches.epoch(number) for pair in zip(inputs, labels, strict=True)]
    return sorted((photo.numpy().tobytes(), label.numpy().tobytes()) for photo, label in shown)


@pytest.mark.parametrize("policy", ["flips+erase", "report+jitter", "trivial", "eightfold", *MIXED])
@pytest.mark.parametrize("world", [2, 3])
def test_the_workers_together_see_what_one_alone_would(policy: str, world: int) -> None:
    alone = seen_photos(photo_batches(policy))
    shares = [seen_photos(photo_batches(policy, rank=rank, world=world)) for rank in range(world)]
    assert sorted(pair for share in shares for pair in share) == alone


@pytest.mark.parametrize("policy", ["none", "crop", "eightfold+jitter", "crop+mixup"])
def test_batches_come_as_large_as_asked(policy: str) -> None:
    for inputs, *_ in photo_batches(policy, size=5).epoch(1):
        assert inputs.shape[1:] == (3, 5, 5)


@pytest.mark.parametrize("policy", ["flips+erase", "report+jitter", "rand", "eightfold+jitter"])
def test_neither_batch_size_nor_order_changes_a_photo(policy: str) -> None:
    expected = seen_photos(photo_batches(policy))
    assert seen_photos(photo_batches(policy, batch_size=23)) == expected
    assert seen_photos(photo_batches(policy, shuffle=False)) == expected
    assert seen_photos(photo_batches(policy), 2) != expected
    assert seen_photos(photo_batches(policy, seed=1)) != expected


def test_eightfold_shows_each_photo_eight_times() -> None:
    """The report: 4,141 photos, of which 3,312 train, so 26,496 training examples."""
    photos = torch.arange(3312 * 3, dtype=torch.int16).reshape(-1, 3, 1, 1).to(torch.uint8).expand(-1, -1, 2, 2)
    train = Batches(
        inputs=photos,
        labels=torch.arange(3312),
        rows=torch.arange(3312),
        classes=3312,
        batch_size=1024,
        shuffle=True,
        policy="eightfold",
    )
    counts = torch.zeros(3312, dtype=torch.int64)
    for inputs, labels, together, _ in train.epoch(1):
        assert torch.equal(inputs, photos[labels]), "plain photos stay plain, so photos stay with their labels"
        assert len(inputs) == together <= 1024
        counts += torch.bincount(labels, minlength=3312)
    assert train.examples == 26_496
    assert len(train) == 26
    assert counts.unique().tolist() == [8]


def test_eightfold_shows_the_same_eight_in_every_epoch() -> None:
    first = seen_photos(photo_batches("eightfold"))
    assert seen_photos(photo_batches("eightfold", seed=4), 7) == first
    assert len(set(first)) == 8 * EXAMPLES


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize("world", [1, 3])
def test_each_photo_is_mixed_with_one_of_its_global_batch(policy: str, world: int) -> None:
    """Each is so once as photo and once as partner."""
    settings = {"world": world, "batch_size": 8}
    plain = photo_batches(policy.split("+")[0] if "eightfold" in policy else "none", **settings)
    workers = [
        [replace(one, rank=rank).epoch(2) for rank in range(world)]
        for one in (photo_batches(policy, **settings), plain)
    ]
    for mixed, alone in zip(*(zip(*shares, strict=True) for shares in workers), strict=True):
        firsts = torch.cat([labels for _, labels, *_ in alone])
        targets = torch.cat([labels for _, labels, *_ in mixed])
        assert targets.dtype == torch.float32
        assert targets.shape == (len(firsts), EXAMPLES)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(firsts)))
        assert targets.min() >= 0
        others = targets.clone()
        others[torch.arange(len(firsts)), firsts] = 0
        assert ((others > 0).sum(1) <= 1).all()
        partners = others.argmax(1)[others.sum(1) > 0].tolist()
        assert not Counter(partners) - Counter(firsts.tolist()), "each of the batch is a partner but once"
        assert len(partners) > len(firsts) / 2


@pytest.mark.parametrize("policy", ["mixup", "cutmix", "report+mixup+cutmix"])
def test_a_target_says_how_much_of_each_photo_is_there(policy: str) -> None:
    """Photos of one grey each, which the augmented share of the pixels must add up to."""
    greys = torch.arange(EXAMPLES) * 11
    plain = greys.byte()[:, None, None, None].expand(-1, 3, 8, 8)
    for inputs, targets, *_ in photo_batches(policy, inputs=plain).epoch(1):
        torch.testing.assert_close(inputs.float().mean((1, 2, 3)), targets @ greys.float(), rtol=0, atol=0.51)


@pytest.mark.parametrize("policy", ["none", "trivial", "mirror+mixup", "eightfold"])
def test_a_batch_is_on_its_device(policy: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for inputs, labels, *_ in photo_batches(policy, device=device).epoch(1):
        assert inputs.device.type == labels.device.type == device.type
        assert inputs.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["none", "mirror+mixup", "eightfold"])
def test_photos_that_are_kept_on_the_gpu_make_the_same_batches(policy: str) -> None:
    gpu = torch.device("cuda")
    usual, kept = photo_batches(policy, device=gpu), photo_batches(policy, device=gpu)
    kept = replace(kept, inputs=near(usual.inputs, gpu))
    assert kept.inputs.is_cuda
    for one, other in zip(usual.epoch(1), kept.epoch(1), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)


def test_photos_that_take_too_much_of_the_gpu_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * photos.nbytes - 1, 80 << 30))
    assert near(photos, torch.device("cuda")) is photos
    assert near(photos, torch.device("cpu")) is photos


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
