"""Behaviour of the search for duplicates: it finds the copies people make of a photo, and pairs no two photos."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from fruitray import duplicates
from fruitray.duplicates import MAX_BITS, Duplicates, find_duplicates
from fruitray.facts import look
from fruitray.synthetic import LABELS, draw
from tests.tables import Row, components, duplicate_pairs, facts, photo

# ---- photos


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "quality 30": lambda image: jpeg(image, 30),
    "quality 70": lambda image: jpeg(image, 70),
    "half the size": lambda image: jpeg(image.resize((image.width // 2, image.height // 2))),
    "twice the size": lambda image: jpeg(image.resize((image.width * 2, image.height * 2))),
    "grey": lambda image: jpeg(image.convert("L")),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
    "turned by a degree": lambda image: jpeg(image.rotate(1, Image.Resampling.BILINEAR)),
}
"""What makes a near duplicate of a photo."""


def looked_at(*files: bytes) -> pa.Table:
    rows = [look(data) for data in files]
    return facts({**row, "thumbnail": bytes.fromhex(row["thumbnail"])} for row in rows)


def pairs_of(found: Duplicates) -> list[list[int]]:
    return [pair for block in found.near() for pair in block.tolist()]


def pairs(found: Duplicates) -> set[tuple[int, int]]:
    """The near duplicates as positions, where no file is there twice."""
    place = {content: position for position, content in enumerate(found.content.tolist())}
    assert len(place) == len(found.content)
    return {(min(place[a], place[b]), max(place[a], place[b])) for a, b in pairs_of(found)}


def missed_and_wrong(images: list[Image.Image]) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """Of each image's changed copies those that are not paired with it; and the pairs of different images."""
    files = [jpeg(image, 95) for image in images]
    files += [change(image) for image in images for change in CHANGES.values()]
    found = pairs(find_duplicates(looked_at(*files), bits=8))
    copies = [(of, name) for of in range(len(images)) for name in CHANGES]
    missed = [copy for place, copy in enumerate(copies, len(images)) if (copy[0], place) not in found]
    owner = [*range(len(images)), *(of for of, _ in copies)]
    return missed, [pair for pair in found if owner[pair[0]] != owner[pair[1]]]


def test_every_changed_copy_of_a_drawn_photo_is_found_and_no_other_photo() -> None:
    assert missed_and_wrong([draw(label, seed, (200, 200)) for label in LABELS for seed in range(6)]) == ([], [])


def test_every_changed_copy_of_a_real_photo_is_found_and_no_other_photo(shared_data: Path) -> None:
    files = sorted((shared_data / "vuw-fruit").glob("*/*.jpg"))[::150]
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    assert len(images) >= 30
    assert missed_and_wrong(images) == ([], [])


def shape(kind: str, color: str, ground: str = "white", box: tuple[int, ...] = (50, 40, 150, 160)) -> bytes:
    image = Image.new("RGB", (200, 200), ground)
    getattr(ImageDraw.Draw(image), kind)(box, fill=color)
    return jpeg(image)


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([jpeg(Image.new("RGB", (60, 60), color)) for color in COLORS], id=f"plain {name}")
        for name, COLORS in {
            "colors": ("red", "green", "blue", "yellow", "white", "black", "gray"),
            "shades": ("#c81e28", "#c82028", "#c8222a"),
        }.items()
    ]
    + [
        pytest.param([shape("ellipse", color) for color in ("red", "green", "blue", "yellow", "purple")], id="circles"),
        pytest.param(
            [shape("ellipse", color, box=(75, 75, 125, 125)) for color in ("red", "green", "blue")], id="small"
        ),
        pytest.param(
            [shape("ellipse", color, box=(85, 85, 115, 115)) for color in ("red", "green", "blue")], id="tiny"
        ),
        pytest.param([shape("ellipse", "white", color) for color in ("red", "green", "blue")], id="grounds"),
        pytest.param([shape("rectangle", color, "black") for color in ("red", "lime", "blue")], id="on black"),
    ],
)
def test_colors_tell_photos_of_one_shape_apart(files: list[bytes]) -> None:
    assert pairs(find_duplicates(looked_at(*files), bits=MAX_BITS)) == set()


def test_light_and_dark_tell_photos_of_one_color_apart() -> None:
    scene = draw("tomato", 1).convert("L")
    upside_down = scene.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert pairs(find_duplicates(looked_at(jpeg(scene), jpeg(upside_down)), bits=MAX_BITS)) == set()


def test_photos_of_one_hash_are_different_where_their_thumbnails_are() -> None:
    one, other, third = photo("apple", 1), photo("apple", 2), photo("apple", 1, 1)
    rows = [one, other | {"phash": one["phash"]}, third]
    assert pairs(find_duplicates(facts(rows), bits=8)) == {(0, 2)}


def test_photos_of_one_hash_and_no_color_are_told_apart_by_light() -> None:
    lights = [np.random.default_rng(seed).integers(0, 256, 36, dtype=np.uint8).repeat(3).tobytes() for seed in (0, 1)]
    one, other, copy = photo("apple", 1), photo("apple", 1, 1), photo("apple", 1, 2)
    rows = [one | {"thumbnail": lights[0]}, other | {"thumbnail": lights[1]}, copy | {"thumbnail": lights[0]}]
    assert pairs(find_duplicates(facts(rows), bits=8)) == {(0, 2)}


