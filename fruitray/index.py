"""The dataset index: one row per file, as Parquet. What later jobs know of the photos, they know from here."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fruitray.errors import LeakError, NoInputError, NotFoundError, OutputConflictError, TryAgainError
from fruitray.facts import THUMBNAIL, VERSION
from fruitray.images import PASSING
from fruitray.storage import Entry, Storage, open_file, open_storage
from fruitray.tables import field, parquet, read_parquet

FILE = "index.parquet"

SCHEMA = pa.schema(
    [
        field("uri", pa.string(), "where the file lies"),
        field("label", pa.string(), "its class: the first folder below the images' root; null for a file in none"),
        field("status", pa.string(), "ok: a photo; error: not to be decoded, see error_code"),
        field("error_code", pa.string(), "one of fruitray.images.CODES"),
        field("error", pa.string(), "what error_code means, and what is known of this file"),
        field("excluded", pa.string(), "why a photo is in no split: one of fruitray.rules.REASONS"),
        field("split", pa.string(), "train, val or test; null for what is excluded or an error"),
        field("fold", pa.int32(), "cross-validation fold of a train or val photo, from 0, where folds were asked for"),
        field(
            "dealt",
            pa.string(),
            "the split, or split/fold, that it or a duplicate of it has or last had: where it goes back to",
        ),
        field("group", pa.string(), "the same for duplicates and near duplicates: their least sha256, 16 digits of it"),
        field("odd", pa.list_(pa.string()), "what is unusual about it in this set: size, aspect, blurry"),
        field("format", pa.string(), "JPEG, PNG or WEBP, by content"),
        field("mode", pa.string(), "Pillow's mode in the file: RGB, L (grey), CMYK, P, RGBA, ..."),
        field("width", pa.int32(), "pixels, after EXIF rotation"),
        field("height", pa.int32(), "pixels, after EXIF rotation"),
        field("frames", pa.int32(), "more than 1 where it is animated; the first is used"),
        field("orientation", pa.int32(), "EXIF's, 1 to 8; 1 where there is none"),
        field("sharpness", pa.float64(), "variance of the Laplacian, of the photo at 1024 pixels at most"),
        field("brightness", pa.float64(), "mean luminance, 0 to 1"),
        field("color", pa.string(), "dominant colour, #rrggbb"),
        field("phash", pa.string(), "64-bit perceptual hash, as hex"),
        field("thumbnail", pa.binary(3 * THUMBNAIL**2), f"{THUMBNAIL} x {THUMBNAIL} pixels RGB, row by row"),
        field("bytes", pa.int64(), "size of the file"),
        field("sha256", pa.string(), "of the file's bytes; where they cannot be had, of those it had before"),
        field("etag", pa.string(), "the storage's name for this version of the file"),
    ]
)
"""Every column of the index; their descriptions stand in the file's schema, too."""

DECIDED = ("excluded", "split", "fold", "dealt", "group", "odd")
"""The columns that the set decides. A file alone decides the others."""
FACTS = pa.schema([column for column in SCHEMA if column.name not in DECIDED])


@dataclass(frozen=True, slots=True)
class Pool:
    """The photos of train and val together, in index order. A photo's place here is its *position*: whichever of the
    two it is in, and whatever a fold makes of it, its position stays."""

    entries: list[Entry]
    labels: list[int]
    """Class numbers."""
    splits: list[str]
    folds: list[int | None]
    groups: list[str]
    """The same for duplicates."""

    @property
    def validated(self) -> list[bool]:
        """Of each photo whether the index's own split holds it out."""
        return [split == "val" for split in self.splits]


