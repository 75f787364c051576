"""Behaviour of facts: numbers that mean what they say, of every kind of photo, and the same each time."""

import hashlib
import io
import struct

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from fruitray.errors import ImageError
from fruitray.facts import look
from fruitray.index import FACTS
from fruitray.synthetic import LABELS, draw
from tests.unit.photos import chunk, png


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, file_format, **({"compress_level": 1} if file_format == "PNG" else {}) | options)
    return sink.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bits_apart(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


SCENE = draw("tomato", 1, (320, 240))


# ---- every kind of photo


@pytest.mark.parametrize(
    ("data", "width", "height", "file_format", "mode"),
    [
        pytest.param(encoded(noise(8, 8)), 8, 8, "PNG", "RGB", id="tiny"),
        pytest.param(encoded(noise(3000, 1000), "JPEG"), 3000, 1000, "JPEG", "RGB", id="large"),
        pytest.param(encoded(Image.new("RGB", (12, 1200), "red")), 12, 1200, "PNG", "RGB", id="narrow"),
        pytest.param(encoded(Image.new("RGB", (11, 1026), "red")), 11, 1026, "PNG", "RGB", id="narrow and reduced"),
        pytest.param(encoded(SCENE.convert("L"), "JPEG"), 320, 240, "JPEG", "L", id="grey"),
        pytest.param(encoded(SCENE.quantize(16)), 320, 240, "PNG", "P", id="palette"),
        pytest.param(encoded(SCENE.convert("RGBA"), "WEBP"), 320, 240, "WEBP", "RGB", id="WebP"),
        pytest.param(encoded(SCENE.convert("CMYK"), "JPEG"), 320, 240, "JPEG", "CMYK", id="CMYK"),
        pytest.param(encoded(SCENE.convert("1")), 320, 240, "PNG", "1", id="one bit"),
    ],
)
def test_every_kind_of_photo_has_every_fact(data: bytes, width: int, height: int, file_format: str, mode: str) -> None:
    facts = look(data)
    assert (facts["width"], facts["height"], facts["format"], facts["mode"]) == (width, height, file_format, mode)
    assert facts.keys() == set(FACTS.names) - {"uri", "label", "status", "error_code", "error", "bytes", "etag"}
    assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    assert len(bytes.fromhex(facts["thumbnail"])) == 6 * 6 * 3
    assert len(facts["phash"]) == 16
    assert 0 <= facts["brightness"] <= 1
    assert facts["sharpness"] >= 0
    assert look(data) == facts


def test_what_is_no_photo_has_no_facts() -> None:
    with pytest.raises(ImageError) as caught:
        look(b"ripe on Monday")
    assert caught.value.code == "E_NOT_IMAGE"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_looked_at_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    facts, stored = look(encoded(SCENE, exif=exif)), look(encoded(SCENE))
    assert facts["orientation"] == orientation
    assert (facts["width"], facts["height"]) == ((240, 320) if orientation >= 5 else (320, 240))
    assert (facts["phash"] == stored["phash"]) == (orientation == 1)
    assert (facts["thumbnail"] == stored["thumbnail"]) == (orientation == 1)
    assert facts["sharpness"] == stored["sharpness"]


def test_a_photo_without_exif_is_upright() -> None:
    assert look(encoded(SCENE))["orientation"] == 1


def test_the_frames_of_an_animation_are_counted_and_the_first_is_looked_at() -> None:
    moving = look(encoded(noise(16, 16, 1), "WEBP", save_all=True, append_images=[noise(16, 16, 2)], lossless=True))
    still = look(encoded(noise(16, 16, 1)))
    assert (moving["frames"], still["frames"]) == (2, 1)
    assert moving["phash"] == still["phash"]


def test_frames_that_a_file_claims_fit_the_index() -> None:
    claims = png((16, 16), 8, 2, bytes(48), chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))
    facts = look(claims)
    facts["thumbnail"] = bytes.fromhex(facts["thumbnail"])
    assert pa.Table.from_pylist([facts], FACTS)["frames"].to_pylist() == [2**31 - 1]


# ---- the perceptual hash


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("size", [(300, 300), (40, 30), (1500, 1100), (1600, 240), (8, 8)])
def test_the_perceptual_hash_is_imagehashs_to_two_bits(label: str, size: tuple[int, int]) -> None:
    image = draw(label, 2).resize(size) if min(size) > 8 else noise(*size, seed=len(label))
    assert bits_apart(look(encoded(image))["phash"], str(imagehash.phash(image))) <= 2


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("seed", range(3))
def test_the_perceptual_hash_survives_encoding_and_resizing(label: str, seed: int) -> None:
    image = draw(label, seed)
    original = look(encoded(image))["phash"]
    changed = [
        *(encoded(image, "JPEG", quality=quality) for quality in (30, 70, 95)),
        encoded(image, "WEBP", quality=50),
        *(encoded(image.resize((side, side)), "JPEG") for side in (150, 210, 600)),
        encoded(image.convert("L")),
    ]
    assert max(bits_apart(original, look(data)["phash"]) for data in changed) <= 6


def test_the_perceptual_hash_tells_photos_apart() -> None:
    hashes = [look(encoded(draw(label, seed)))["phash"] for label in LABELS for seed in range(4)]
    assert min(bits_apart(one, other) for place, one in enumerate(hashes) for other in hashes[:place]) > 9


# ---- sharpness, brightness, colours


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    grey = SCENE.convert("L")
    inner = ndimage.laplace(np.asarray(grey).astype(float))[1:-1, 1:-1]
    assert look(encoded(grey))["sharpness"] == pytest.approx(inner.var(), abs=0.006)


def test_sharpness_falls_with_blur() -> None:
    blurred = [SCENE.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 0.5, 1, 2, 4, 8)]
    values = [look(encoded(image))["sharpness"] for image in blurred]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert look(encoded(Image.new("RGB", (50, 50), "red")))["sharpness"] == 0


@pytest.mark.parametrize("factor", [2, 3])
def test_sharpness_compares_between_cameras(factor: int) -> None:
    large = noise(900, 90).resize((900 * factor, 90 * factor), Image.Resampling.BICUBIC)
    same = look(encoded(large.reduce(factor)))["sharpness"]
    assert look(encoded(large))["sharpness"] == pytest.approx(same, rel=0.02)


@pytest.mark.parametrize(("color", "brightness"), [("black", 0), ("white", 1), ("#808080", 128 / 255), ("red", 0.299)])
def test_brightness_is_mean_luminance(color: str, brightness: float) -> None:
    assert look(encoded(Image.new("RGB", (40, 30), color)))["brightness"] == pytest.approx(brightness, abs=0.003)


def test_brightness_is_of_the_whole_photo() -> None:
    half = Image.new("RGB", (40, 40), "black")
    half.paste("white", (0, 0, 40, 20))
    assert look(encoded(half))["brightness"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("color", ["#000000", "#ffffff", "#c81e28", "#1f2021", "#00ff7f"])
def test_the_dominant_color_of_a_plain_photo_is_its_color(color: str) -> None:
    assert look(encoded(Image.new("RGB", (40, 30), color)))["color"] == color


def test_the_dominant_color_is_that_of_most_pixels_not_the_mean() -> None:
    image = Image.new("RGB", (100, 100), "#c81e28")
    image.paste("#10d010", (0, 0, 100, 40))
    assert look(encoded(image))["color"] == "#c81e28"


def test_the_thumbnail_is_the_photo_row_by_row() -> None:
    colors = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colors.repeat(20, axis=0).repeat(30, axis=1))
    assert look(encoded(image))["thumbnail"] == colors.tobytes().hex()
