"""Behaviour of augmentation policies: what they make of a photo, and on what that may depend."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fruitray import sheet, transforms
from fruitray.augment import DRAWS, EIGHT, STEPS, augment, copies, fixed_variants, mix, uniforms
from fruitray.config import AUGMENTATIONS, FitConfig
from fruitray.errors import UsageError
from fruitray.index import read_index
from fruitray.sheet import contact_sheet, write_sheet
from fruitray.storage import Entry, LocalStorage
from tests.unit.runs import TRAIN, write_photos_and_index

RANDOM = (*STEPS, "mirror+jitter+jpeg", "flips+trivial+erase", "eightfold+jitter")
"""Policies that draw something anew in each epoch."""
MANY = 4000


def photos(count: int = 6, height: int = 24, width: int = 24) -> torch.Tensor:
    """(N, 3, H, W) uint8: each smooth, none like another or like its mirror image."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 2, width), indexing="ij")
    tint = torch.rand(count, 1, 1, 3, generator=torch.Generator().manual_seed(count)) * 100
    ramp = torch.stack([70 * rows, 60 * columns, 50 * (rows + columns)], dim=-1) % 150
    return (ramp + tint).to(torch.uint8).permute(0, 3, 1, 2)


def numbers(count: int) -> Any:
    return np.arange(count)


def shown(policy: str, batch: torch.Tensor, seed: int = 0, epoch: int = 1, examples: Any = None) -> torch.Tensor:
    return augment(batch, policy, seed, epoch, numbers(len(batch)) if examples is None else examples)


