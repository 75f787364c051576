"""RGB pixels of any size -> the square a network sees. Training and scoring share this, through the model package."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fruitray.config import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How a network wants its photos; comes with its weights."""

    size: int
    """Side of the square, in pixels."""
    crop: float = 1.0
    """Side of the centre square that is kept, as a share of the shorter side; 0 squeezes the whole photo in."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Both antialiased."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of red, green and blue, on a scale from 0 to 1; taken off inside the network."""
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        require(isinstance(self.size, int) and self.size >= 1, "size", self.size, "must be a positive whole number")
        require(0 <= self.crop <= 1, "crop", self.crop, "must lie in [0, 1]")
        require(self.interpolation in ("bilinear", "bicubic"), "interpolation", self.interpolation, "unknown")
        for name, value in (("mean", self.mean), ("std", self.std)):
            finite = [isinstance(number, int | float) and math.isfinite(number) for number in value]
            require(finite == [True] * 3, name, value, "must be three numbers")
        require(min(self.std) > 0, "std", self.std, "must be positive")

    @property
    def enough(self) -> int:
        """Pixels of a photo's shorter side beyond which more make no difference worth their decoding: twice as many as
        `resize` leaves of them."""
        return math.ceil(2 * self.size / (self.crop or 1))

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` and JSON left of one.

        Raises:
            UsageError, TypeError: it describes none.
        """
        fields: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in said.items()}
        return cls(**fields)

    def resize(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """(3, H, W) uint8 -> (3, size, size) uint8: centre square, then one antialiased resize."""
        photo = torch.from_numpy(np.array(_centre(pixels, self.crop).transpose(1, 2, 0), order="C"))  # a writable copy
        batch = photo.permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), channels last
        if batch.shape[2:] != (self.size, self.size):
            batch = F.interpolate(batch, (self.size, self.size), mode=self.interpolation, antialias=True)
        return batch[0]


def _centre(pixels: NDArray[np.uint8], crop: float) -> NDArray[np.uint8]:
    if not crop:
        return pixels
    height, width = pixels.shape[1:]
    side = max(1, round(min(height, width) * crop))
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[:, top : top + side, left : left + side]


def stack(squares: Sequence[torch.Tensor]) -> torch.Tensor:
    """(3, S, S) each -> (B, 3, S, S), channels last."""
    return torch.stack(list(squares)).contiguous(memory_format=torch.channels_last)
