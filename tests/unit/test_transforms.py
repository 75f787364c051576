"""Each batched operation does to every photo what torchvision does to one, whatever stands beside it in the batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from fruitray import transforms
from fruitray.transforms import OPERATIONS, RANDAUGMENT, WIDE, Space

SIZES = [(1, 1), (2, 7), (33, 47)]
Reference = Callable[[torch.Tensor, float], torch.Tensor]


def photos(count: int = 4, size: tuple[int, int] = (33, 47)) -> torch.Tensor:
    """Noise over a gradient, in channels last as batches come; one photo is plain, so its contrast is nil."""
    generator = torch.Generator().manual_seed(count)
    ramp = torch.linspace(20, 200, size[1])
    noise = 50 * torch.rand(count, *size, 3, generator=generator)
    batch = (ramp[:, None] * torch.tensor([1.0, 0.6, 0.3]) + noise).to(torch.uint8).permute(0, 3, 1, 2)
    batch[-1] = 77
    return batch


KERNELS: dict[str, tuple[Callable[..., torch.Tensor], Reference, list[float], int]] = {
    "brightness": (transforms.brightness, tv.adjust_brightness, [0.0, 0.6, 1.0, 1.9], 1),
    "contrast": (transforms.contrast, tv.adjust_contrast, [0.0, 0.6, 1.0, 1.9], 1),
    "saturation": (transforms.saturation, tv.adjust_saturation, [0.0, 0.6, 1.0, 1.9], 1),
    "sharpness": (transforms.sharpness, tv.adjust_sharpness, [0.0, 0.6, 1.0, 1.9], 1),
    "hue": (transforms.hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.2], 2),
    "posterize": (transforms.posterize, lambda photo, bits: tv.posterize(photo, int(bits)), [2.0, 4.0, 7.0, 8.0], 0),
    "solarize": (transforms.solarize, tv.solarize, [0.0, 76.5, 127.5, 255.0], 0),
    "jpeg": (transforms.jpeg, lambda photo, quality: tv.jpeg(photo, int(quality)), [10.0, 30.0, 75.0, 95.0], 0),
}
"""Kernel, torchvision's, parameters for four photos, and by how much they may differ: it cuts off, we round."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_each_photo_gets_what_torchvision_makes_of_it(name: str, size: tuple[int, int]) -> None:
    kernel, reference, parameters, tolerance = KERNELS[name]
    batch = photos(4, size)
    expected = torch.stack([reference(photo, value) for photo, value in zip(batch, parameters, strict=True)])
    found = kernel(batch, np.array(parameters))
    assert found.dtype == torch.uint8
    assert int((found.int() - expected.int()).abs().max()) <= tolerance


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_photo_neither_minds_its_neighbours_nor_loses_its_memory_format(
    name: str, memory_format: torch.memory_format
) -> None:
    kernel, _, parameters, _ = KERNELS[name]
    batch, values = photos().contiguous(memory_format=memory_format), np.array(parameters)
    before = batch.clone()
    found = kernel(batch, values)
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(batch, before), "its input is changed"
    for number in range(4):
        assert torch.equal(kernel(batch[number : number + 1], values[number : number + 1])[0], found[number])