@pytest.mark.parametrize("policy", RANDOM)
def test_seed_epoch_and_number_decide_what_a_photo_gets(policy: str) -> None:
    batch = photos(1).expand(40, -1, -1, -1)
    first = shown(policy, batch)
    np.random.rand(3), torch.rand(3)  # the global states play no part
    assert torch.equal(shown(policy, batch), first)
    assert not torch.equal(shown(policy, batch, epoch=2), first)
    assert not torch.equal(shown(policy, batch, seed=1), first)
    assert not torch.equal(shown(policy, batch, examples=numbers(40) + 400), first)
    assert len({photo.numpy().tobytes() for photo in first}) > 1


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from([*RANDOM, "report", "eightfold", "rand+erase"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    order=st.permutations(range(6)),
    count=st.integers(1, 6),
    seed=st.integers(-(2**63), 2**63),
    last=st.booleans(),
)
def test_a_photo_gets_the_same_in_any_batch(
    policy: str, size: tuple[int, int], order: list[int], count: int, seed: int, last: bool
) -> None:
    batch = photos(6, *size).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    before, chosen = batch.clone(), np.array(order[:count])
    together = shown(policy, batch, seed)
    assert together.shape == batch.shape
    assert together.dtype == torch.uint8
    assert torch.equal(shown(policy, batch[chosen], seed, examples=chosen), together[chosen])
    assert torch.equal(batch, before), "the photos themselves are changed"


@pytest.mark.parametrize("policy", RANDOM)
def test_channels_last_stays_so(policy: str) -> None:
    assert shown(policy, photos()).is_contiguous(memory_format=torch.channels_last)


def test_draws_are_uniform_and_independent() -> None:
    first = uniforms(0, 1, numbers(MANY), "mirror")
    others = [
        uniforms(1, 1, numbers(MANY), "mirror"),
        uniforms(0, 2, numbers(MANY), "mirror"),
        uniforms(0, 1, numbers(MANY) + MANY, "mirror"),
        uniforms(0, 1, numbers(MANY), "flips"),
        np.roll(first, 1, axis=0),
        np.roll(first, 1, axis=1),
    ]
    assert first.shape == (MANY, DRAWS)
    assert first.min() >= 0
    assert first.max() < 1
    for column in first.T:
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        assert ((counts - MANY / 20) ** 2 / (MANY / 20)).sum() < 50  # chi-square, 19 degrees: 1 in 10,000
    for other in others:
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.03


def test_draws_stay_what_they_were() -> None:
    """Kept embeddings and resumed runs count on it."""
    found = uniforms(7, 3, np.array([0, 2**40]), "jitter")[:, :2]
    assert found.tolist() == [[0.019164652195939103, 0.39272509386448007], [0.05659809443530983, 0.7254384166420459]]


def eight(batch: torch.Tensor) -> list[torch.Tensor]:
    """Each photo in its eight variants: (N, 3, H, W) eight times."""
    return [fixed_variants(batch, numbers(len(batch)), np.full(len(batch), variant)) for variant in range(8)]


def test_the_four_plain_variants_are_exact() -> None:
    batch = photos()
    original, h, v, hv, *_ = eight(batch)
    assert torch.equal(original, batch)
    assert torch.equal(h, batch.flip(3))
    assert torch.equal(v, batch.flip(2))
    assert torch.equal(hv, batch.flip(2, 3))


@pytest.mark.parametrize(("policy", "variants"), [("mirror", 2), ("flips", 4)])
def test_flips_are_exact_and_equally_frequent(policy: str, variants: int) -> None:
    batch = photos(1, 5, 7).expand(MANY, -1, -1, -1)
    possible = [variant[0].numpy().tobytes() for variant in eight(batch[:1])[:variants]]
    counts = Counter(photo.numpy().tobytes() for photo in shown(policy, batch))
    assert set(counts) == set(possible)
    assert max(counts.values()) < 1.15 * MANY / variants


def test_the_report_draws_each_of_its_eight_equally_often() -> None:
    batch = photos(1).expand(MANY, -1, -1, -1)
    found = shown("report", batch)
    plain = Counter(
        number
        for number, variant in enumerate(eight(batch[:1])[:4])
        for photo in found
        if torch.equal(photo, variant[0])
    )
    assert all(0.85 < count / (MANY / 8) < 1.15 for count in plain.values())
    assert 0.46 < sum(plain.values()) / MANY < 0.54


def mark(count: int) -> torch.Tensor:
    """A bright disc on black, 30 pixels right of the centre and as many above it."""
    y, x = torch.meshgrid(torch.arange(101) - 50, torch.arange(101) - 50, indexing="ij")
    disc = (255 * ((x - 30) ** 2 + (y + 30) ** 2 < 50)).to(torch.uint8)
    return disc.expand(count, 3, -1, -1)


def place_of_mark(photo: torch.Tensor) -> tuple[float, float]:
    """By how many degrees, counterclockwise, and by what factor the mark was moved; flips are undone."""
    weight = photo[0].double() / photo[0].sum()
    x, y = ((weight.sum(dim) * (torch.arange(101) - 50)).sum().item() for dim in (0, 1))
    angle = math.degrees(math.atan2(-y, x))
    quadrant = math.floor(angle / 90)
    turned = angle - 90 * quadrant - 45
    return turned, math.hypot(x, y) / math.hypot(30, 30)


def test_the_marks_place_is_found_again() -> None:
    maps = transforms.sources(101, 101, degrees=np.array([12.0, -5.0]), scale=np.array([0.8, 1.0]))
    for photo, expected in zip(transforms.warp(mark(2), maps), [(12, 0.8), (-5, 1.0)], strict=True):
        assert place_of_mark(photo) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("policy", ["report", "eightfold"])
def test_scale_and_rotation_fill_the_reports_ranges(policy: str) -> None:
    examples = numbers(600) if policy == "report" else numbers(600) * 8 + 4 + numbers(600) % 4
    places = [place_of_mark(photo) for photo in shown(policy, mark(600), examples=examples)]
    turned = [(angle, scale) for angle, scale in places if abs(angle) > 0.02]
    angles, scales = zip(*turned, strict=True)
    assert -15.05 < min(angles) < -14
    assert 14 < max(angles) < 15.05
    assert 0.798 < min(scales) < 0.81
    assert 0.99 < max(scales) < 1.002
    assert len({round(angle, 2) for angle in angles}) > len(angles) / 2


def test_the_eight_are_a_fixed_set() -> None:
    batch, examples = photos(4).repeat_interleave(8, 0), numbers(32)
    assert copies("eightfold") == len(EIGHT) == 8
    found = shown("eightfold", batch, examples=examples)
    assert torch.equal(shown("eightfold", batch, seed=5, epoch=9, examples=examples), found)
    assert torch.equal(found, torch.stack(eight(photos(4)), 1).flatten(0, 1))
    assert len({photo.numpy().tobytes() for photo in found}) == 32
    moves = [place_of_mark(photo) for photo in shown("eightfold", mark(16), examples=numbers(16)) if photo.any()]
    assert len({round(angle, 3) for angle, _ in moves}) == 9, "each turned photo has an angle of its own"


def boxes(found: torch.Tensor, background: int) -> list[torch.Tensor]:
    """Of each photo that has one, the pixels (K, 2) that are not background."""
    painted = [(photo != background).any(0).nonzero() for photo in found]
    return [pixels for pixels in painted if len(pixels)]


def test_erasing_paints_a_plain_box_of_the_right_size_half_of_the_time() -> None:
    batch = torch.full((1000, 3, 60, 50), 9, dtype=torch.uint8)
    found = shown("erase", batch)
    painted = boxes(found, 9)
    assert 0.44 < len(painted) / 1000 < 0.56
    ratios = []
    for pixels in painted:
        height, width = (pixels.max(0).values - pixels.min(0).values + 1).tolist()
        assert len(pixels) == height * width, "no box"
        assert (height - 1) * (width - 1) <= 0.33 * 3000
        assert (height + 1) * (width + 1) >= 0.02 * 3000
        ratios.append(height / width)
    assert min(ratios) < 0.4
    assert max(ratios) > 2.5
    assert all(len(photo.flatten(1).unique(dim=1).T) <= 2 for photo in found), "one colour"
    covered = torch.stack([(photo != 9).any(0) for photo in found]).float().mean(0)
    assert min(covered.amax(0).min(), covered.amax(1).min()) > 0.01, "no row or column is safe"


def test_a_crop_is_a_box_of_a_quarter_at_least() -> None:
    """Of a photo whose colours say where they stand."""
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(250), indexing="ij")
    batch = torch.stack([rows, columns, rows * 0]).byte()[None].expand(500, -1, -1, -1)
    found = shown("crop", batch).float()
    high, wide = (found[:, axis].amax((1, 2)) - found[:, axis].amin((1, 2)) + 1 for axis in (0, 1))
    area, stretch = high * wide / (200 * 250), (wide / 250) / (high / 200)
    assert 0.24 < area.min() < 0.3
    assert 0.9 < area.max() <= 1
    assert 0.74 < stretch.min() < 0.8
    assert 1.25 < stretch.max() < 1.36
    for axis, length in ((0, 200), (1, 250)):
        assert found[:, axis].amin() == 0, "no edge is safe"
        assert found[:, axis].amax() == length - 1
    assert (found[:, 0, -1] > found[:, 0, 0]).all(), "upright"
    assert (found[:, 1, :, -1] > found[:, 1, :, 0]).all(), "not mirrored"


