"""Which photos are one photo: byte for byte, or nearly: encoded, sized or lit otherwise, or taken a moment later.

Near duplicates have perceptual hashes that differ in few bits, and thumbnails with the same light and the same colours.
imagehash, cleanvision and imagededup compare every pair of hashes, or only equal ones; the search here finds every pair
within the distance, among millions and in bounded memory (multi-index hashing, Norouzi et al. 2012).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BANDS = (13, 13, 13, 13, 12)
"""Bits of the 64-bit hash per band: of two hashes 9 bits apart, one band at least differs in one bit at most."""
MAX_BITS = 9
CANDIDATES = 2_000_000
"""Pairs that are compared at a time."""
LARGE = 4096
"""Pairs of two ranges from which these are compared by themselves."""
SAME_LIGHT = 0.95
"""Least correlation of the luminance of two thumbnails of one photo."""
SAME_COLOR = 0.35
"""Largest difference of the chrominance of two thumbnails of one photo, relative to their chrominance; 0 to 1."""
GREY = 6.0
"""Chrominance, of 128, that some part of a photo has, or it has no colour to compare."""
KEPT = 8_000_000
"""Pairs of close hashes that are kept; a folder of a film's frames may have more."""
BLOCK = 65_536
"""Thumbnails that are measured, or compared, at a time."""
FLAT = 2.0
"""Standard deviation of a thumbnail's luminance, of 255, below which its hash says nothing."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What `find_duplicates` found among N photos of C contents."""

    content: Ints
    """(N,) a number per content: byte-identical files have the same."""
    hashes: NDArray[np.uint64]
    """(C,) perceptual hashes."""
    thumbnails: NDArray[np.uint8]
    """(C, T * T * 3) RGB."""
    bits: int
    close: Ints | None
    """(P, 2) contents with close hashes; None where they are so many that they are searched anew each time."""

    def near(
        self,
        worth: Callable[[Ints], Bools] = lambda pairs: np.ones(len(pairs), dtype=np.bool_),
        some: Callable[[Ints], bool] = lambda contents: True,
    ) -> Iterator[Ints]:
        """Near duplicates (P, 2), as numbers of contents, among the pairs that are `worth` a comparison; `some` says
        whether any pair of many contents may be."""
        waiting: list[Ints] = []
        count = 0
        for pairs in _close(self.hashes, self.thumbnails, self.bits, some) if self.close is None else [self.close]:
            for start in range(0, len(pairs), BLOCK):
                block = pairs[start : start + BLOCK]
                block = block[worth(block)]
                if len(block):
                    block = block[same_photo(*self.thumbnails[block.T])]
                if len(block):
                    waiting.append(block)
                    count += len(block)
                if count >= BLOCK:
                    yield np.concatenate(waiting)
                    waiting, count = [], 0
        if waiting:
            yield np.concatenate(waiting)

    def conflicts(self, labels: Ints) -> Bools:
        """(N,) whether a photo, or a near duplicate of it, lies in another class too; `labels` (N,) class numbers."""
        label = np.full(len(self.hashes), -1)
        label[self.content] = labels
        mixed = np.zeros(len(label), dtype=bool)
        mixed[self.content[label[self.content] != labels]] = True
        found = mixed.copy()

        def worth(pairs: Ints) -> Bools:
            differ = (label[pairs[:, 0]] != label[pairs[:, 1]]) | mixed[pairs].any(axis=1)
            return np.asarray(differ & ~found[pairs].all(axis=1))

        def some(contents: Ints) -> bool:
            differ = (label[contents] != label[contents[0]]).any() or mixed[contents].any()
            return bool(differ and not found[contents].all())

        for pairs in self.near(worth, some):
            found[pairs.reshape(-1)] = True
        return found[self.content]

    def groups(self, among: Bools) -> Ints:
        """(N,) a number per group of duplicates of duplicates `among` (N,) the photos; -1 for those not among them."""
        there = np.zeros(len(self.hashes), dtype=bool)
        there[self.content[among]] = True
        group = np.arange(len(there))

        def worth(pairs: Ints) -> Bools:
            return np.asarray(there[pairs].all(axis=1) & (group[pairs[:, 0]] != group[pairs[:, 1]]))

        def some(contents: Ints) -> bool:
            groups = group[contents[there[contents]]]
            return bool((groups != groups[:1]).any())

        for pairs in self.near(worth, some):
            links = coo_array((np.ones(len(pairs), dtype=bool), group[pairs.T]), shape=(len(there), len(there)))
            group[:] = connected_components(links, directed=False)[1][group]
        return np.where(among, group[self.content], -1).astype(np.int64)