def test_what_is_all_but_plain_has_no_near_duplicates() -> None:
    noise = np.random.default_rng(0).integers(0, 2, 36).repeat(3)
    for level, wanted in ((1, set()), (20, {(0, 1)})):
        thumbnail = (200 + level * noise).astype(np.uint8).tobytes()
        rows = [photo("apple", 1, change) | {"thumbnail": thumbnail} for change in (0, 1)]
        assert pairs(find_duplicates(facts(rows), bits=8)) == wanted


# ---- exact copies


@pytest.mark.parametrize("bits", [-1, 0, 8])
def test_byte_identical_files_are_one_content(bits: int) -> None:
    rows = [photo("a", 1), photo("a", 2), photo("b", 1), photo("a", 3), photo("a", 1)]
    found = find_duplicates(facts(rows), bits)
    content = found.content.tolist()
    assert content[0] == content[2] == content[4]
    assert len(set(content)) == 3
    assert not pairs_of(found)


def test_no_photos_have_no_duplicates() -> None:
    found = find_duplicates(facts([]), bits=8)
    assert (len(found.content), pairs_of(found)) == (0, [])
    assert found.groups(np.zeros(0, dtype=bool)).tolist() == []
    assert found.conflicts(np.zeros(0, dtype=np.int64)).tolist() == []


# ---- the search among hashes

BASES = [photo("a", look)["phash"] for look in range(4)]


@st.composite
def hashes(draw_: st.DrawFn) -> list[int]:
    """Different hashes, near one another around a few that are not."""
    flips = st.tuples(st.sampled_from(BASES), st.frozensets(st.integers(0, 63), max_size=9))
    made = {int(base, 16) ^ sum(1 << bit for bit in bits) for base, bits in draw_(st.lists(flips, max_size=40))}
    return draw_(st.permutations(sorted(made)))


def alike(numbers: list[int]) -> list[Row]:
    """Photos of one thumbnail with these hashes."""
    return [photo("a", 1, change) | {"phash": f"{number:016x}"} for change, number in enumerate(numbers)]


@settings(deadline=None, max_examples=100)
@given(hashes(), st.integers(-1, MAX_BITS), st.sampled_from([3, 50, 2_000_000]), st.sampled_from([0, 3, 4096]))
def test_the_search_finds_the_pairs_that_comparing_all_finds(
    numbers: list[int], bits: int, at_a_time: int, large: int
) -> None:
    rows = alike(numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "CANDIDATES", at_a_time)
        patch.setattr(duplicates, "LARGE", large)
        found = find_duplicates(facts(rows), bits)
    assert pairs(found) == set(duplicate_pairs(rows, bits))
    assert len(pairs_of(found)) == len(pairs(found))


@pytest.mark.parametrize("bits", range(MAX_BITS + 1))
def test_the_search_finds_every_neighbour_at_the_largest_distance(bits: int) -> None:
    random = np.random.default_rng(bits)
    numbers = [int(number) for number in random.integers(0, 2**64, 1500, dtype=np.uint64)]
    flips = [sum(1 << int(bit) for bit in random.choice(64, bits, replace=False)) for _ in numbers]
    further = [flip | 1 << next(bit for bit in range(64) if not flip >> bit & 1) for flip in flips]
    for changes, wanted in ((flips, {(place, place + 1500) for place in range(1500)}), (further, set())):
        others = [number ^ change for number, change in zip(numbers, changes, strict=True)]
        assert pairs(find_duplicates(facts(alike([*numbers, *others])), bits)) == wanted


# ---- groups and conflicts

FILES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.sampled_from([0, 1, 0xFF, 0xFFFF, 0xFFFF00])), max_size=30
)


@settings(deadline=None, max_examples=100)
@given(FILES, st.sampled_from([0, duplicates.KEPT]))
def test_photos_are_grouped_by_chains_of_duplicates(files: list[tuple[str, int, int]], kept: int) -> None:
    """Whether pairs are kept or searched anew."""
    rows = [photo(*file) for file in files]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "KEPT", kept)
        found = find_duplicates(facts(rows), bits=8)
    groups = found.groups(np.ones(len(rows), dtype=bool)).tolist()
    assert groups == find_duplicates(facts(rows), bits=8).groups(np.ones(len(rows), dtype=bool)).tolist()
    least = components(len(rows), duplicate_pairs(rows))
    assert [[one == other for other in groups] for one in groups] == [
        [one == other for other in least] for one in least
    ]


def test_a_chain_is_one_group_only_while_its_links_are_among_the_photos() -> None:
    found = find_duplicates(facts([photo("a", 1, change) for change in (0, 0xFF, 0xFFFF)]), bits=8)
    assert pairs(found) == {(0, 1), (1, 2)}
    assert len(set(found.groups(np.array([True, True, True])).tolist())) == 1
    first, left_out, last = found.groups(np.array([True, False, True])).tolist()
    assert left_out == -1
    assert first != last
    assert -1 not in (first, last)


@settings(deadline=None, max_examples=100)
@given(FILES)
def test_conflicts_are_the_photos_with_a_duplicate_in_another_class(files: list[tuple[str, int, int]]) -> None:
    rows = [photo(*file) for file in files]
    found = find_duplicates(facts(rows), bits=8)
    wanted = [False] * len(rows)
    for one, other in duplicate_pairs(rows):
        if rows[one]["label"] != rows[other]["label"]:
            wanted[one] = wanted[other] = True
    conflicts = found.conflicts(np.array(["abc".index(row["label"]) for row in rows], dtype=np.int64))
    assert conflicts.tolist() == wanted
    groups = found.groups(~conflicts)
    labels = {(group, row["label"]) for group, row in zip(groups.tolist(), rows, strict=True) if group >= 0}
    assert len(labels) == len({group for group, _ in labels})
