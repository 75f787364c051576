"""Whatever becomes of a photo's bytes, looking at it ends with facts or a catalogued code: 2,000 damaged photos say so.

Damage is done at random and where it tells: lengths of chunks and segments, sides in headers, offsets in EXIF, with the
checksums right again. The choices are the same in each run; a failing one is printed as its parts and its recipe.
"""

import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from fruitray.errors import ImageError
from fruitray.images import CODES
from fruitray.isolate import Isolated
from tests.unit.photos import chunk, chunks, encoded, jpeg_with, noise

EXIF = Image.Exif()
EXIF.update({0x0112: 6, 0x010F: "Fruit & Co", 0x0132: "2020:01:01 00:00:00", 0x011A: 72.0})
EXIF.get_ifd(0x8769).update({0x9003: "2020:01:01 00:00:00", 0x829A: 0.01})
RGB, ALPHA = noise(24, 20), noise(24, 20).convert("RGBA")
ALPHA.putalpha(noise(24, 20).convert("L"))
MORE = {"save_all": True, "append_images": [ALPHA.rotate(180), ALPHA]}
SIXTEEN = Image.fromarray(np.random.default_rng(1).integers(0, 2**16, (20, 24), dtype=np.uint16))
PHOTOS = {
    "jpeg": encoded(RGB, "JPEG", restart_marker_rows=1),
    "jpeg progressive, exif": encoded(RGB, "JPEG", progressive=True, exif=EXIF),
    "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "jpeg grey, profile": encoded(RGB.convert("L"), "JPEG", icc_profile=bytes(range(200)), comment=b"a fruit"),
    "jpeg, thumbnail": jpeg_with(b"Exif\0\0" + encoded(noise(16, 16), "JPEG"), encoded(RGB, "JPEG")),
    "jpegs of a phone": encoded(RGB, "MPO", save_all=True, append_images=[RGB], exif=EXIF),
    "png": encoded(RGB, "PNG", exif=EXIF),
    "png 16": encoded(SIXTEEN, "PNG"),
    "png palette": encoded(RGB.quantize(16), "PNG", transparency=3),
    "png rgba": encoded(ALPHA, "PNG", icc_profile=bytes(range(200)), dpi=(72, 72)),
    "png interlaced": b"",  # below: Pillow writes none
    "png animated": encoded(ALPHA, "PNG", **MORE),
    "webp": encoded(RGB, "WEBP", exif=EXIF),
    "webp lossless": encoded(ALPHA, "WEBP", lossless=True, icc_profile=bytes(range(200))),
    "webp animated": encoded(ALPHA, "WEBP", **MORE, exif=EXIF),
}
PHOTOS["png interlaced"] = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 1))
    + chunk(b"IDAT", zlib.compress(bytes(16 * 16 + 30)))
    + chunk(b"IEND", b"")
)
CASES = 2_000


# ---- A photo's parts, and the photo again

Part = tuple[bytes, bytes]  # its name, its content; what has no name has no length before it, either


def parts_of(photo: bytes) -> list[Part]:
    return list({b"\xff": _segments, b"\x89": _png_chunks, b"R": _webp_chunks}[photo[:1]](photo))


def _segments(jpeg: bytes) -> Iterator[Part]:
    marker, position = re.compile(rb"\xff[^\0\xd0-\xd7\xff]"), 0
    while position < len(jpeg):
        name = jpeg[position : position + 2]
        size = 0
        if name not in (b"\xff\xd8", b"\xff\xd9"):
            size = int.from_bytes(jpeg[position + 2 : position + 4])
            yield name, jpeg[position + 4 : position + 2 + size]
        following = marker.search(jpeg, position + 2 + size)
        raw = jpeg[position + (2 + size if size else 0) : following.start() if following else len(jpeg)]
        if raw:
            yield b"", raw
        position = following.start() if following else len(jpeg)


def _png_chunks(png: bytes) -> Iterator[Part]:
    for start, end in chunks(png):
        yield png[start + 4 : start + 8], png[start + 8 : end - 4]


def _webp_chunks(webp: bytes) -> Iterator[Part]:
    position = 12
    while position < len(webp):
        size = int.from_bytes(webp[position + 4 : position + 8], "little")
        yield webp[position : position + 4], webp[position + 8 : position + 8 + size]
        position += 8 + size + size % 2


def photo_of(start: bytes, parts: Sequence[Part], stretch: dict[int, int] | None = None) -> bytes:
    """The photo that began with `start`. Checksums are right; so are lengths, but for what `stretch` adds to some."""
    write = {b"\xff": _segment, b"\x89": _png_chunk, b"R": _webp_chunk}[start[:1]]
    body = b"".join(write(*part, (stretch or {}).get(number, 0)) for number, part in enumerate(parts))
    if start[:1] == b"R":
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return (start[:8] if start[:1] == b"\x89" else b"") + body


def _segment(name: bytes, content: bytes, stretch: int) -> bytes:
    return name + struct.pack(">H", (len(content) + 2 + stretch) % 2**16) + content if name else content


def _png_chunk(name: bytes, content: bytes, stretch: int) -> bytes:
    return struct.pack(">I", (len(content) + stretch) % 2**32) + chunk(name, content)[4:]


def _webp_chunk(name: bytes, content: bytes, stretch: int) -> bytes:
    return name + struct.pack("<I", (len(content) + stretch) % 2**32) + content + bytes(len(content) % 2)


# ---- Damage: to bytes; to a part's content; to the row of parts

NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 4_096, 2**15, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def _set(data: bytes, place: int, value: int) -> bytes:
    """Write one, two or four bytes, in either order."""
    size, order = [(1, "big"), (2, "big"), (2, "little"), (4, "big"), (4, "little")][value % 5]
    number = (value >> 3) if value % 2 else NUMBERS[(value >> 3) % len(NUMBERS)]
    return data[:place] + (number % 256**size).to_bytes(size, order) + data[place + size :]


DAMAGES: dict[str, Callable[[bytes, int, int], bytes]] = {
    "set": _set,
    "flip": lambda data, place, value: data[:place] + bytes([data[place] ^ 1 << value % 8]) + data[place + 1 :],
    "insert": lambda data, place, value: data[:place] + value.to_bytes(4) * (1 + value % 40) + data[place:],
    "delete": lambda data, place, value: data[:place] + data[place + 1 + value % 40 :],
    "repeat": lambda data, place, value: data[:place] + data[max(0, place - value % 500) :],
    "cut": lambda data, place, value: data[:place],
    "splice": lambda data, place, value: data[:place] + PHOTOS[NAMES[value % len(NAMES)]][place:],
}
NAMES = list(PHOTOS)


class Damage(NamedTuple):
    """`where`: the photo's `bytes`, one part's `content`, `pixels`, `length`, or the row of parts."""

    where: str
    how: str
    part: int
    place: int
    value: int


WHERE = ("bytes", "content", "content", "pixels", "length", "drop", "double", "swap", "rename", "borrow")


def damaged(photo: bytes, damages: Sequence[Damage]) -> bytes:
    """`photo` with damage to its parts first, then to its bytes."""
    parts, stretch = parts_of(photo), {}
    for damage in damages:
        if damage.where == "length":
            stretch[damage.part % (len(parts) or 1)] = _excess(damage.value)
        elif damage.where != "bytes" and parts:
            parts = _rearranged(parts, photo[:1], damage)
    photo = photo_of(photo, parts, stretch)
    for damage in damages:
        if damage.where == "bytes":
            photo = _hit(photo, damage)
    return photo


def _excess(value: int) -> int:
    return value % 64 - 32 if value % 2 else NUMBERS[(value >> 1) % len(NUMBERS)]


def _rearranged(parts: list[Part], magic: bytes, damage: Damage) -> list[Part]:
    part, other = damage.part % len(parts), damage.value % len(parts)
    name, content = parts[part]
    again = list(parts)
    match damage.where:
        case "content" | "pixels":
            again[part] = name, _damaged(name, content, damage)
        case "drop":
            del again[part]
        case "double":
            again[part:part] = [parts[part]] * (1 + damage.value % 20)
        case "swap":
            again[part], again[other] = parts[other], parts[part]
        case "rename":
            again[part] = parts[other][0], content
        case "borrow":
            all_parts = [part for data in PHOTOS.values() if data[:1] == magic for part in parts_of(data)]
            again.insert(part, all_parts[damage.value % len(all_parts)])
    return again


def _damaged(name: bytes, content: bytes, damage: Damage) -> bytes:
    if damage.where == "pixels" and name == b"IDAT":
        with suppress(zlib.error):
            return zlib.compress(_hit(zlib.decompress(content), damage))
    return _hit(content, damage)


def _hit(data: bytes, damage: Damage) -> bytes:
    return DAMAGES[damage.how](data, damage.place % len(data), damage.value) if data else data


DAMAGE = st.builds(
    Damage,
    st.sampled_from(WHERE),
    st.sampled_from(sorted(DAMAGES)),
    st.integers(0, 15),
    st.one_of(st.integers(0, 40), st.integers(0, 3_000)),
    st.integers(0, 2**32 - 1),
)


# ---- The tests


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as it:
        yield it


def outcome(isolated: Isolated, photo: bytes) -> str:
    """The photo's format, or why it was refused: by a code of the catalogue, and the child lives on."""
    child = isolated._child
    [found] = isolated.map([photo])
    assert isolated._child is child or child is None
    if not isinstance(found, ImageError):
        return str(found["format"])
    assert found.code in set(CODES) - {"E_TIMEOUT", "E_DECODE_CRASH"}, found
    assert found.detail.startswith(CODES[found.code])
    assert "\n" not in str(found)
    return found.code


@pytest.mark.parametrize("photo", PHOTOS.values(), ids=PHOTOS.keys())
def test_a_photo_taken_apart_and_put_together_is_the_same_and_fine(isolated: Isolated, photo: bytes) -> None:
    assert photo_of(photo, parts_of(photo)) == photo
    assert len(parts_of(photo)) >= 3 or photo[:1] == b"R"
    assert outcome(isolated, photo) in ("JPEG", "PNG", "WEBP")


def test_a_damaged_photo_gives_facts_or_a_catalogued_code(isolated: Isolated) -> None:
    seen = Counter[str]()

    @settings(max_examples=CASES, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink])
    @given(st.sampled_from(NAMES), st.lists(DAMAGE, min_size=1, max_size=3))
    def look(name: str, damages: list[Damage]) -> None:
        seen[outcome(isolated, damaged(PHOTOS[name], damages))] += 1

    look()
    assert seen.total() >= CASES
    common = {outcome for outcome, count in seen.items() if count > CASES / 100}
    assert common >= {"JPEG", "PNG", "WEBP", "E_NOT_IMAGE", "E_TRUNCATED", "E_CORRUPT"}
    assert {"E_TOO_LARGE", "E_TOO_SMALL"} <= set(seen)