def find_duplicates(photos: pa.Table, bits: int) -> Duplicates:
    """The duplicates among `photos` (columns sha256, phash, thumbnail of `index.SCHEMA`): near ones are those whose
    hashes differ in at most `bits` of 64 bits, at most `MAX_BITS`; with `bits` -1 only byte-identical ones count.
    """
    content = photos["sha256"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(content, return_index=True)
    kinds = photos.select(["phash", "thumbnail"]).take(first).combine_chunks()
    hashes = np.fromiter((int(value, 16) for value in kinds["phash"].to_pylist()), dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(kinds["thumbnail"].to_pylist()), np.uint8).reshape(
        len(hashes), -1 if len(hashes) else 3
    )
    close, count = [np.empty((0, 2), dtype=np.int64)], 0
    for pairs in _close(hashes, thumbnails, bits):
        close.append(pairs)
        count += len(pairs)
        if count > KEPT:
            break
    return Duplicates(
        content.astype(np.int64), hashes, thumbnails, bits, None if count > KEPT else np.concatenate(close)
    )


def same_photo(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> Bools:
    """(P,) whether two thumbnails (P, T * T * 3) RGB have light and dark, and colours, in the same places.

    A colourless copy of a coloured photo is the same photo; other levels of light are forgiven, other colours are not.
    """
    a, b = _ycc(left), _ycc(right)
    light_a, light_b = (y - y.mean(axis=1, keepdims=True) for y in (a[..., 0], b[..., 0]))
    scale = np.sqrt((light_a**2).sum(axis=1) * (light_b**2).sum(axis=1))
    light = (light_a * light_b).sum(axis=1) >= SAME_LIGHT * np.maximum(scale, 1e-6)
    strength_a, strength_b, difference = (np.abs(c[..., 1:]).mean(axis=(1, 2)) for c in (a, b, a - b))
    grey = np.minimum(*(np.abs(c[..., 1:]).max(axis=(1, 2)) for c in (a, b))) < GREY
    same: Bools = light & (grey | (difference <= SAME_COLOR * (strength_a + strength_b)))
    return same


_YCC = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], dtype=np.float32)


def _ycc(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, T * T * 3) RGB as (N, T * T, 3): luminance 0 to 255, chrominance -128 to 128 (JFIF)."""
    return thumbnails.reshape(len(thumbnails), thumbnails.shape[1] // 3, 3).astype(np.float32) @ _YCC.T


def _close(
    hashes: NDArray[np.uint64],
    thumbnails: NDArray[np.uint8],
    bits: int,
    some: Callable[[Ints], bool] = lambda contents: True,
) -> Iterator[Ints]:
    """Each pair (P, 2) of contents, but flat ones, whose hashes differ in at most `bits`; without many contents at once
    of which not `some` pair is wanted."""
    if bits < 0:
        return
    among = _vivid(thumbnails)
    least = bits // len(BANDS)
    """So many bits at most differ in one of the bands."""
    bands = [(hashes[among] >> np.uint64(shift)).astype(np.int64) & ((1 << width) - 1) for shift, width in _places()]
    for number, (band, width) in enumerate(zip(bands, BANDS, strict=True)):
        order = np.argsort(band, kind="stable")
        for flip in [0, *(1 << bit for bit in range(width) if least)]:
            wanted = partial(_some_of, some, among[order])
            for one, other in _alike(band[order], hashes[among[order]], flip, bits, wanted):
                pairs = np.sort(order[np.stack([one, other], axis=1)], axis=1)
                for earlier in bands[:number]:  # which has yielded the pair already, where it differs as little
                    pairs = pairs[np.bitwise_count(np.bitwise_xor(*earlier[pairs.T])) > least]
                yield among[pairs]


def _some_of(some: Callable[[Ints], bool], contents: Ints, places: Ints) -> bool:
    return some(contents[places])


def _alike(
    band: Ints, hashes: NDArray[np.uint64], flip: int, bits: int, some: Callable[[Ints], bool]
) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of places in `band` (N,), which is sorted, whose values differ by the bit `flip`, or are the same where it
    is 0, and whose `hashes` (N,) differ in at most `bits`; each pair once."""
    values, starts, counts = np.unique(band, return_index=True, return_counts=True)
    places = np.searchsorted(values, values | flip).clip(max=len(values) - 1)
    ones = np.flatnonzero((values[places] == values | flip) & (values & flip == 0))
    others = places[ones]
    for one, other in _pairs_of_places(starts, counts, ones, others):
        if one.ndim == 2 and not some(np.concatenate([one[:, 0], other])):
            continue
        near = np.bitwise_count(hashes[one] ^ hashes[other]) <= bits
        if not flip:
            near &= one < other
        if near.any():
            yield tuple(np.broadcast_to(side, near.shape)[near] for side in (one, other))


def _pairs_of_places(starts: Ints, counts: Ints, ones: Ints, others: Ints) -> Iterator[tuple[Ints, Ints]]:
    """All pairs of a place in range `ones[i]` with one in range `others[i]`, some `CANDIDATES` at a time: as two lists
    of the same length, or, of large ranges, which takes far less time, as a column and a row."""
    large = counts[ones] * counts[others] > LARGE
    for one, other in zip(ones[large].tolist(), others[large].tolist(), strict=True):
        row = np.arange(starts[other], starts[other] + counts[other])
        column = np.arange(starts[one], starts[one] + counts[one])[:, None]
        step = max(1, CANDIDATES // len(row))
        for first in range(0, len(column), step):
            yield column[first : first + step], row
    ones, others = ones[~large], others[~large]
    sizes = counts[ones] * counts[others]
    chunk = np.cumsum(sizes) // CANDIDATES
    for first, last in itertools.pairwise([0, *(np.flatnonzero(np.diff(chunk)) + 1), len(sizes)]):
        here = sizes[first:last]
        which = np.repeat(np.arange(first, last), here)
        before = np.repeat(np.cumsum(here) - here, here)
        column, row = np.divmod(np.arange(len(which)) - before, counts[others][which])
        yield starts[ones][which] + column, starts[others][which] + row


def _vivid(thumbnails: NDArray[np.uint8]) -> Ints:
    """Which have some light and dark in them."""
    parts = (thumbnails[start : start + BLOCK] for start in range(0, len(thumbnails), BLOCK))
    return np.flatnonzero(np.concatenate([np.empty(0), *(_ycc(part)[..., 0].std(axis=1) for part in parts)]) >= FLAT)


def _places() -> Iterator[tuple[int, int]]:
    """Lowest bit and width of each band."""
    yield from zip(itertools.accumulate(BANDS, initial=0), BANDS, strict=False)
