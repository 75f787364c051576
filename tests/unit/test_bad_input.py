"""One folder with an example of everything that may lie among photos: each gets its row, its code, and no other's.

The numbers are the rows of the design's table of bad input. What decoding makes of single files is `test_images.py`'s,
a decoder that hangs or dies (10) `test_isolate.py`'s, and what only an object store can do `test_storage.py`'s.
"""

import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fruitray.audit import audit
from fruitray.images import MAX_BYTES, list_images
from fruitray.isolate import Isolated
from fruitray.storage import LocalStorage
from tests.unit.photos import (
    CODED,
    JPEG,
    METADATA_BOMBS,
    PNG,
    SCANS,
    WEBP,
    WHOLE,
    encoded,
    exif_entries,
    jpeg_with,
    png,
)

Facts = dict[str, Any]
SIZE = {"width": 32, "height": 24, "frames": 1, "orientation": 1}
RED = Image.new("RGB", (32, 24), (255, 0, 0))
CLEAR = Image.new("RGBA", (32, 24), (0, 0, 0, 0))
WHITE, GREY = {"brightness": 1.0}, {"brightness": 0.5}
SIDEWAYS = exif_entries((0x0112, 3, 1, b"\0\x06\0\0"))
BAD_CHECKSUM = PNG[:-1] + bytes([PNG[-1] ^ 1])
SIXTEEN = png((32, 24), 16, 0, struct.pack(">H", 0x8000) * 32)
FRAMES = {
    "save_all": True,
    "append_images": [Image.new("RGB", (32, 24), shade) for shade in ("green", "blue")],
    "lossless": True,
}

