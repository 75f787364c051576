"""Behaviour of the one way from a photo to the square a network sees."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fruitray.errors import UsageError
from fruitray.preprocess import Preprocessing, stack
from fruitray.synthetic import draw

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def pixels(image: Image.Image) -> np.ndarray:
    """(3, H, W) uint8, read-only and channels last in memory, as `images.decode` gives them."""
    return np.asarray(image).transpose(2, 0, 1)


def striped(*colours: tuple[int, int, int]) -> Image.Image:
    """Upright stripes of one colour each, 30 px wide, 30 px high."""
    image = Image.new("RGB", (30 * len(colours), 30))
    for number, colour in enumerate(colours):
        image.paste(colour, (30 * number, 0, 30 * number + 30, 30))
    return image


@pytest.mark.parametrize("crop", [0.0, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("size", [(300, 300), (200, 333), (333, 200), (8, 800), (31, 64)])
def test_any_photo_becomes_a_square(size: tuple[int, int], crop: float) -> None:
    square = Preprocessing(size=64, crop=crop).resize(pixels(Image.new("RGB", size, (10, 20, 30))))
    assert (square.shape, square.dtype) == ((3, 64, 64), torch.uint8)
    assert [square[channel].unique().tolist() for channel in range(3)] == [[10], [20], [30]]


def test_a_full_crop_keeps_the_centre_square() -> None:
    square = Preprocessing(size=16).resize(pixels(striped((255, 0, 0), (0, 255, 0), (0, 0, 255))))
    assert square.amin(dim=(1, 2)).tolist() == [0, 255, 0]


def test_half_a_crop_keeps_the_middle_half_of_each_side() -> None:
    image = Image.new("RGB", (80, 80))
    image.paste((255, 255, 255), (20, 20, 60, 60))
    assert Preprocessing(size=40, crop=0.5).resize(pixels(image)).eq(255).all()


def test_no_crop_squeezes_the_whole_photo_in() -> None:
    square = Preprocessing(size=90, crop=0.0).resize(pixels(striped((255, 0, 0), (0, 255, 0), (0, 0, 255))))
    assert [square[:, 45, x].tolist() for x in (15, 45, 75)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_a_photo_of_the_right_size_stays_as_it_is(crop: float) -> None:
    photo = pixels(draw("cherry", 1, (64, 64)))
    square = Preprocessing(size=64, crop=crop).resize(photo)
    assert square.numpy().tolist() == photo.tolist()


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_the_square_may_be_written_to(crop: float) -> None:
    photo = pixels(draw("cherry", 1, (64, 64)))
    before = photo.copy()
    Preprocessing(size=64, crop=crop).resize(photo).fill_(7)
    assert np.array_equal(photo, before)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "target"), [((300, 300), 64), ((500, 333), 224), ((180, 270), 288), ((64, 64), 65)])
def test_resizing_agrees_with_pillow(size: tuple[int, int], target: int, mode: Any) -> None:
    image = draw("strawberry", 3, size)
    expected = pixels(image.resize((target, target), PILLOW[mode])).astype(int)
    found = Preprocessing(size=target, crop=0.0, interpolation=mode).resize(pixels(image)).numpy().astype(int)
    difference = np.abs(found - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.2


def test_the_two_interpolations_are_not_the_same() -> None:
    photo = pixels(draw("strawberry", 3))
    first, second = (Preprocessing(size=64, interpolation=mode).resize(photo) for mode in ("bilinear", "bicubic"))
    assert not torch.equal(first, second)


def test_a_preprocessing_survives_json() -> None:
    preprocessing = Preprocessing(size=288, crop=0.875, interpolation="bicubic", mean=(0.5, 0.4, 0.3))
    assert Preprocessing.from_json(json.loads(json.dumps(asdict(preprocessing)))) == preprocessing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0),
        ("size", 64.5),
        ("crop", 1.5),
        ("interpolation", "nearest"),
        ("mean", (0.5, 0.5)),
        ("mean", ("a", "b", "c")),
        ("std", (0.5, 0.5, 0.0)),
    ],
)
def test_nonsense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        Preprocessing(**{"size": 64, name: value})


def test_a_stack_keeps_order_and_is_channels_last() -> None:
    squares = [torch.full((3, 4, 4), number, dtype=torch.uint8) for number in range(5)]
    batch = stack(squares)
    assert batch[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch.is_contiguous(memory_format=torch.channels_last)
