"""Operations on a batch of photos, each photo with a parameter of its own: pure, nothing random, on the batch's device.

Photos are (B, 3, H, W) uint8, in and out, in the memory format they came in. Parameters are (B,) NumPy arrays on the
CPU. Where a functional kernel of torchvision v2 takes a batch it is used; its colour kernels take one parameter for all
photos, so they are written out here after the same formulas. Where torchvision cuts off, these round.

No photo's result depends on the others in the batch: sums are of integers, and no product is fused into a sum, which
would round differently at the end of a vector register.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Parameters = NDArray[np.float64]


def per_photo(values: NDArray[np.generic], batch: torch.Tensor) -> torch.Tensor:
    """(B,) values -> (B, 1, 1, 1) on the batch's device; floats as float32."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(batch.device)
    return (tensor.float() if tensor.is_floating_point() else tensor)[:, None, None, None]


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Rounded and held within 0..255."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def blend(batch: torch.Tensor, other: torch.Tensor, share: Parameters) -> torch.Tensor:
    """`share` of `batch` and the rest of `other` (any that broadcasts); shares above 1 lead away from `other`."""
    return to_uint8(batch * per_photo(share, batch) + other * per_photo(1 - share, batch))


def grey(batch: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) int32 luma of ITU-R BT.601, cut off as torchvision's `rgb_to_grayscale` does."""
    red, green, blue = batch.int().unbind(1)
    luma = (2989 * red + 5870 * green + 1140 * blue).div(10000, rounding_mode="floor")
    return luma.unsqueeze(1)


def brightness(batch: torch.Tensor, factor: Parameters) -> torch.Tensor:
    """0 is black, 1 the photo."""
    return to_uint8(batch * per_photo(factor, batch))


def contrast(batch: torch.Tensor, factor: Parameters) -> torch.Tensor:
    """0 is the photo's mean grey, 1 the photo."""
    total = grey(batch).sum(dim=(2, 3), keepdim=True, dtype=torch.int64)
    return blend(batch, (total / (batch.shape[2] * batch.shape[3])).float(), factor)


def saturation(batch: torch.Tensor, factor: Parameters) -> torch.Tensor:
    """0 is grey, 1 the photo."""
    return blend(batch, grey(batch), factor)


