"""Photos for the tests, good and bad, each built here: what is in them, and what a decoder is to say of it."""

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image

from fruitray.synthetic import photo_set

WIDTH, HEIGHT = 32, 24
# Red grows to the right and green downwards, so every turn and mirroring shows.
GRADIENT = np.stack(
    [
        *np.meshgrid(np.linspace(0, 250, WIDTH), np.linspace(0, 250, HEIGHT)),
        np.full((HEIGHT, WIDTH), 60),
    ],
    axis=-1,
).astype(np.uint8)
PHOTO = Image.fromarray(GRADIENT)


@cache
def sixty() -> dict[str, bytes]:
    """Drawn photos by key, two of them corrupt; drawing takes seconds."""
    return photo_set(20)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, file_format, **options)
    return sink.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side: tuple[int, int], depth: int, colour: int, row: bytes, *extra: bytes) -> bytes:
    """A PNG of (at most 100) equal rows, with `extra` chunks before its pixels: what Pillow itself does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *side, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * min(side[1], 100)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


def chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each chunk of a PNG begins and ends."""
    start = 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        yield start, end
        start = end


def jpeg_with(segment: bytes, jpeg: bytes, marker: bytes = b"\xff\xe1") -> bytes:
    return jpeg[:2] + marker + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def exif_entries(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF segment of (tag, type, count, four bytes of value) entries."""
    listed = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + listed + bytes(4)


JPEG = encoded(PHOTO, "JPEG", quality=95, subsampling=0)
PNG = encoded(PHOTO, "PNG")
WEBP = encoded(PHOTO, "WEBP", lossless=True)
NOISE_PNG = encoded(noise(48, 40), "PNG")
THUMBNAILED = jpeg_with(b"Exif\0\0" + encoded(noise(16, 16), "JPEG"), encoded(noise(48, 40), "JPEG"))
WHOLE = {
    "jpeg": encoded(noise(48, 40), "JPEG"),
    "jpeg in scans": encoded(noise(48, 40), "JPEG", progressive=True),
    "jpeg with restarts": encoded(noise(48, 40), "JPEG", restart_marker_rows=1),
    "jpeg with a thumbnail": THUMBNAILED,
    "png": NOISE_PNG,
    "png with text behind": NOISE_PNG[:-12] + chunk(b"tEXt", b"Comment\0IDAT IEND") + NOISE_PNG[-12:],
    "png animated": encoded(noise(48, 40), "PNG", save_all=True, append_images=[Image.new("RGB", (48, 40))]),
    "webp": encoded(noise(48, 40), "WEBP"),
    "webp lossless": encoded(noise(48, 40), "WEBP", lossless=True),
    "webp animated": encoded(noise(48, 40), "WEBP", save_all=True, append_images=[Image.new("RGB", (48, 40))]),
}
CODED = {
    "zero bytes": (b"", "E_EMPTY"),
    "text": (b"a note about fruit\n", "E_NOT_IMAGE"),
    "an error page": (b"<!DOCTYPE html><title>404</title>", "E_NOT_IMAGE"),
    "PDF before a JPEG": (b"%PDF-1.7\n" + JPEG, "E_NOT_IMAGE"),
    "zeros": (bytes(500), "E_NOT_IMAGE"),
    "GIF": (encoded(PHOTO, "GIF"), "E_FORMAT"),
    "TIFF": (encoded(PHOTO, "TIFF"), "E_FORMAT"),
    "TIFF, Motorola order": (b"MM\0*" + bytes(50), "E_FORMAT"),
    "BMP": (encoded(PHOTO, "BMP"), "E_FORMAT"),
    "EPS": (encoded(PHOTO, "EPS"), "E_FORMAT"),
    "ICO": (encoded(PHOTO, "ICO"), "E_FORMAT"),
    "ZIP": (b"PK\3\4" + bytes(50), "E_FORMAT"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(50), "E_FORMAT"),
    "HEIC of several": (b"\0\0\0\x18ftypmsf1" + bytes(50), "E_FORMAT"),
    "AVIF of several": (b"\0\0\0\x18ftypavis" + bytes(50), "E_FORMAT"),
    "BigTIFF": (b"II+\0\x08\0\0\0" + bytes(50), "E_FORMAT"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "E_FORMAT"),
    "Photoshop": (b"8BPS\0\1" + bytes(50), "E_FORMAT"),
    "a whole PNG with half of a gamma": (png((16, 16), 8, 2, bytes(48), chunk(b"gAMA", b"\0")), "E_METADATA"),
    "1x1": (png((1, 1), 8, 2, b"abc"), "E_TOO_SMALL"),
    "7x30": (encoded(Image.new("RGB", (7, 30)), "PNG"), "E_TOO_SMALL"),
    "0x0": (png((0, 0), 8, 2, b""), "E_TOO_SMALL"),
    "8x8": (encoded(Image.new("RGB", (8, 8)), "JPEG"), "loaded"),
    "65,500x1": (encoded(Image.new("RGB", (65_500, 1)), "JPEG"), "E_TOO_SMALL"),
    "809x8": (encoded(Image.new("RGB", (809, 8)), "JPEG"), "E_ASPECT"),
    "8x801": (encoded(Image.new("RGB", (8, 801)), "WEBP"), "E_ASPECT"),
    "800x8": (encoded(Image.new("RGB", (800, 8)), "PNG"), "loaded"),
    "30,000x30,000": (png((30_000, 30_000), 8, 2, bytes(90_000)), "E_TOO_LARGE"),
    "50.4 megapixels": (png((7_200, 7_000), 8, 0, bytes(7_200)), "E_TOO_LARGE"),
    "50.4 megapixels of WebP": (encoded(Image.new("1", (7_200, 7_000)), "WEBP"), "E_TOO_LARGE"),
}
"""What is at the edge of what may be decoded, and its error code, or `loaded`."""


def scans(jpeg: bytes, count: int) -> bytes:
    """`jpeg` (progressive) with its last scan `count` times more."""
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * count + jpeg[-2:]


SCANS = scans(encoded(Image.new("RGB", (2_000, 2_000), "red"), "JPEG", progressive=True, quality=30), 300)
_PACKED = zlib.compress(bytes(50_000_000))
METADATA_BOMBS = {
    kind.decode(): PNG[:33] + chunk(kind, head + _PACKED) + PNG[33:]
    for kind, head in [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")]
}
