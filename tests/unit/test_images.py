"""Behaviour of decoding: what a photo becomes, and which code each unusable file gets (design: bad-input.md)."""

import io
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fruitray.errors import (
    AccessDeniedError,
    ArchivedError,
    ChangedError,
    CredentialsError,
    EndpointError,
    FruitrayError,
    ImageError,
    NotFoundError,
    StorageError,
    TryAgainError,
)
from fruitray.images import CODES, MAX_AHEAD, MAX_BYTES, decode, fetch, list_images
from fruitray.preprocess import Preprocessing
from fruitray.storage import Entry, LocalStorage, Storage
from tests.unit.photos import (
    CODED,
    GRADIENT,
    HEIGHT,
    JPEG,
    METADATA_BOMBS,
    PHOTO,
    PNG,
    SCANS,
    WEBP,
    WHOLE,
    WIDTH,
    chunk,
    chunks,
    encoded,
    exif_entries,
    jpeg_with,
    png,
)


def code_of(data: bytes) -> str:
    """The error code of `data`, which must be in the catalogue, and the same where less than all is enough; `loaded` if
    it is a photo."""
    code = _code_of(data)
    assert _code_of(data, enough=4) == code
    return code


def _code_of(data: bytes, enough: int = 0) -> str:
    try:
        photo = decode(data, enough)
    except ImageError as error:
        refusal = error
    else:
        assert enough or photo.pixels.shape == (3, photo.height, photo.width)
        assert photo.pixels.dtype == np.uint8
        return "loaded"
    assert refusal.code in CODES
    assert refusal.detail.startswith(CODES[refusal.code])
    assert "\n" not in str(refusal)
    return refusal.code


def nearly(found: np.ndarray, wanted: np.ndarray, tolerance: int = 0) -> bool:
    return found.shape == wanted.shape and bool(np.all(np.abs(found.astype(int) - wanted) <= tolerance))


def hwc(data: bytes) -> np.ndarray:
    return decode(data).pixels.transpose(1, 2, 0)


every_format = pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())


# ---- What a photo becomes


@pytest.mark.parametrize(("data", "name", "tolerance"), [(JPEG, "JPEG", 6), (PNG, "PNG", 0), (WEBP, "WEBP", 0)])
def test_a_photo_becomes_its_rgb_pixels(data: bytes, name: str, tolerance: int) -> None:
    photo = decode(data)
    assert (photo.format, photo.mode, photo.width, photo.height, photo.frames) == (name, "RGB", WIDTH, HEIGHT, 1)
    assert nearly(photo.pixels.transpose(1, 2, 0), GRADIENT, tolerance)