def differs_inside(found: torch.Tensor, photo: torch.Tensor, reference: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """The greatest difference from torchvision's where it shows pixels of the photo, and not black outside."""
    inside = reference(torch.full_like(photo, 255))[0] == 255
    assert inside.float().mean() > 0.1
    return int((found.int() - reference(photo).int()).abs()[:, inside].max())


@pytest.mark.parametrize("degrees", [-135.0, -15.0, 0.0, 7.5, 90.0])
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_turning_and_scaling_are_torchvisions(degrees: float, scale: float) -> None:
    batch = photos()
    maps = transforms.sources(33, 47, degrees=np.full(4, degrees), scale=np.full(4, scale))
    for photo, found in zip(batch, transforms.warp(batch, maps), strict=True):
        # `affine` turns clockwise, `rotate`, as we, counterclockwise
        settings = {"angle": -degrees, "translate": [0, 0], "scale": scale, "shear": [0.0, 0.0]}
        reference = partial(tv.affine, **settings, interpolation=InterpolationMode.BILINEAR)
        assert differs_inside(found, photo, reference) <= 1


def test_every_photo_of_a_batch_is_warped_by_its_own_map() -> None:
    batch, degrees = photos(), np.array([0.0, 10.0, -80.0, 135.0])
    maps = transforms.sources(33, 47, degrees=degrees, scale=np.array([1.0, 0.9, 0.8, 1.3]))
    together = transforms.warp(batch, maps)
    assert torch.equal(together[0], batch[0])
    for number in range(4):
        alone = transforms.warp(batch[number : number + 1], maps[number : number + 1])
        assert torch.equal(alone[0], together[number])


def test_what_lies_outside_repeats_the_edge() -> None:
    batch = torch.full((1, 3, 40, 40), 200, dtype=torch.uint8)
    assert torch.equal(transforms.warp(batch, transforms.sources(40, 40, degrees=np.array([33.0]), scale=0.5)), batch)


@pytest.mark.parametrize(
    ("space", "theirs"), [(WIDE, v2.TrivialAugmentWide), (RANDAUGMENT, v2.RandAugment)], ids=["trivial", "rand"]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_operations_and_their_strengths_are_torchvisions(operation: str, space: Space, theirs: Any) -> None:
    augmentation = theirs(interpolation=InterpolationMode.BILINEAR)
    magnitudes, signed = augmentation._AUGMENTATION_SPACE[operation]
    photo, settings = photos(2, (80, 97))[0] // 2 + 40, {"interpolation": InterpolationMode.BILINEAR, "fill": {}}
    for bin_ in (0, 9, 21, 30):
        for sign in (1, -1) if signed else (1,):
            values = magnitudes(31, 80, 97)
            magnitude = 0.0 if values is None else sign * float(values[bin_])
            apply = augmentation._apply_image_or_video_transform
            reference = partial(apply, transform_id=operation, magnitude=magnitude, **settings)
            number, strength = np.array([OPERATIONS.index(operation)]), np.array([bin_ / 30])
            found = transforms.operate(photo[None], space, number, strength, np.array([float(sign)]))[0]
            if operation in transforms.MOVES:
                assert differs_inside(found, photo, reference) <= 1
            else:
                assert int((found.int() - reference(photo).int()).abs().max()) <= 1


@pytest.mark.parametrize("theirs", [v2.TrivialAugmentWide, v2.RandAugment])
def test_the_spaces_hold_the_operations_of_torchvisions(theirs: Any) -> None:
    assert tuple(theirs._AUGMENTATION_SPACE) == OPERATIONS


def test_photos_of_one_batch_go_through_different_operations() -> None:
    batch = photos(len(OPERATIONS), (40, 40))
    numbers, strength, sign = np.arange(len(OPERATIONS)), np.full(len(OPERATIONS), 0.7), np.ones(len(OPERATIONS))
    together = transforms.operate(batch, WIDE, numbers, strength, sign)
    for number, photo in enumerate(batch):
        one = slice(number, number + 1)
        alone = transforms.operate(photo[None], WIDE, numbers[one], strength[one], sign[one])[0]
        assert torch.equal(together[number], alone), OPERATIONS[number]


def test_a_box_is_where_it_should_be() -> None:
    batch = photos(2, (6, 8))
    place = [np.array([0.0, 2.0]), np.array([1.0, 5.0]), np.array([6.0, 1.0]), np.array([2.0, 3.0])]
    mask = transforms.box_mask(*place, batch)
    expected = torch.zeros(2, 1, 6, 8, dtype=torch.bool)
    expected[0, :, :, 1:3] = expected[1, :, 2:3, 5:8] = True
    assert torch.equal(mask, expected)