@pytest.mark.parametrize("policy", [*RANDOM, "none", "mirror+crop+jitter"])
def test_photos_come_out_as_large_as_asked(policy: str) -> None:
    batch = photos(6, 24, 24)
    together = augment(batch, policy, 0, 1, numbers(6), 16)
    assert together.shape == (6, 3, 16, 16)
    assert torch.equal(augment(batch[2:4], policy, 0, 1, numbers(6)[2:4], 16), together[2:4])
    assert together.is_contiguous(memory_format=torch.channels_last)


def test_jpeg_changes_every_photo_a_little() -> None:
    batch = photos(20, 64, 64)
    change = (shown("jpeg", batch).float() - batch.float()).abs().flatten(1)
    assert (change.mean(1) > 0).all()
    assert (change.mean(1) < 6).all()


def test_jitter_moves_brightness_both_ways_and_leaves_the_picture() -> None:
    batch = photos(1, 32, 32).expand(300, -1, -1, -1)
    found = shown("jitter", batch).float()
    ratio = found.mean((1, 2, 3)) / batch.float().mean()
    assert 0.5 < ratio.min() < 0.75
    assert 1.25 < ratio.max() < 1.5
    same = [np.corrcoef(photo[1].ravel(), batch[0, 1].ravel())[0, 1] for photo in found.numpy()]
    assert min(same) > 0.5