@pytest.mark.parametrize("size", [(1600, 1200), (1200, 1600), (1601, 1203), (9600, 1200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_of_a_large_jpeg_no_more_is_decoded_than_is_enough(size: tuple[int, int], mode: str, orientation: int) -> None:
    image = PHOTO.resize(size, Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(image, "JPEG", quality=95, exif=exif)
    whole, some = decode(data), decode(data, 250)
    assert (some.width, some.height) == (whole.width, whole.height) == (size if orientation == 1 else size[::-1])
    assert 250 <= min(some.image.size) < 500
    square = Preprocessing(size=125)
    assert square.enough == 250
    assert nearly(square.resize(some.pixels).numpy(), square.resize(whole.pixels).numpy(), 3)


@pytest.mark.parametrize("enough", [0, 150, 200, 5000])
@every_format
def test_a_photo_that_is_none_too_large_is_decoded_as_it_is(data: bytes, enough: int) -> None:
    assert nearly(decode(data, enough).pixels, decode(data).pixels)


@pytest.mark.parametrize(
    ("file_format", "mode", "tolerance"),
    [("PNG", "1", 0), ("PNG", "L", 0), ("PNG", "P", 0), ("JPEG", "L", 6), ("JPEG", "CMYK", 6)],
)
def test_other_colour_modes_are_converted_to_rgb(file_format: str, mode: str, tolerance: int) -> None:
    image = PHOTO.convert(mode)
    photo = decode(encoded(image, file_format, quality=95, subsampling=0))
    assert photo.mode == mode
    assert nearly(photo.pixels.transpose(1, 2, 0), np.asarray(image.convert("RGB")), tolerance)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparency_is_laid_onto_white(file_format: str) -> None:
    layer = PHOTO.convert("RGBA")
    layer.putalpha(Image.fromarray(np.repeat([[0] * 16 + [255] * 16], HEIGHT, axis=0).astype(np.uint8)))
    pixels = hwc(encoded(layer, file_format, **({"lossless": True} if file_format == "WEBP" else {})))
    assert (pixels[:, :16] == 255).all()
    assert nearly(pixels[:, 16:], GRADIENT[:, 16:])


def test_half_transparent_grey_becomes_half_as_dark() -> None:
    assert nearly(hwc(encoded(Image.new("LA", (16, 16), (0, 128)), "PNG")), np.full((16, 16, 3), 127), 1)


def test_a_palette_with_a_transparent_colour_is_laid_onto_white() -> None:
    colours = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60])), chunk(b"tRNS", b"\0\xff")
    pixels = hwc(png((16, 16), 8, 3, bytes([0] * 8 + [1] * 8), *colours))
    assert (pixels[:, :8] == 255).all()
    assert (pixels[:, 8:] == [40, 50, 60]).all()


def test_a_transparent_shade_of_16_bits_is_laid_onto_white() -> None:
    row = struct.pack(">8H", *[0] * 4, *[0x8000] * 4)
    pixels = hwc(png((8, 8), 16, 0, row, chunk(b"tRNS", struct.pack(">H", 0))))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 128).all()


@pytest.mark.parametrize("value", [0, 1, 255, 256, 257, 0x7FFF, 0x8000, 0xFEFF, 0xFFFF])
def test_16_bits_are_scaled_not_clipped(value: int) -> None:
    wanted = value / 257  # 65,535 / 255
    for colour, channels in [(0, 1), (2, 3)]:
        pixels = hwc(png((8, 8), 16, colour, struct.pack(">H", value) * 8 * channels))
        assert np.abs(pixels - wanted).max() <= 1
    assert np.abs(hwc(png((8, 8), 16, 4, struct.pack(">HH", value, 0xFFFF) * 8)) - wanted).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(file_format: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (0, 0, shade)) for shade in (90, 180)]
    photo = decode(encoded(PHOTO, file_format, save_all=True, append_images=frames, lossless=True))
    assert photo.frames == 3
    assert nearly(photo.pixels.transpose(1, 2, 0), GRADIENT)


def test_of_a_phones_several_pictures_the_first_counts() -> None:
    data = encoded(PHOTO, "MPO", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))], quality=95)
    assert data.count(b"\xff\xd8\xff") > 1
    assert nearly(hwc(data), GRADIENT, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO, file_format, exif=exif, quality=95, lossless=True)
    photo = decode(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert nearly(photo.pixels.transpose(1, 2, 0), np.asarray(upright.convert("RGB")))
    assert (photo.width, photo.height) == ((HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT))


@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(exif_entries((0x0112, 3, 1, b"\0\x63\0\0")), id="orientation 99"),
        pytest.param(exif_entries((0x0112, 2, 4, b"up?\0")), id="orientation in words"),
        pytest.param(exif_entries((0x0112, 5, 1, b"\xff\xff\xff\xff")), id="orientation at no place"),
        pytest.param(exif_entries((0x8769, 4, 1, b"\0\0\0\x08")), id="a loop"),
        pytest.param(b"Exif\0\0" + bytes(range(256)) * 4, id="noise"),
        pytest.param(b"Exif\0\0", id="nothing"),
    ],
)
def test_nonsense_exif_is_ignored(exif: bytes) -> None:
    assert nearly(hwc(jpeg_with(exif, JPEG)), hwc(JPEG))


def test_nonsense_beside_the_rotation_does_not_hinder_it() -> None:
    exif = exif_entries((0x0110, 3, 1, b"\0\x07\0\0"), (0x0112, 3, 1, b"\0\x06\0\0"))  # a number for a camera's name
    assert nearly(hwc(jpeg_with(exif, JPEG)), np.rot90(hwc(JPEG), -1))


