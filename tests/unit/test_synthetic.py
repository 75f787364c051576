"""Behaviour of the drawn photos: repeatable, told apart by shape, and with the faults they promise."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from fruitray import synthetic
from fruitray.synthetic import LABELS, draw, photo_set

PER_CLASS = 16


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    return photo_set(PER_CLASS, seed=3)


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Image.Image], np.ndarray]:
    images = [draw(label, seed, (144, 144)) for label in LABELS for seed in range(60)]
    return images, np.repeat(np.arange(len(LABELS)), 60)


def opened(data: bytes) -> Image.Image | None:
    """The decoded image, or None where Pillow refuses it."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError):
        return None
    return image


@pytest.mark.parametrize("label", LABELS)
def test_a_drawing_follows_from_its_arguments(label: str) -> None:
    first = draw(label, 5)
    assert (first.mode, first.size) == ("RGB", (300, 300))
    assert first.tobytes() == draw(label, 5).tobytes()
    assert first.tobytes() != draw(label, 6).tobytes()


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (333, 500)])
def test_a_drawing_has_the_size_asked_for(size: tuple[int, int]) -> None:
    assert {draw(label, seed, size).size for label in LABELS for seed in range(3)} == {size}


def test_an_unknown_label_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"label='plum': must be one of cherry, strawberry, tomato"):
        draw("plum", 0)


def test_a_set_too_small_for_its_faults_is_refused() -> None:
    with pytest.raises(ValueError, match=r"per_class=7: must be 8 or more"):
        photo_set(7)


def test_a_set_follows_from_its_arguments() -> None:
    small = photo_set(8, seed=1)
    assert small == photo_set(8, seed=1)
    assert small != photo_set(8, seed=2)
    assert undecodable(small) != undecodable(photo_set(8, seed=2))  # the faults move with the seed


def test_a_set_is_sorted_and_has_as_many_files_per_class_as_asked(photos: dict[str, bytes]) -> None:
    assert list(photos) == [f"{label}/{label}_{index:04d}.jpg" for label in LABELS for index in range(PER_CLASS)]


def undecodable(photos: dict[str, bytes]) -> list[str]:
    return [name for name, data in photos.items() if opened(data) is None]


def test_two_files_do_not_decode(photos: dict[str, bytes]) -> None:
    assert [name.split("/")[0] for name in undecodable(photos)] == ["cherry", "tomato"]


def test_the_broken_cherry_is_half_a_jpeg(photos: dict[str, bytes]) -> None:
    cherry, tomato = (photos[name] for name in undecodable(photos))
    assert Image.open(io.BytesIO(cherry)).size == (300, 300)  # the header is whole
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(tomato))


def test_one_file_is_greyscale(photos: dict[str, bytes]) -> None:
    modes = Counter(image.mode for data in photos.values() if (image := opened(data)))
    assert modes == {"RGB": 3 * PER_CLASS - 3, "L": 1}


def mosaic(label: str, seed: int, size: tuple[int, int] = (300, 300)) -> Image.Image:
    """A stand-in for `draw` that costs nothing: 8x8 random tiles."""
    tiles = np.random.default_rng([LABELS.index(label), seed]).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST)


@pytest.mark.parametrize(("per_class", "outliers", "twins"), [(8, 1, 1), (112, 1, 2), (113, 2, 2), (225, 3, 4)])
def test_faults_keep_their_share(per_class: int, outliers: int, twins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "draw", mosaic)
    photos = photo_set(per_class)
    sizes = {name: image.size for name, data in photos.items() if (image := opened(data))}
    odd = Counter(name.split("/")[0] for name, size in sizes.items() if size != (300, 300))
    assert odd == dict.fromkeys(LABELS, outliers)
    assert copies(photos) == dict.fromkeys(LABELS, twins)
    assert len(photos) - len(sizes) == 2


def copies(photos: dict[str, bytes]) -> dict[str, int]:
    """How many files of each class repeat another; a repeat across classes fails."""
    owners: dict[bytes, list[str]] = {}
    for name, data in photos.items():
        owners.setdefault(data, []).append(name.split("/")[0])
    assert all(len(set(labels)) == 1 for labels in owners.values())
    return dict(Counter(label for labels in owners.values() for label in labels[1:]))


def test_exact_duplicates_stay_within_their_class(photos: dict[str, bytes]) -> None:
    assert copies(photos) == dict.fromkeys(LABELS, 1)


@pytest.mark.parametrize("label", LABELS)
def test_one_pair_is_nearly_but_not_exactly_the_same(label: str, photos: dict[str, bytes]) -> None:
    unique = {data for name, data in photos.items() if name.startswith(label)}
    images = [image.convert("L").resize((32, 32)) for data in unique if (image := opened(data))]
    pixels = np.stack([np.asarray(image, np.float64).ravel() for image in images])
    alike = np.triu(np.corrcoef(pixels), k=1) > 0.9
    assert alike.sum() == 1


def test_mean_colour_does_not_tell_the_classes_apart(drawn: tuple[list[Image.Image], np.ndarray]) -> None:
    images, labels = drawn
    means = np.stack([np.asarray(image, np.float64).mean((0, 1)) for image in images])
    for model in (LogisticRegression(), SVC()):
        assert cross_val_score(make_pipeline(StandardScaler(), model), means, labels, cv=5).mean() < 0.6


def test_edges_tell_the_classes_apart(drawn: tuple[list[Image.Image], np.ndarray]) -> None:
    images, labels = drawn
    features = np.stack([edge_directions(image.reduce(2)) for image in images])
    assert cross_val_score(make_pipeline(StandardScaler(), SVC(C=3)), features, labels, cv=5).mean() > 0.55


def edge_directions(image: Image.Image, cell: int = 12, bins: int = 9) -> np.ndarray:
    """(H / cell * W / cell * bins,) a plain histogram of oriented gradients."""
    down, across = np.gradient(np.asarray(image.convert("L"), np.float64))
    strength, bin_of = np.hypot(across, down), (np.arctan2(down, across) % np.pi / np.pi * bins).astype(int) % bins
    shape = (image.height // cell, cell, image.width // cell, cell)
    cells = np.stack([np.where(bin_of == b, strength, 0).reshape(shape).sum((1, 3)) for b in range(bins)], -1)
    return np.ravel(cells / (np.linalg.norm(cells, axis=-1, keepdims=True) + 20))
