"""What decoding no more of a large JPEG than is enough saves, and what it changes of what a network sees.

    python -m tests.benchmarks.decode

Drawn photos of 12, 6 and 2 megapixels, with noise as cameras make it; decoded and resized to 288 pixels on one core,
whole and as `Preprocessing.enough` has it.
"""

import time

import numpy as np
import torch
from PIL import Image

from fruitray.images import decode
from fruitray.preprocess import Preprocessing
from fruitray.synthetic import LABELS, draw
from tests.unit.photos import encoded

SIZES, PHOTOS, NOISE = ((4000, 3000), (3000, 2000), (1600, 1200)), 12, 12


def photo(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG."""
    drawn = draw(LABELS[number % len(LABELS)], number).resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(number).integers(-NOISE, NOISE + 1, (*size[::-1], 3))
    return encoded(Image.fromarray(np.clip(np.asarray(drawn) + noise, 0, 255).astype(np.uint8)), "JPEG", quality=90)


def seen(photos: list[bytes], enough: int) -> tuple[float, torch.Tensor]:
    """Milliseconds of CPU per photo, and (N, 3, S, S) what comes of them."""
    start = time.process_time()
    squares = [SEEN.resize(decode(data, enough).pixels) for data in photos]
    return 1000 * (time.process_time() - start) / len(photos), torch.stack(squares).float()


SEEN = Preprocessing(size=288, interpolation="bicubic")


def main() -> None:
    """Measure each size and print it."""
    torch.set_num_threads(1)
    for size in SIZES:
        photos = [photo(number, size) for number in range(PHOTOS)]
        (whole_ms, whole), (some_ms, some) = seen(photos, 0), seen(photos, SEEN.enough)
        apart = (whole - some).abs()
        took = f"whole {whole_ms:.1f} ms, enough {some_ms:.1f} ms, {whole_ms / some_ms:.2f} x"
        changed = f"apart by {apart.mean():.2f} of 255 on average, {apart.max():.0f} at most"
        print(f"{size[0]}x{size[1]}: {took}; {changed}")


if __name__ == "__main__":
    main()
