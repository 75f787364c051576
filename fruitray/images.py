"""Bytes of one file -> RGB pixels, or an `ImageError` with a stable code. All limits on what may be decoded live here.

    list_images -> fetch -> decode

The format is told by content, never by name. Resizing and normalising come later (`preprocess.py`).
"""

import io
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fruitray.errors import (
    ArchivedError,
    ChangedError,
    CredentialsError,
    EndpointError,
    ImageError,
    NotFoundError,
    StorageError,
)
from fruitray.storage import Entry, Storage, is_hidden

MAX_BYTES = 64 * 2**20
MAX_AHEAD = 4 * MAX_BYTES
"""Bytes that are fetched before they are asked for, at most."""
MAX_PIXELS = 50_000_000
MAX_SCAN_PIXELS = 1_000_000_000
"""Pixels times progressive scans: what a JPEG decoder has to walk through."""
MIN_SIDE = 8
MAX_ASPECT = 100

CODES = {
    "E_EMPTY": "the file has no bytes",
    "E_NOT_IMAGE": "the content is no image",
    "E_FORMAT": "an image format other than JPEG, PNG or WebP",
    "E_TRUNCATED": "the file ends before the image does",
    "E_CORRUPT": "the image data is damaged",
    "E_DECODE_CRASH": "decoding it took more memory than there is, or ended the process that did it",
    "E_TIMEOUT": "decoding it took too long",
    "E_METADATA": "the metadata is damaged or a bomb",
    "E_TOO_LARGE": f"more than {MAX_PIXELS // 10**6} megapixels",
    "E_TOO_COMPLEX": "too many progressive scans for its size",
    "E_TOO_SMALL": f"a side is under {MIN_SIDE} pixels",
    "E_ASPECT": f"one side is over {MAX_ASPECT} times the other",
    "E_FILE_TOO_BIG": f"the file is over {MAX_BYTES // 2**20} MiB",
    "E_SRC_GONE": "the file was deleted after it was listed",
    "E_SRC_CHANGED": "the file was replaced after it was listed",
    "E_SRC_ARCHIVED": "the file lies in an archive tier",
    "E_SRC_DENIED": "this file may not be read",
    "E_SYMLINK": "a symbolic link, which is never followed",
    "E_NOT_REGULAR": "a FIFO, device or socket",
}
"""Every `error_code` a row can carry, and what it means."""
PASSING = "^E_(SRC|TIMEOUT|DECODE|SYM|NOT_REG)"
"""A regular expression: codes of files that could not be had, or not be decoded in time; they may do better now."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One decoded photo."""

    image: Image.Image
    """RGB, upright; smaller than the file says, where that was `enough`."""
    width: int
    """Pixels from left to right that the file says, after EXIF rotation."""
    height: int
    """Pixels from top to bottom."""
    mode: str
    """Pillow's mode in the file: RGB, L, CMYK, P, RGBA, ..."""
    format: str
    frames: int = 1
    """How many there are in the file; the first is decoded."""
    orientation: int = 1
    """EXIF's 1 to 8, as applied; 1 where there is none, or nonsense."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(3, H, W) uint8 RGB, a view of (H, W, 3) memory (channels last)."""
        return np.asarray(self.image).transpose(2, 0, 1)


def list_images(storage: Storage) -> tuple[list[Entry], int]:
    """Every input below the root, sorted by key, and how many hidden files and folder markers were skipped."""
    entries, skipped = [], 0
    for entry in storage.list():
        if is_hidden(entry.key):
            skipped += 1
        else:
            entries.append(entry)
    entries.sort(key=lambda entry: entry.key)
    return entries, skipped


def fetch(storage: Storage, entries: Sequence[Entry], threads: int = 16) -> Iterator[bytes | ImageError]:
    """Read each entry, many at once, in order. What is wrong with one object is its `ImageError`; a storage that fails
    as a whole raises (`TryAgainError`, `CredentialsError`, `EndpointError`)."""
    pool = ThreadPoolExecutor(threads)
    window: deque[tuple[Future[bytes | ImageError], int]] = deque()
    ahead = 0
    try:
        for entry in entries:
            size = min(entry.size, MAX_BYTES)
            while window and (len(window) > 2 * threads or ahead + size > MAX_AHEAD):
                found, freed = window.popleft()
                ahead -= freed
                yield found.result()
            window.append((pool.submit(_fetch_one, storage, entry), size))
            ahead += size
        while window:
            yield window.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)  # where a read fails for want of the store, the next ones would, as slowly


def _fetch_one(storage: Storage, entry: Entry) -> bytes | ImageError:
    if entry.kind != "file":
        return image_error("E_SYMLINK" if entry.kind == "symlink" else "E_NOT_REGULAR")
    if entry.size > MAX_BYTES:
        return image_error("E_FILE_TOO_BIG", f"{entry.size} bytes")
    try:
        return storage.read(entry.key, entry.etag)
    except NotFoundError:
        return image_error("E_SRC_GONE")
    except ChangedError:
        return image_error("E_SRC_CHANGED")
    except ArchivedError:
        return image_error("E_SRC_ARCHIVED")
    except (CredentialsError, EndpointError):
        raise
    except StorageError as error:
        return image_error("E_SRC_DENIED", error.reason)


def image_error(code: str, detail: str = "") -> ImageError:
    """The `ImageError` for `code`, with the catalogue's words and what is known of this file."""
    return ImageError(code, f"{CODES[code]} ({detail})" if detail else CODES[code])


