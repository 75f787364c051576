"""Augmentation: a policy is the names of steps joined by `+`; the pixels' work is done in `transforms.py`.

What a photo gets depends on (seed, epoch, its position in the index's pool) alone: all that is random is hashed
from these, so neither the batch, its order, the worker nor the device matters. Validation photos are never changed.
"""

import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from fruitray import transforms
from fruitray.config import FIXED_AUGMENTATIONS, MIXES
from fruitray.transforms import Numbers, Parameters

DRAWS = 8
"""Random numbers that each step has for each photo."""
BINS = 31
"""Strengths of trivial and rand are 0, 1/30, .. 1."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
EIGHT = ("original", "h", "v", "hv", "turned", "turned-h", "turned-v", "turned-hv")
"""The report's eight variants: flipped left-right (h), upside down (v); `turned` ones then scaled and turned."""
VARIANTS = dict(zip(FIXED_AUGMENTATIONS, (EIGHT[:1], EIGHT[:2], EIGHT[:4], EIGHT), strict=True))
"""The fixed variants of a photo that a policy makes, where it makes such; another meaning would need another name."""
SCALE, DEGREES = (0.8, 1.0), 15.0
"""Of the report: `turned` photos are scaled by a factor in `SCALE` and turned by up to `DEGREES` either way."""


def steps(policy: str) -> tuple[str, ...]:
    """The names that `policy` joins."""
    return () if policy == "none" else tuple(policy.split("+"))


def copies(policy: str) -> int:
    """How many training examples `policy` makes of each photo."""
    return len(EIGHT) if "eightfold" in steps(policy) else 1


def mixes(policy: str) -> tuple[str, ...]:
    """The steps of `policy` that blend two photos."""
    return tuple(step for step in steps(policy) if step in MIXES)


def uniforms(seed: int, epoch: int, examples: Numbers, stream: str) -> Parameters:
    """(B, DRAWS) numbers in [0, 1): counter-based, a hash of (seed, epoch, example, stream, column).

    The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in (seed, epoch, zlib.crc32(stream.encode())):
        state = _splitmix(state ^ np.uint64(word % 2**64))
    state = _splitmix(state ^ examples.astype(np.uint64))
    words = _splitmix(state[:, None] + np.arange(DRAWS, dtype=np.uint64) * GOLDEN)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    word = state + GOLDEN
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def augment(
    batch: torch.Tensor, policy: str, seed: int, epoch: int, examples: Numbers, size: int | None = None
) -> torch.Tensor:
    """`batch` (B, 3, H, W) uint8 after all steps of `policy` but those that blend two photos; `size` x `size` if given.

    `examples` (B,) are the examples' numbers: with `eightfold`, example 8 * n + v is variant v of photo n of the pool;
    otherwise example n is photo n.
    """
    if copies(policy) > 1:
        batch = fixed_variants(batch, *np.divmod(examples, copies(policy)))
    if size and "crop" not in steps(policy):
        batch = transforms.resize(batch, (size, size))
    kernels = STEPS | {"crop": partial(_crop, size=size)}
    for step in steps(policy):
        if step in kernels:
            batch = kernels[step](batch, uniforms(seed, epoch, examples, step))
    return batch


def mix(
    batch: torch.Tensor, partners: torch.Tensor, policy: str, seed: int, epoch: int, examples: Numbers
) -> tuple[torch.Tensor, Parameters]:
    """Each photo of `batch` mixed with its own of `partners`, and (B,) the share of it that is left.

    mixup blends the two (Zhang et al., 2017), cutmix pastes a box of the partner (Yun et al., 2019), whose centre lies
    anywhere and which ends at the rim; a policy with both draws one of them. The share is drawn uniformly, which is
    Beta(1, 1), torchvision's default, but for each photo.
    """
    draws = uniforms(seed, epoch, examples, "mix")
    named = np.array([step in steps(policy) for step in ("mixup", "cutmix")])
    cuts = draws[:, 0] < named[1] / named.sum()
    share = draws[:, 1]
    box = _box_around(draws[:, 2:4], np.sqrt(1 - share), *batch.shape[2:])
    kinds = [(~cuts, transforms.blend, partners, share), (cuts, transforms.paste, partners, *box)]
    covered = box[2] * box[3] / (batch.shape[2] * batch.shape[3])
    return transforms.dispatch(batch, kinds), np.where(cuts, 1 - covered, share)


def _box_around(centre: Parameters, side: Parameters, height: int, width: int) -> tuple[Parameters, ...]:
    """Top, left, height and width in whole pixels of boxes with the `side`, a share of the photo's, cut at its rim."""
    box = []
    for draws, length in zip(centre.T, (height, width), strict=True):
        middle, half = np.floor(draws * length), np.floor(side * length / 2)
        start, end = np.maximum(middle - half, 0), np.minimum(middle + half, length)
        box.append((start, end - start))
    (top, high), (left, wide) = box
    return top, left, high, wide


def fixed_variants(batch: torch.Tensor, positions: Numbers, variants: Numbers) -> torch.Tensor:
    """Training photos, by position, each as one of `EIGHT`, by number.

    Scale and angle of a turned one depend on these two alone, not on a seed: the set is as fixed as the photos are, and
    embeddings of it serve every run.
    """
    draws = uniforms(0, 0, positions * len(EIGHT) + variants, "eightfold")
    return _one_of_eight(batch, variants, draws)