@dataclass(frozen=True, slots=True)
class Index:
    """A read index. `images` is the root its photos were listed below, `sha256` the hash of the index file."""

    table: pa.Table
    images: str
    sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that are trained on, sorted: position is class number."""
        return tuple(sorted(set(self.table.filter(pc.is_valid(self.table["split"]))["label"].to_pylist())))

    def rows(self, split: str) -> tuple[list[Entry], list[int]]:
        """The photos of `split`, in index order: where to read them, and their class numbers."""
        return self._photos(self.table.filter(pc.equal(self.table["split"], split)))

    def pool(self) -> Pool:
        """The photos that are trained on or validated on, in one row."""
        table = self.table.filter(pc.is_in(self.table["split"], pa.array(["train", "val"])))
        groups = pc.coalesce(table["group"], table["sha256"]).to_pylist()
        return Pool(*self._photos(table), table["split"].to_pylist(), table["fold"].to_pylist(), groups)

    def _photos(self, table: pa.Table) -> tuple[list[Entry], list[int]]:
        number = {label: position for position, label in enumerate(self.classes)}
        entries = [
            Entry(row["uri"][len(self.images) + 1 :], row["bytes"], row["etag"])
            for row in table.select(["uri", "bytes", "etag"]).to_pylist()
        ]
        return entries, [number[label] for label in table["label"].to_pylist()]


def standing_hash(storage: Storage) -> str:
    """SHA-256 of the index in `storage`; empty where there is none."""
    return hashlib.sha256(storage.read(FILE)).hexdigest() if storage.exists(FILE) else ""


def write_index(storage: Storage, table: pa.Table, images: str, *, instead_of: str | None = None) -> None:
    """Write `table` (`SCHEMA`), sorted by URI, as `index.parquet` into `storage`; the same rows give the same bytes.

    Raises:
        TryAgainError: the index that stands there is neither this nor the one of the hash `instead_of`, if given: its
            splits would not stand.
    """
    metadata = {"fruitray": json.dumps({"images": images, "version": VERSION})}
    rows = table.select(SCHEMA.names).sort_by("uri")
    data = parquet(rows.cast(SCHEMA.with_metadata(metadata)))
    if instead_of is not None and standing_hash(storage) not in (instead_of, hashlib.sha256(data).hexdigest()):
        raise TryAgainError(storage.uri_of(FILE), "another prepare has written it meanwhile")
    storage.write(FILE, data)


def known_facts(earlier: Index, images: Storage, entries: Sequence[Entry]) -> tuple[pa.Table, list[Entry]]:
    """What an earlier index knows (`FACTS`) of files that are the same by URI, size and etag; and the other entries.

    Files that could not be had, or not be decoded in time, are not known: they may do better now.
    """
    listed = pa.table(
        {
            "uri": [images.uri_of(entry.key) for entry in entries],
            "bytes": pa.array([entry.size for entry in entries], pa.int64()),
            "etag": [entry.etag for entry in entries],
        }
    )
    again = pc.match_substring_regex(pc.fill_null(earlier.table["error_code"], ""), PASSING)
    table = earlier.table.filter(pc.invert(again)).select(FACTS.names)
    place = pc.index_in(_version(listed), _version(table))
    fresh = [entry for entry, new in zip(entries, pc.is_null(place).to_pylist(), strict=True) if new]
    known = table.take(place.drop_null())
    labels = [label_of(uri[len(images.uri) + 1 :]) for uri in known["uri"].to_pylist()]  # another root, another label
    return known.set_column(FACTS.get_field_index("label"), FACTS.field("label"), pa.array(labels, pa.string())), fresh


def label_of(key: str) -> str | None:
    """The class a key says: its first folder. A file in no folder has none."""
    folder, separator, _ = key.partition("/")
    return (folder if separator else None) or None


def _version(files: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(files["uri"], pc.cast(files["bytes"], pa.string()), files["etag"], "\n")


def index_place(uri: str) -> tuple[Storage, str]:
    """The storage beside an index, and the index's key in it; `uri` names the folder or the file."""
    return open_file(uri) if uri.endswith(".parquet") else (open_storage(uri), FILE)


def read_index(uri: str, sha256: str = "") -> Index:
    """Read the index that `prepare` wrote to `uri`, its folder or the file itself; the one of that hash, if given.

    Raises:
        LeakError: copies of a photo stand in two splits: the file was changed after `prepare`.
        NoInputError: it has no rows.
        OutputConflictError: it is no index, or of another version of fruitray, or not the one of that hash.
    """
    storage, key = index_place(uri)
    try:
        data = storage.read(key)
    except NotFoundError as error:
        raise NotFoundError(storage.uri_of(key), "there is no index: `prepare` writes one") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 not in ("", found):
        raise OutputConflictError(storage.uri_of(key), "was prepared anew while this job was at work")
    try:
        table = read_parquet(storage.uri_of(key), data)
        made: Mapping[str, Any] = json.loads(table.schema.metadata[b"fruitray"])
        images, version = made["images"], made["version"]
        if version == VERSION:  # another version's columns are others
            table = table.select(SCHEMA.names).cast(SCHEMA)
    except (OutputConflictError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise OutputConflictError(storage.uri_of(key), "is no index that prepare wrote, or a damaged one") from error
    if version != VERSION:
        raise OutputConflictError(storage.uri_of(key), "was written by another version; prepare a new one elsewhere")
    if not table.num_rows:
        raise NoInputError(storage.uri_of(key))
    check_leaks(table, storage.uri_of(key))
    return Index(table, images, found)


def check_leaks(table: pa.Table, uri: str) -> None:
    """Raise `LeakError` if copies, or near duplicates, of a photo stand in two splits or folds; takes milliseconds."""
    used = table.filter(pc.is_valid(table["split"]))
    for what, side in itertools.product(("sha256", "group"), ("split", "fold")):
        count = used.filter(pc.is_valid(used[what])).group_by(what).aggregate([(side, "count_distinct")])
        torn = count.filter(pc.greater(count[f"{side}_count_distinct"], 1))[what]
        if len(torn):
            where = used.filter(pc.equal(used[what], pc.min(torn))).select(["uri", side]).to_pylist()
            said = ", ".join(f"{row['uri']} ({row[side]})" for row in where[:4])
            raise LeakError(uri, f"{len(torn)} duplicates stand in two {side}s: {said}; prepare into another --out")