def decode(data: bytes, enough: int = 0) -> Photo:
    """Decode JPEG, PNG or WebP: first frame, EXIF rotation applied, transparency laid onto white, 16 bits scaled to 8.

    Where the shorter side need have no more than `enough` pixels, a JPEG may come at a half, a quarter or an eighth of
    its sides, which takes about half of the time, or a third (libjpeg's scaling of the blocks that it is made of).

    Raises:
        ImageError: with a code of `CODES`; nothing else, whatever the bytes.
    """
    file_format = _sniff(data)
    scans, whole = _WALKS[file_format](data)
    try:
        with _PLUGINS[file_format](io.BytesIO(data)) as image:  # Image.open would warn of sizes and unpack phones' MPO
            _check_limits(image.size, scans)
            if not whole:  # Pillow alone lets some cut files pass
                raise image_error("E_TRUNCATED")
            size = image.size
            if enough:
                image.draft(None, (size[0] * enough // min(size), size[1] * enough // min(size)))
            image.load()
            frames = min(int(getattr(image, "n_frames", 1)), 2**31 - 1)  # what a file says may be more than int32 holds
            orientation = _orientation(image)
            upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
            size = size[::-1] if orientation > 4 else size  # it lies on its side
            return Photo(_to_rgb(upright), *size, image.mode, file_format, frames, orientation)
    except ImageError:
        raise
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise _decode_error(error, whole) from error


def rgb(data: bytes, enough: int = 0) -> dict[str, Any]:
    """`pixels`, (H, W, 3) uint8 of a photo, and the `width` and `height` of the file: `decode` for `isolate.py`."""
    photo = decode(data, enough)
    return {"pixels": np.asarray(photo.image), "width": photo.width, "height": photo.height}


_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
}
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
_OTHER_FORMATS = (
    *(b"GIF8", b"BM", b"%!PS", b"\xc5\xd0\xd3\xc6", b"\0\0\1\0", b"PK\3\4", b"8BPS", b"\0\0\0\x0cjP  "),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF
)
_HEIF = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis"))
"""What phones write; after four bytes of length."""


def _sniff(data: bytes) -> str:
    if not data:
        raise image_error("E_EMPTY")
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    other = data.startswith(_OTHER_FORMATS) or data.startswith(_HEIF, 4)
    raise image_error("E_FORMAT" if other else "E_NOT_IMAGE")


_JPEG_MARKER = re.compile(rb"\xff[^\0\1\xd0-\xd7\xff]")  # those with a length; 0 is an escaped byte, D0-D7 restart


def _walk_jpeg(data: bytes) -> tuple[int, bool]:
    """How many scans there are up to the image's own end, and whether that end is there."""
    position, scans = 2, 0
    while marker := _JPEG_MARKER.search(data, position):
        if marker[0] == b"\xff\xd9":
            return scans, True
        scans += marker[0] == b"\xff\xda"
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return scans, False


def _walk_png(data: bytes) -> tuple[int, bool]:
    """One scan, and whether all chunks are there; their checksums must hold, which Pillow asks of some only."""
    if data[12:16] == b"IHDR" and b"\0\0\0\0" in (data[16:20], data[20:24]):
        raise image_error("E_TOO_SMALL", "a side of 0 pixels")
    position = 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        chunk, checksum = data[position + 4 : end - 4], data[end - 4 : end]
        if end > len(data):
            return 1, False
        if zlib.crc32(chunk) != int.from_bytes(checksum):
            raise image_error("E_CORRUPT", "a checksum does not match")
        if chunk.startswith(b"IEND"):
            return 1, True
        position = end
    return 1, False


def _walk_webp(data: bytes) -> tuple[int, bool]:
    return 1, len(data) >= 8 + int.from_bytes(data[4:8], "little")


_WALKS = {"JPEG": _walk_jpeg, "PNG": _walk_png, "WEBP": _walk_webp}


def _check_limits(sides: tuple[int, int], scans: int) -> None:
    width, height = sides
    size = f"{width}x{height}"
    if width * height > MAX_PIXELS:
        raise image_error("E_TOO_LARGE", size)
    if min(width, height) < MIN_SIDE:
        raise image_error("E_TOO_SMALL", size)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise image_error("E_ASPECT", size)
    if scans * width * height > MAX_SCAN_PIXELS:
        raise image_error("E_TOO_COMPLEX", f"{size}, {scans} scans")


def _decode_error(error: Exception, whole: bool) -> ImageError:
    text = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return image_error("E_TOO_LARGE", text)
    if isinstance(error, MemoryError):
        return image_error("E_DECODE_CRASH")
    if whole and re.search("truncated .{4} chunk", text.lower()):  # of a PNG: says something beside the pixels
        return image_error("E_METADATA", text)
    if not whole or "truncated" in text.lower():
        return image_error("E_TRUNCATED", text)
    if "decompressed data too large" in text.lower() or "text chunks" in text.lower():
        return image_error("E_METADATA", text)
    return image_error("E_CORRUPT", text)


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:  # not ImageOps.exif_transpose: it writes the whole EXIF anew, and leaves photos lying where that fails
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(said) if said in _UPRIGHT else 1
    except Exception:  # nonsense EXIF is not the photo's fault: many error types, all ignored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: scaled, where Pillow's own convert would clip
        deep = np.asarray(image)
        shade = np.where(deep == image.info.get("transparency", -1), 255, deep >> 8)  # transparent: white
        return Image.fromarray(shade.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