def _one_of_eight(batch: torch.Tensor, variants: Numbers, draws: Parameters) -> torch.Tensor:
    """Flipped by the two low bits of the variant; scaled and turned, by the last two draws, where the third is set."""
    batch = transforms.flip(batch, variants & 1 > 0, variants & 2 > 0)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * draws[:, -2]
    maps = transforms.sources(*batch.shape[2:], degrees=DEGREES * _signed(draws[:, -1]), scale=scale)
    return transforms.dispatch(batch, [(variants >= 4, transforms.warp, maps)])


def _signed(draws: Parameters) -> Parameters:
    """[0, 1) -> [-1, 1)."""
    return 2 * draws - 1


def _either(draws: Parameters) -> Parameters:
    """[0, 1) -> -1 or 1."""
    return np.where(draws < 0.5, -1.0, 1.0)


def _mirror(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    return transforms.flip(batch, draws[:, 0] < 0.5, np.zeros(len(draws), dtype=np.bool_))


def _flips(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    return transforms.flip(batch, draws[:, 0] < 0.5, draws[:, 1] < 0.5)


def _report(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    return _one_of_eight(batch, (draws[:, 0] * len(EIGHT)).astype(np.int64), draws)


def _crop(batch: torch.Tensor, draws: Parameters, size: int | None = None) -> torch.Tensor:
    """A box of 25..100 % of the photo, 3/4..4/3 times as wide as high, cut to fit (Szegedy et al., "Going deeper with
    convolutions", 2014; there of 8 % on), made `size` x `size` or as large as the photo."""
    share, stretch = 0.25 + 0.75 * draws[:, 0], (4 / 3) ** _signed(draws[:, 1])
    rows, columns = batch.shape[2:]
    sides = [np.sqrt(share / stretch) * rows, np.sqrt(share * stretch) * columns]
    height, width = (np.clip(np.round(side), 1, most) for side, most in zip(sides, (rows, columns), strict=True))
    top, left = np.floor(draws[:, 2] * (rows - height + 1)), np.floor(draws[:, 3] * (columns - width + 1))
    boxes = np.stack([top, left, height, width], -1).astype(np.int64)
    return transforms.crop(batch, boxes, (size or rows, size or columns))


def _jitter(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    """Brightness, contrast and saturation by a factor of 0.6..1.4, as is usual for ImageNet, in this order; hue, which
    tells fruits apart, by 5 % of the circle at most."""
    batch = transforms.brightness(batch, 1 + 0.4 * _signed(draws[:, 0]))
    batch = transforms.contrast(batch, 1 + 0.4 * _signed(draws[:, 1]))
    batch = transforms.saturation(batch, 1 + 0.4 * _signed(draws[:, 2]))
    return transforms.hue(batch, 0.05 * _signed(draws[:, 3]))


def _jpeg(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    """Quality 30..95."""
    return transforms.jpeg(batch, 30 + np.floor(66 * draws[:, 0]))


def _erase(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    """Half of the time a box is painted over in one random colour: 2..33 % of the photo, 0.3..3.3 times as high as
    wide, cut to fit (Zhong et al., "Random erasing data augmentation", 2017; torchvision's ranges)."""
    high, wide = batch.shape[2:]
    side = np.sqrt((0.02 + 0.31 * draws[:, 1]) * high * wide)
    stretch = np.sqrt(0.3 * (3.3 / 0.3) ** draws[:, 2])
    height, width = np.clip(np.round(side * stretch), 1, high), np.clip(np.round(side / stretch), 1, wide)
    top, left = np.floor(draws[:, 3] * (high - height + 1)), np.floor(draws[:, 4] * (wide - width + 1))
    colour = np.floor(256 * draws[:, 5:8]).astype(np.uint8)
    return transforms.dispatch(batch, [(draws[:, 0] < 0.5, transforms.paint, colour, top, left, height, width)])


def _trivial(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    """One operation of the wide space, its strength drawn too."""
    strength = np.floor(draws[:, 1] * BINS) / (BINS - 1)
    return transforms.operate(batch, transforms.WIDE, _operation(draws[:, 0]), strength, _either(draws[:, 2]))


def _rand(batch: torch.Tensor, draws: Parameters) -> torch.Tensor:
    """Two operations after one another, of strength 9 of 30: torchvision's defaults."""
    strength = np.full(len(draws), 9 / (BINS - 1))
    for first in (0, 2):
        batch = transforms.operate(
            batch, transforms.RANDAUGMENT, _operation(draws[:, first]), strength, _either(draws[:, first + 1])
        )
    return batch


def _operation(draws: Parameters) -> Numbers:
    return (draws * len(transforms.OPERATIONS)).astype(np.int64)


STEPS: dict[str, Callable[[torch.Tensor, Parameters], torch.Tensor]] = {
    "mirror": _mirror,
    "flips": _flips,
    "report": _report,
    "crop": _crop,
    "jitter": _jitter,
    "jpeg": _jpeg,
    "erase": _erase,
    "trivial": _trivial,
    "rand": _rand,
}
"""Photos (B, 3, H, W) uint8 and draws (B, DRAWS) -> photos. The other steps multiply or blend examples."""