@pytest.mark.parametrize(("policy", "rounds"), [("trivial", 1), ("rand", 2)])
def test_every_operation_of_the_space_is_drawn(policy: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(transforms, "operate", lambda batch, *chosen: drawn.append(chosen) or batch)
    shown(policy, photos(1, 2, 2).expand(MANY, -1, -1, -1))
    assert len(drawn) == rounds
    for _, operations, strength, sign in drawn:
        counts = np.bincount(operations, minlength=len(transforms.OPERATIONS))
        assert counts.min() > 0.75 * MANY / 14
        assert len(counts) == len(transforms.OPERATIONS) == 14
        bins = np.unique(np.round(strength * 30, 9))
        assert bins.tolist() == (list(range(31)) if policy == "trivial" else [9])
        assert abs(sign.mean()) < 0.06
        assert set(sign) == {-1.0, 1.0}


def mixed(policy: str, count: int = 500, size: int = 20) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
    first, second = photos(1, size, size).expand(count, -1, -1, -1), photos(1, size, size).flip(1) // 2
    second = second.expand(count, -1, -1, -1)
    found, share = mix(first, second, policy, 3, 2, numbers(count))
    return found, share, first, second


def blended(found: torch.Tensor, share: float, first: torch.Tensor, second: torch.Tensor) -> bool:
    expected = share * first.double() + (1 - share) * second.double()
    return bool((found - expected).abs().max() <= 0.51)


def pasted(found: torch.Tensor, share: float, first: torch.Tensor, second: torch.Tensor) -> bool:
    """A box of the second in the first, as large as its share of the labels says."""
    of_second = (found != first).any(0)
    box = of_second.nonzero()
    if not len(box):
        return share == 1
    high, wide = (box.max(0).values - box.min(0).values + 1).tolist()
    whole = high * wide == len(box) and torch.equal(torch.where(of_second, second, first), found)
    return whole and share == pytest.approx(1 - of_second.double().mean().item())


@pytest.mark.parametrize(("policy", "kind"), [("mixup", blended), ("mirror+mixup", blended), ("cutmix", pasted)])
def test_the_share_says_what_is_left_of_the_photo(policy: str, kind: Any) -> None:
    for photo, share, first, second in zip(*mixed(policy), strict=True):
        assert kind(photo, share, first, second)


def test_shares_are_spread_over_the_whole_range() -> None:
    counts = np.histogram(mixed("mixup", MANY, 1)[1], bins=10, range=(0, 1))[0]
    assert counts.min() > 0.85 * MANY / 10
    cut = mixed("cutmix")[1]
    assert cut.min() < 0.3
    assert cut.max() > 0.9


def test_each_photo_draws_one_of_both() -> None:
    kinds = Counter()
    for photo, share, first, second in zip(*mixed("mixup+cutmix"), strict=True):
        kinds[blended(photo, share, first, second), pasted(photo, share, first, second)] += 1
    assert kinds[False, False] == 0
    assert kinds[True, False] > 200
    assert kinds[False, True] > 200


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("", "join any of none, mirror, flips, eightfold, report"),
        ("mirorr", "join any of"),
        ("mirror+", "join any of"),
        ("mirror,jitter", "join any of"),
        ("jitter+jitter", "no step twice"),
        ("none+mirror", "none stands alone"),
        ("jitter+eightfold", "eightfold must come first"),
        ("mixup+mirror", "must come last"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy: str, rule: str) -> None:
    with pytest.raises(UsageError, match=rule) as caught:
        FitConfig(augment=policy)
    assert str(caught.value).startswith(f"--augment {policy}: ")


@pytest.mark.parametrize(("asked", "shown"), [(3 * TRAIN, TRAIN), (TRAIN + 1, TRAIN), (TRAIN - 1, TRAIN - 1), (1, 1)])
def test_a_sheet_shows_no_photo_twice(asked: int, shown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Entry] = []

    def squares(_: object, entries: list[Entry], __: object) -> list[torch.Tensor]:
        drawn.extend(entries)
        return [torch.zeros(3, 16, 16, dtype=torch.uint8)] * len(entries)

    monkeypatch.setattr(sheet, "squares", squares)
    index = read_index(write_photos_and_index(tmp_path))
    write_sheet(LocalStorage(str(tmp_path)), index, "mirror", 0, photos=asked, side=16)
    assert len({entry.key for entry in drawn}) == len(drawn) == shown


@pytest.mark.parametrize("policy", [*AUGMENTATIONS, "eightfold+jitter+cutmix"])
def test_a_contact_sheet_shows_each_photo_and_what_becomes_of_it(policy: str) -> None:
    batch = photos(3, 16, 12)
    drawn = torch.from_numpy(np.array(contact_sheet(batch, policy, columns=5))).permute(2, 0, 1)
    columns = 1 + (8 if policy.startswith("eightfold") else 5)
    assert drawn.shape == (3, 3 * 18, columns * 14)
    tiles = drawn.unfold(1, 16, 18).unfold(2, 12, 14).permute(1, 2, 0, 3, 4)
    assert torch.equal(tiles[:, 0], batch)
    assert torch.equal(tiles[:, 1:], batch[:, None].expand_as(tiles[:, 1:])) == (policy == "none")
    if policy == "eightfold":
        assert torch.equal(tiles[:, 1:], torch.stack(eight(batch), 1))
    elif policy != "none":
        assert any(not torch.equal(one, other) for one, other in pairwise(tiles[:, 1:].unbind(1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", RANDOM)
def test_a_gpu_makes_the_same_of_a_photo(policy: str) -> None:
    batch = photos(64, 48, 48)
    on_cpu, on_gpu = shown(policy, batch), shown(policy, batch.cuda())
    assert on_gpu.is_cuda
    differing = (on_gpu.cpu().int() - on_cpu.int()).abs()
    assert float((differing > 1).float().mean()) < 0.001, (
        "a last bit may round the other way, and solarize then inverts"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["mixup", "cutmix", "mixup+cutmix"])
def test_a_gpu_mixes_the_same(policy: str) -> None:
    first, second = photos(64), photos(64).flip(1)
    on_cpu, share = mix(first, second, policy, 0, 1, numbers(64))
    on_gpu, same = mix(first.cuda(), second.cuda(), policy, 0, 1, numbers(64))
    assert (on_gpu.cpu().int() - on_cpu.int()).abs().max() <= 1
    np.testing.assert_array_equal(share, same)