def test_the_name_a_file_has_does_not_matter_to_its_format(tmp_path: Path) -> None:
    (tmp_path / "really.png").write_bytes(JPEG)
    storage = LocalStorage(str(tmp_path))
    [data] = fetch(storage, list(storage.list()))
    assert isinstance(data, bytes)
    assert decode(data).format == "JPEG"


# ---- Files that are no usable photo


@pytest.mark.parametrize(("data", "code"), CODED.values(), ids=CODED.keys())
def test_a_file_that_is_no_usable_photo_gets_its_code(data: bytes, code: str) -> None:
    assert code_of(data) == code


def test_a_huge_header_is_refused_whatever_follows() -> None:
    assert code_of(png((30_000, 30_000), 8, 2, b"abc")[:60]) == "E_TOO_LARGE"


def test_a_bomb_of_scans_is_refused_before_it_is_decoded() -> None:
    jpeg = encoded(Image.new("RGB", (2_000, 2_000), "red"), "JPEG", progressive=True, quality=30)
    assert len(SCANS) < 100_000
    assert code_of(jpeg) == "loaded"
    assert code_of(SCANS) == "E_TOO_COMPLEX"
    assert code_of(jpeg_with(b"\xff\xda" * 300, jpeg, marker=b"\xff\xfe")) == "loaded"  # a comment is no scan


def test_a_bomb_of_scans_hides_in_no_phones_file() -> None:
    several = encoded(Image.new("RGB", (2_000, 2_000)), "MPO", save_all=True, append_images=[PHOTO], progressive=True)
    end = several.index(b"\xff\xd9")
    last_scan = several[several.rindex(b"\xff\xda", 0, end) : end]
    assert code_of(several[:end] + last_scan * 300 + several[end:]) == "E_TOO_COMPLEX"


@pytest.mark.parametrize("data", METADATA_BOMBS.values(), ids=METADATA_BOMBS.keys())
def test_metadata_that_unpacks_to_megabytes_is_refused(data: bytes) -> None:
    assert code_of(data) == "E_METADATA"


def test_metadata_of_many_long_texts_is_refused() -> None:
    texts = PngInfo()
    for number in range(70):
        texts.add_text(f"k{number}", " " * 1_000_000, zip=True)
    assert code_of(encoded(PHOTO, "PNG", pnginfo=texts)) == "E_METADATA"


@pytest.mark.parametrize("name", ["png", "png with text behind", "png animated"])
def test_a_png_with_any_wrong_checksum_is_damaged(name: str) -> None:
    data = WHOLE[name]
    for start, end in chunks(data):
        for position in (start + 4, end - 1):  # the chunk's name, the checksum itself
            flipped = bytearray(data)
            flipped[position] ^= 1
            assert code_of(bytes(flipped)) == "E_CORRUPT", (start, position)


# ---- Cut files


def cuts(data: bytes, count: int) -> list[int]:
    """Where to cut: the first and last 30 bytes, and at random between."""
    middle = random.Random(len(data)).sample(range(30, len(data) - 30), count - 60)
    return [*range(30), *middle, *range(len(data) - 30, len(data))]


@every_format
def test_a_whole_file_loads(data: bytes) -> None:
    assert code_of(data) == "loaded"


@every_format
def test_a_cut_file_never_loads(data: bytes) -> None:
    loaded = [cut for cut in cuts(data, 160) if code_of(data[:cut]) == "loaded"]
    assert loaded == []


@every_format
def test_a_cut_file_is_called_truncated(data: bytes) -> None:
    magic = 12  # bytes; before that, nothing says what it was to be
    assert {code_of(data[:cut]) for cut in cuts(data, 160) if cut >= magic} == {"E_TRUNCATED"}


@every_format
def test_bytes_after_the_end_do_no_harm(data: bytes) -> None:
    for trailer in (b"\0", b"\xff\xda video \xff\xd9", b"\xff\xda", bytes(3_000)):
        assert nearly(hwc(data + trailer), hwc(data))


# ---- Any bytes at all


