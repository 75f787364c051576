"""Photos of the run, small enough to stand within the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress

from PIL import Image

from fruitray.errors import FruitrayError, ImageError
from fruitray.images import fetch
from fruitray.isolate import RGB, Isolated
from fruitray.report.blocks import Picture
from fruitray.storage import Entry, open_storage

SIDE = 104
"""Pixels of the longer side."""
QUALITY = 72
"""Of the JPEG."""


def thumbnails(root: str, uris: Sequence[str]) -> dict[str, str]:
    """A data URI of each photo of `uris`, all below `root`, that can be had; decoded in a process of their own."""
    found: dict[str, str] = {}
    wanted = [uri for uri in dict.fromkeys(uris) if uri.startswith(f"{root}/")]
    decoder = Isolated(f"{RGB}:{2 * SIDE}")
    with suppress(FruitrayError), decoder as isolated:  # a page does without photos where there are none
        storage = open_storage(root)
        entries = [Entry(uri[len(root) + 1 :], 0, "") for uri in wanted]
        for uri, decoded in zip(wanted, isolated.map(fetch(storage, entries)), strict=True):
            if not isinstance(decoded, ImageError):
                photo = Image.fromarray(decoded["pixels"])
                photo.thumbnail((SIDE, SIDE))
                found[uri] = data_uri(photo)
    return found


def captioned(uri: str, small: Mapping[str, str], lines: Sequence[str]) -> Picture:
    """The photo at `uri`, as `thumbnails` has it, above those `lines` that say something, and its name."""
    folder_and_name = "/".join(uri.split("/")[-2:])
    return Picture(small.get(uri), folder_and_name, [*filter(None, lines), uri.rpartition("/")[2]])


def data_uri(picture: Image.Image) -> str:
    """`picture` as a JPEG that a page can hold."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