FILES: dict[str, tuple[bytes, str | Facts]] = {
    "1/empty.jpg": CODED["zero bytes"],
    **{f"2/{name}.jpg": CODED[name] for name in ("text", "an error page", "PDF before a JPEG")},
    **{f"3/{name}.jpg": CODED[name] for name in ("GIF", "TIFF", "BMP", "EPS", "ICO", "ZIP", "HEIC")},
    "4/a jpeg.png": (JPEG, {"format": "JPEG", **SIZE}),
    "4/no ending": (WEBP, {"format": "WEBP", **SIZE}),
    **{f"5/{name}, cut": (data[: 2 * len(data) // 3], "E_TRUNCATED") for name, data in WHOLE.items()},
    "6/checksum.png": (BAD_CHECKSUM, "E_CORRUPT"),
    **{f"7/{name}": CODED[name] for name in ("30,000x30,000", "50.4 megapixels", "50.4 megapixels of WebP")},
    "8/scans.jpg": (SCANS, "E_TOO_COMPLEX"),
    **{f"9/{name}.png": (data, "E_METADATA") for name, data in METADATA_BOMBS.items()},
    "11/just.jpg": (b"", "E_NOT_IMAGE"),  # these two are made longer below
    "11/over.jpg": (b"", "E_FILE_TOO_BIG"),
    **{f"12/{name}": CODED[name] for name in ("0x0", "1x1", "7x30")},
    **{f"13/{name}": CODED[name] for name in ("65,500x1", "809x8", "8x801")},
    "14/cmyk.jpg": (encoded(Image.new("CMYK", (32, 24)), "JPEG"), {"mode": "CMYK", **SIZE, **WHITE}),
    "14/grey.jpg": (encoded(Image.new("L", (32, 24), 255), "JPEG"), {"mode": "L", **SIZE, **WHITE}),
    "14/1 bit.png": (encoded(Image.new("1", (32, 24), 1), "PNG"), {"mode": "1", **SIZE, **WHITE}),
    "14/palette.png": (encoded(RED.convert("P"), "PNG"), {"mode": "P", "color": "#ff0000", **SIZE}),
    "14/rgba.png": (encoded(CLEAR, "PNG"), {"mode": "RGBA", **SIZE, **WHITE}),
    "14/la.png": (encoded(CLEAR.convert("LA"), "PNG"), {"mode": "LA", **SIZE, **WHITE}),
    "14/rgba.webp": (encoded(CLEAR, "WEBP", lossless=True), {"mode": "RGBA", **SIZE, **WHITE}),
    "14/16 bits.png": (SIXTEEN, {"mode": "I;16", **SIZE, **GREY}),
    "15/animated.png": (encoded(RED, "PNG", **FRAMES), {**SIZE, "frames": 3, "color": "#ff0000"}),
    "15/animated.webp": (encoded(RED, "WEBP", **FRAMES), {**SIZE, "frames": 3, "color": "#ff0000"}),
    "16/sideways.jpg": (jpeg_with(SIDEWAYS, JPEG), {"width": 24, "height": 32, "orientation": 6}),
    "16/nonsense.jpg": (jpeg_with(b"Exif\0\0" + bytes(range(256)), JPEG), SIZE),
    "17/deleted.jpg": (JPEG, "E_SRC_GONE"),
    "17/replaced.jpg": (JPEG, "E_SRC_CHANGED"),
    **{
        f"19/{name}": (JPEG, SIZE)
        for name in ("a b.jpg", "ä 桃🍎.jpg", "tab\t.jpg", "'quoted\".jpg", "line\nfeed", "a%20b.jpg")
    },
    "21/secret.jpg": (JPEG, "E_SRC_DENIED"),
}
NEVER_OPENED = {
    "21/out.jpg": "E_SYMLINK",
    "21/loop": "E_SYMLINK",
    "21/nowhere.jpg": "E_SYMLINK",
    "21/pipe.jpg": "E_NOT_REGULAR",
    "21/socket.jpg": "E_NOT_REGULAR",
}
HIDDEN = ["20/.DS_Store", "20/.hidden.jpg", "20/.cache/photo.jpg"]


@pytest.fixture(scope="module")
def audited(isolated: Isolated) -> tuple[dict[str, Facts], int]:
    """The row of each key below the folder, and how many files were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "photos")
        fill(root)
        storage = LocalStorage(str(root))
        entries, skipped = list_images(storage)
        (root / "17/deleted.jpg").unlink()
        (root / "17/replaced.jpg").write_bytes(PNG)
        with unprivileged():
            rows = list(audit(storage, entries, isolated))
        return dict(zip([entry.key for entry in entries], rows, strict=True)), skipped


def fill(root: Path) -> None:
    for key in (*FILES, *HIDDEN):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(FILES[key][0] if key in FILES else JPEG)
    os.truncate(root / "11/just.jpg", MAX_BYTES)
    os.truncate(root / "11/over.jpg", MAX_BYTES + 1)
    (root.parent / "outside.jpg").write_bytes(JPEG)
    (root / "21/out.jpg").symlink_to(root.parent / "outside.jpg")
    (root / "21/loop").symlink_to(root)
    (root / "21/nowhere.jpg").symlink_to("nothing")
    os.mkfifo(root / "21/pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "21/socket.jpg"))
    (root / "21/secret.jpg").chmod(0o000)
    root.parent.chmod(0o755)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind, which root is not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_every_file_has_its_row_and_hidden_ones_are_counted(audited: tuple[dict[str, Facts], int]) -> None:
    rows, skipped = audited
    assert sorted(rows) == sorted([*FILES, *NEVER_OPENED])
    assert skipped == len(HIDDEN)


@pytest.mark.parametrize("key", [*FILES, *NEVER_OPENED])
def test_a_file_gets_the_code_or_the_facts_of_its_case(audited: tuple[dict[str, Facts], int], key: str) -> None:
    row, wanted = audited[0][key], (FILES[key][1] if key in FILES else NEVER_OPENED[key])
    if isinstance(wanted, str):
        assert (row["status"], row.get("error_code")) == ("error", wanted)
    else:
        assert {name: row.get(name) for name in ("status", *wanted)} == pytest.approx(
            {"status": "ok", **wanted}, abs=0.01
        )