def mutated(data: bytes, choice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(choice.choice([1, 1, 2, 8, 50])):
        changed[choice.randrange(len(changed))] = choice.randrange(256)
    return bytes(changed)


@every_format
def test_random_changes_give_only_catalogued_codes(data: bytes) -> None:
    choice = random.Random(1)
    codes = {code_of(mutated(data, choice)) for _ in range(250)}
    assert len(codes) > 1  # a loaded photo, or a code, which `code_of` has looked up


@pytest.mark.parametrize("name", ["png", "png animated", "png with text behind"])
def test_random_changes_under_right_checksums_give_only_catalogued_codes(name: str) -> None:
    choice = random.Random(2)
    parts = [
        (WHOLE[name][start + 4 : start + 8], WHOLE[name][start + 8 : end - 4]) for start, end in chunks(WHOLE[name])
    ]
    codes = set()
    for _ in range(250):
        victim = choice.randrange(len(parts) - 1)
        again = [
            chunk(kind, mutated(content, choice) if number == victim and content else content)
            for number, (kind, content) in enumerate(parts)
        ]
        codes.add(code_of(PNG[:8] + b"".join(again)))
    assert "E_CORRUPT" in codes


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff", JPEG[:200], PNG[:8], PNG[:33], b"RIFF\x20\0\0\0WEBP", WEBP[:40]]),
    st.binary(max_size=300),
)
def test_no_bytes_raise_anything_else(head: bytes, tail: bytes) -> None:
    code_of(head + tail)


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits that hold are Linux's")
def test_a_photo_that_memory_does_not_hold_gets_a_code_of_its_own() -> None:
    data = encoded(Image.new("L", (7_000, 7_000)), "PNG")
    script = (
        "import resource, sys\n"
        "from fruitray.images import decode\n"
        "data = sys.stdin.buffer.read()\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 100 * 2**20,) * 2)\n"
        "try:\n    decode(data)\nexcept Exception as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert found.stdout.startswith(b"E_DECODE_CRASH"), found


# ---- Listing and fetching


def files(root: Path, *keys: str) -> Storage:
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(key.encode())
    return LocalStorage(str(root))


class Keys(Storage):
    """A store that lists `keys`, as an object store might, and answers reads with `error` or the key itself."""

    def __init__(self, *keys: str, error: FruitrayError | None = None) -> None:
        super().__init__("s3://fruit")
        self.keys, self.error, self.reads = keys, error, list[str]()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return (Entry(key, 1, "v1") for key in self.keys if key.startswith(prefix))

    def read(self, key: str, etag: str = "") -> bytes:
        self.reads.append(key)
        if self.error:
            raise self.error
        return key.encode()

    def check(self) -> None: ...

    def write(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        raise NotImplementedError

    def create(self, key: str, data: bytes) -> bool:
        raise NotImplementedError

    def folders(self) -> Iterator[str]:
        raise NotImplementedError

    def stat(self, key: str) -> Entry:
        raise NotImplementedError

    def exists(self, key: str) -> bool:
        return key in self.keys


def test_inputs_are_listed_by_key_and_hidden_files_counted(tmp_path: Path) -> None:
    storage = files(tmp_path, "b/2.jpg", "b/10.jpg", "a/1.jpg", "a/.DS_Store", ".cache/x.jpg", "ab.jpg", "B/1.jpg")
    entries, skipped = list_images(storage)
    assert [entry.key for entry in entries] == ["B/1.jpg", "a/1.jpg", "ab.jpg", "b/10.jpg", "b/2.jpg"]
    assert skipped == 2


def test_what_systems_leave_is_no_input(tmp_path: Path) -> None:
    left = ["$Recycle.Bin/S-1/$R1.jpg", "System Volume Information/x", "lost+found/#1", "a/@eaDir/1.jpg/SM.jpg"]
    left += ["a/Thumbs.db", "a/desktop.ini"]
    alike = ["lost+found apples/1.jpg", "a/Thumbs.db.jpg", "my@eaDir/1.jpg"]
    entries, skipped = list_images(files(tmp_path, *left, *alike))
    assert [entry.key for entry in entries] == sorted(alike)
    assert skipped == len(left)


def test_folder_markers_are_skipped_and_odd_keys_are_not() -> None:
    odd = ["a b.jpg", "ä/ü 果.jpg", "tab\t.jpg", "quote'\".jpg", "a//b.jpg", "../up.jpg", "a/../b.jpg", "line\nfeed"]
    entries, skipped = list_images(Keys(*odd, "a/", "a//", "dir/.hidden"))
    assert [entry.key for entry in entries] == sorted(odd)
    assert skipped == 3


@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_what_is_fetched_comes_in_order(tmp_path: Path, count: int) -> None:
    storage = files(tmp_path, *(f"{number:03d}.jpg" for number in range(count)))
    entries, _ = list_images(storage)
    assert list(fetch(storage, entries, threads=3)) == [entry.key.encode() for entry in entries]


def test_no_more_is_fetched_ahead_than_memory_has_room_for() -> None:
    storage = Keys()
    found = fetch(storage, [Entry(f"{number}.jpg", MAX_AHEAD // 4, "v1") for number in range(20)])
    for taken in range(1, 10):
        next(found)
        assert len(storage.reads) <= taken + 4
    assert len(list(found)) == 11


def test_what_is_too_big_or_no_file_is_never_fetched() -> None:
    storage = Keys()
    entries = [
        Entry("big.jpg", MAX_BYTES + 1, "v1"),
        Entry("link.jpg", 1, "v1", "symlink"),
        Entry("fifo.jpg", 1, "v1", "special"),
        Entry("ok.jpg", MAX_BYTES, "v1"),
    ]
    fetched = list(fetch(storage, entries))
    codes = [item.code if isinstance(item, ImageError) else "fetched" for item in fetched]
    assert codes == ["E_FILE_TOO_BIG", "E_SYMLINK", "E_NOT_REGULAR", "fetched"]
    assert storage.reads == ["ok.jpg"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("u", "gone"), "E_SRC_GONE"),
        (ChangedError("u", "another version"), "E_SRC_CHANGED"),
        (ArchivedError("u", "in an archive"), "E_SRC_ARCHIVED"),
        (AccessDeniedError("u", "access denied"), "E_SRC_DENIED"),
        (StorageError("u", "the store answers Teapot"), "E_SRC_DENIED"),
    ],
)
def test_what_is_wrong_with_one_object_becomes_its_error(error: FruitrayError, code: str) -> None:
    [found] = fetch(Keys(error=error), [Entry("a.jpg", 1, "v1")])
    assert isinstance(found, ImageError)
    assert found.code == code
    assert found.detail.startswith(CODES[code])


@pytest.mark.parametrize(
    "error", [TryAgainError("u", "down"), CredentialsError("u", "expired"), EndpointError("u", "-")]
)
def test_what_is_wrong_with_the_whole_store_becomes_nobodys_row(error: FruitrayError) -> None:
    entries = [Entry(f"{number}.jpg", 1, "v1") for number in range(50)]
    with pytest.raises(type(error)):
        list(fetch(Keys(error=error), entries))


def test_a_file_replaced_or_deleted_after_the_listing_is_told_apart(tmp_path: Path) -> None:
    storage = files(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    entries, _ = list_images(storage)
    (tmp_path / "b.jpg").write_bytes(b"replaced")
    (tmp_path / "c.jpg").unlink()
    (tmp_path / "d.jpg").unlink()
    (tmp_path / "d.jpg").mkdir()
    codes = [item.code if isinstance(item, ImageError) else "fetched" for item in fetch(storage, entries)]
    assert codes == ["fetched", "E_SRC_CHANGED", "E_SRC_GONE", "E_SRC_GONE"]


def test_symlinks_and_fifos_become_errors_and_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (tmp_path / "photos" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    storage = LocalStorage(str(tmp_path / "photos"))
    entries, _ = list_images(storage)
    found = dict(zip([entry.key for entry in entries], fetch(storage, entries), strict=True))
    codes = {key: item.code for key, item in found.items() if isinstance(item, ImageError)}
    assert codes == {"out.jpg": "E_SYMLINK", "loop": "E_SYMLINK", "pipe.jpg": "E_NOT_REGULAR"}