def sharpness(batch: torch.Tensor, factor: Parameters) -> torch.Tensor:
    """0 is smoothed by PIL's 3x3 filter (centre 5, around it 1, over 13), 1 the photo; the rim stays as it is."""
    if min(batch.shape[2:]) < 3:
        return batch
    rows = batch[:, :, :-2].int() + batch[:, :, 1:-1] + batch[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = batch[:, :, 1:-1, 1:-1]
    sharper = batch.clone()
    sharper[:, :, 1:-1, 1:-1] = blend(inner, ((around + 4 * inner.int()) / 13).round(), factor)
    return sharper


def hue(batch: torch.Tensor, turn: Parameters) -> torch.Tensor:
    """Hue moved by `turn` of the colour circle, -0.5..0.5, in HSV (Smith, "Color gamut transform pairs", 1978)."""
    red, green, blue = (batch / 255).unbind(1)
    value, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    width = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(value == green, (blue - red) / width + 2, (red - green) / width + 4)
    sector = torch.where(value == red, (green - blue) / width, sector) + 6 * per_photo(turn, batch)[:, 0]
    places = [(sector + offset).remainder(6) for offset in (5, 3, 1)]
    lowered = [chroma * torch.minimum(place, 4 - place).clamp(0, 1) for place in places]
    return to_uint8(255 * torch.stack([value - low for low in lowered], dim=1)).to(memory_format=format_of(batch))


def posterize(batch: torch.Tensor, bits: Parameters) -> torch.Tensor:
    """The highest `bits` of each value, 0..8."""
    return batch & per_photo((256 - 2 ** (8 - bits)).astype(np.uint8), batch)


def solarize(batch: torch.Tensor, threshold: Parameters) -> torch.Tensor:
    """Values from `threshold` on, 0..255, inverted."""
    return torch.where(batch >= per_photo(threshold, batch), 255 - batch, batch)


def jpeg(batch: torch.Tensor, quality: Parameters) -> torch.Tensor:
    """Each photo compressed at its `quality`, 1..100, and decoded: by libjpeg on the CPU, wherever the batch is."""
    from torchvision.io import decode_jpeg, encode_jpeg  # on use, as below: torchvision takes a second to load

    photos = zip(batch.cpu(), quality.astype(int).tolist(), strict=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        done = list(pool.map(lambda photo: decode_jpeg(encode_jpeg(photo[0], quality=photo[1])), photos))
    return torch.stack(done).to(batch.device).contiguous(memory_format=format_of(batch))


def box_mask(
    top: Parameters, left: Parameters, height: Parameters, width: Parameters, batch: torch.Tensor
) -> torch.Tensor:
    """(B, 1, H, W) bool: the pixels in each photo's box, in whole pixels from the upper left corner."""
    rows = torch.arange(batch.shape[2], device=batch.device)[:, None]
    columns = torch.arange(batch.shape[3], device=batch.device)
    above, before = rows < per_photo(top, batch), columns < per_photo(left, batch)
    within_rows = (rows < per_photo(top + height, batch)) & ~above
    return within_rows & (columns < per_photo(left + width, batch)) & ~before


def paste(
    batch: torch.Tensor, other: torch.Tensor, top: Parameters, left: Parameters, height: Parameters, width: Parameters
) -> torch.Tensor:
    """`other` (B, 3, H, W) in each photo's box."""
    return torch.where(box_mask(top, left, height, width, batch), other, batch)


def paint(
    batch: torch.Tensor,
    colour: NDArray[np.uint8],
    top: Parameters,
    left: Parameters,
    height: Parameters,
    width: Parameters,
) -> torch.Tensor:
    """One `colour` (B, 3) in each photo's box."""
    plain = torch.from_numpy(colour).to(batch.device)[:, :, None, None]
    return paste(batch, plain, top, left, height, width)


def flip(batch: torch.Tensor, across: NDArray[np.bool_], down: NDArray[np.bool_]) -> torch.Tensor:
    """Photos left-right where `across`, upside down where `down`; exact."""
    for chosen, dim in ((across, 3), (down, 2)):
        if chosen.any():
            batch = torch.where(per_photo(chosen, batch), batch.flip(dim), batch)
    return batch


def sources(
    height: int,
    width: int,
    *,
    degrees: Parameters | float = 0.0,
    scale: Parameters | float = 1.0,
    shear_x: Parameters | float = 0.0,
    shear_y: Parameters | float = 0.0,
    shift_x: Parameters | float = 0.0,
    shift_y: Parameters | float = 0.0,
) -> Parameters:
    """(B, 2, 3) maps for `warp`: turned counterclockwise by `degrees` and scaled about the centre (below 1 shrinks),
    sheared from the upper left corner as AutoAugment does it, moved right and down by so many pixels."""
    cos, sin = np.cos(np.radians(degrees)) / scale, np.sin(np.radians(degrees)) / scale
    x = [cos - sin * shear_y, cos * shear_x - sin, shear_x * np.float64(height / 2) - shift_x]
    y = [sin + cos * shear_y, sin * shear_x + cos, shear_y * np.float64(width / 2) - shift_y]
    return np.stack(np.broadcast_arrays(*x, *y), -1).reshape(-1, 2, 3)


def resize(batch: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, 3, *size): bilinear, antialiased."""
    from torchvision.transforms.v2 import functional as tv

    resized: torch.Tensor = tv.resize(batch, list(size), antialias=True)
    return resized.contiguous(memory_format=format_of(batch))


def crop(batch: torch.Tensor, boxes: Numbers, size: tuple[int, int]) -> torch.Tensor:
    """(B, 3, *size): each photo's box, resized; `boxes` are (B, 4): top, left, height and width in whole pixels."""
    places = zip(batch, boxes.tolist(), strict=True)
    cut = [photo[:, top : top + high, left : left + wide] for photo, (top, left, high, wide) in places]
    done = torch.cat([resize(box[None], size) for box in cut])
    return done.contiguous(memory_format=format_of(batch))


def warp(batch: torch.Tensor, maps: Parameters) -> torch.Tensor:
    """Each photo through its own affine map, bilinear.

    `maps` (B, 2, 3) lead from a place in the result to the place in the photo that is shown there; x and y are in
    pixels from the centre. What lies outside repeats the photo's nearest edge pixel (as Keras does by default): a black
    frame would give the change away to the network, and a reflection would draw fruit that is not there.
    """
    height, width = batch.shape[2:]
    x = torch.arange(width, device=batch.device) - (width - 1) / 2
    y = (torch.arange(height, device=batch.device) - (height - 1) / 2)[:, None]
    a, b, c, d, e, f = (per_photo(column, batch)[:, 0] for column in maps.reshape(-1, 6).T)
    # not F.affine_grid: its matrix product rounds by the batch's size, and in TF32 where that is allowed
    grid = torch.stack([(a * x + b * y + c) * (2 / width), (d * x + e * y + f) * (2 / height)], dim=-1)
    moved = F.grid_sample(batch.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return to_uint8(moved).contiguous(memory_format=format_of(batch))


def format_of(batch: torch.Tensor) -> torch.memory_format:
    """Channels last, or contiguous."""
    last = batch.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def dispatch(batch: torch.Tensor, kinds: Sequence[tuple[Any, ...]]) -> torch.Tensor:
    """Each photo through the kernel of its kind; one of no kind stays as it is.

    A kind is (which photos (B,) bool, kernel, the kernel's parameters (B, ...)...); no photo is of two.
    """
    done = batch.clone()
    for which, kernel, *parameters in kinds:
        numbers = np.flatnonzero(which)
        if len(numbers):
            places = torch.from_numpy(numbers).to(batch.device)
            chosen = [each[places if isinstance(each, torch.Tensor) else numbers] for each in parameters]
            done[places] = kernel(batch[places], *chosen)
    return done


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """How far the operations of AutoAugment's family go at full strength."""

    shear: float
    """Tangent."""
    shift_px: float = 0.0
    shift: float = 0.0
    """Share of the photo's side."""
    degrees: float
    enhance: float
    """How far from 1 a factor of brightness, colour, contrast or sharpness goes."""
    bits: float
    """How many posterize drops."""


WIDE = Space(shear=0.99, shift_px=32.0, degrees=135.0, enhance=0.99, bits=6)
"""TrivialAugment's wide space (Müller and Hutter, 2021), as in torchvision."""
RANDAUGMENT = Space(shear=0.3, shift=150 / 331, degrees=30.0, enhance=0.9, bits=4)
"""RandAugment's space (Cubuk et al., 2019), as in torchvision."""
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
OPERATIONS = (
    *("Identity", *MOVES, "Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
"""Of both spaces, by torchvision's names."""


def operate(
    batch: torch.Tensor, space: Space, operations: Numbers, strength: Parameters, sign: Parameters
) -> torch.Tensor:
    """Each photo through one of `OPERATIONS`, by number, at its `strength` in [0, 1]; a `sign` of -1 turns it round."""
    from torchvision.transforms.v2 import functional as tv

    does = {name: operations == number for number, name in enumerate(OPERATIONS)}
    signed = sign * strength
    factor = 1 + space.enhance * signed
    kinds = [
        (np.any([does[name] for name in MOVES], axis=0), warp, _moves(batch, space, does, signed)),
        (does["Brightness"], brightness, factor),
        (does["Color"], saturation, factor),
        (does["Contrast"], contrast, factor),
        (does["Sharpness"], sharpness, factor),
        (does["Posterize"], posterize, np.round(8 - space.bits * strength)),
        (does["Solarize"], solarize, 255 * (1 - strength)),
        (does["AutoContrast"], tv.autocontrast),
        (does["Equalize"], tv.equalize),
    ]
    return dispatch(batch, kinds)


def _moves(batch: torch.Tensor, space: Space, does: dict[str, NDArray[np.bool_]], signed: Parameters) -> Parameters:
    """(B, 2, 3) maps for `warp`; whole pixels where a photo is shifted."""
    height, width = batch.shape[2:]
    return sources(
        height,
        width,
        degrees=does["Rotate"] * signed * space.degrees,
        shear_x=does["ShearX"] * signed * space.shear,
        shear_y=does["ShearY"] * signed * space.shear,
        shift_x=np.trunc(does["TranslateX"] * signed * (space.shift_px + space.shift * width)),
        shift_y=np.trunc(does["TranslateY"] * signed * (space.shift_px + space.shift * height)),
    )
