"""Scored shards, exactly once: kill anything, run the same command again, and every planned input has one row.

    write_plan -> commit (per shard) -> finish; verify proves it at any later time

    _fruitray/plan/inputs-HASH.parquet   the inputs: shard, key, size, etag; named by its content
    _fruitray/plan.json                  create-only: settings, inputs file, shard and row counts
    data/part-000123.parquet             create-only: the rows of shard 123
    manifest.json, _SUCCESS              rows, SHA-256 and error counts per part; then the seal

Nothing is renamed, deleted or overwritten. Where a store ignores `If-None-Match` (`Storage.creates_once` finds out),
what exists is looked for before each write instead: as safe for one job at a time, killed and re-run as often as you
like, but two *different* jobs that race for one output could then mix their files; `verify` would tell.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fruitray.errors import NotFoundError, OutputConflictError, TryAgainError
from fruitray.index import label_of
from fruitray.storage import Entry, Storage
from fruitray.tables import parquet

if TYPE_CHECKING:
    from fruitray.predictor import Prediction  # it brings torch, which `verify` can do without

PLAN, MANIFEST, SUCCESS, PROBE = "_fruitray/plan.json", "manifest.json", "_SUCCESS", "_fruitray/probe"

SCHEMA = pa.schema(
    [
        ("uri", pa.string()),  # verbatim, nothing escaped
        ("label", pa.string()),
        ("confidence", pa.float32()),  # softmax share of `label`
        ("top_labels", pa.list_(pa.string())),  # most likely first
        ("top_scores", pa.list_(pa.float32())),
        ("status", pa.string()),  # ok | error
        ("error_code", pa.string()),  # see fruitray.images.CODES
        ("error", pa.string()),
        ("width", pa.int32()),  # pixels, after EXIF rotation
        ("height", pa.int32()),
        ("etag", pa.string()),  # of the version that was scored
        ("model_id", pa.string()),  # SHA-256 of the model package's package.json
    ]
)

_INPUTS_SCHEMA = pa.schema(
    [("shard", pa.int32()), ("key", pa.string()), ("size", pa.int64()), ("etag", pa.string()), ("kind", pa.string())]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be scored and how. Two jobs with equal `settings` share one plan; the first one's inputs hold."""

    settings: dict[str, Any]
    """All that decides a row: images root, model id, top_k, shard rows, batch size; and the `classes` of the model."""
    inputs: str
    """Key of the inputs file."""
    rows: int
    shards: int
    created_atomically: bool
    """Whether the store keeps the create-only promise."""

    @property
    def hash(self) -> str:
        """Names the plan in every part."""
        return hashlib.sha256(_json(asdict(self))).hexdigest()


@dataclass(frozen=True, slots=True)
class Part:
    """One committed shard."""

    key: str
    rows: int
    sha256: str
    labels: dict[str, int] = field(default_factory=dict)
    """Rows per predicted label."""
    errors: dict[str, int] = field(default_factory=dict)
    """Rows per error code."""
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows per folder, of those that have a class's name, and in each per predicted label."""


def write_plan(out: Storage, settings: dict[str, Any], entries: Sequence[Entry], shard_rows: int) -> Plan:
    """Plan to score `entries` (at least one) with `settings`, or adopt the plan that an equal job wrote before.

    Raises:
        OutputConflictError: `out` holds the plan of another job.
    """
    columns = {name: [getattr(entry, name) for entry in entries] for name in ("key", "size", "etag", "kind")}
    shards = [row // shard_rows for row in range(len(entries))]
    data = parquet(pa.table({"shard": shards, **columns}, _INPUTS_SCHEMA))
    inputs = _inputs_key(data)
    out.create(inputs, data)
    plan = Plan(
        settings=settings,
        inputs=inputs,
        rows=len(entries),
        shards=shards[-1] + 1,
        created_atomically=out.creates_once(PROBE),
    )
    _create(out, plan, PLAN, _json(asdict(plan)))
    return adopt_plan(out, settings) or plan


def adopt_plan(out: Storage, settings: dict[str, Any]) -> Plan | None:
    """The plan that stands in `out`, None if there is none.

    Raises:
        OutputConflictError: it is another job's.
    """
    if not out.exists(PLAN):
        return None
    plan = read_plan(out)
    for name in sorted({*settings, *plan.settings}):
        standing, wanted = plan.settings.get(name), settings.get(name)
        if standing != wanted:
            reason = f"was planned with {name} {standing!r}, not {wanted!r}; choose another --out"
            raise OutputConflictError(out.uri_of(PLAN), reason)
    return plan


def read_plan(out: Storage) -> Plan:
    """The plan that stands in `out`."""
    try:
        return Plan(**json.loads(out.read(PLAN)))
    except (ValueError, TypeError) as error:
        raise OutputConflictError(out.uri_of(PLAN), "is no plan of this program") from error


def read_inputs(out: Storage, plan: Plan) -> Iterator[list[Entry]]:
    """The planned inputs, shard by shard, in order.

    Raises:
        OutputConflictError: the inputs file is not the one that was planned.
    """
    data = out.read(plan.inputs)
    if plan.inputs != _inputs_key(data):
        raise OutputConflictError(out.uri_of(plan.inputs), "is not what was planned")
    table = _open(out.uri_of(plan.inputs), data)
    ends = pc.run_end_encode(table["shard"].combine_chunks()).run_ends.to_pylist()
    for start, end in pairwise([0, *ends]):
        rows = table.slice(start, end - start).select(["key", "size", "etag", "kind"]).to_pylist()
        yield [Entry(**row) for row in rows]


def _inputs_key(data: bytes) -> str:
    return f"_fruitray/plan/inputs-{hashlib.sha256(data).hexdigest()[:32]}.parquet"


def part_key(shard: int) -> str:
    """Where the rows of `shard` lie."""
    return f"data/part-{shard:06d}.parquet"


def committed_shards(out: Storage, plan: Plan) -> set[int]:
    """Which shards are done. Folder markers and hidden files (a file manager's) do not count.

    Raises:
        OutputConflictError: something lies in `data/` that is no part of the plan.
    """
    numbers = {part_key(shard): shard for shard in range(plan.shards)}
    keys = [entry.key for entry in out.list("data/")]
    found = [key for key in keys if not key.endswith("/") and "/." not in key]
    if strangers := sorted(set(found) - set(numbers)):
        raise OutputConflictError(out.uri_of(strangers[0]), "is no part of this plan")
    return {numbers[key] for key in found}


def commit(
    out: Storage,
    plan: Plan,
    shard: int,
    uris: Sequence[str],
    etags: Sequence[str],
    predictions: "Sequence[Prediction]",
    model_id: str,
) -> bool:
    """Write the rows of `shard` at once or not at all; False if they were committed before (by a lost self or a twin).

    Raises:
        OutputConflictError: other rows stand in the shard's place.
    """
    rows = [
        {"uri": uri, "etag": etag, "model_id": model_id, **asdict(prediction)}
        for uri, etag, prediction in zip(uris, etags, predictions, strict=True)
    ]
    schema = SCHEMA.with_metadata({"fruitray.plan": plan.hash, "fruitray.shard": str(shard)})
    key = part_key(shard)
    if _create(out, plan, key, parquet(pa.Table.from_pylist(rows, schema))):
        return True
    standing = _open(out.uri_of(key), out.read(key))
    _require_shard(out.uri_of(key), standing, plan, shard, uris, etags)
    return False


def finish(out: Storage, plan: Plan, root: str) -> list[Part]:
    """Check that every shard is committed, write the manifest, then `_SUCCESS`. Answers what is in each part.

    `root` is the URI of the images, below which the inputs were listed.

    Raises:
        TryAgainError: shards are missing.
        OutputConflictError: a part does not hold what was planned.
    """
    missing = set(range(plan.shards)) - committed_shards(out, plan)
    if missing:
        raise TryAgainError(out.uri, f"{len(missing)} of {plan.shards} shards are not scored yet: run score again")
    parts = _check_parts(out, plan, root)
    manifest = _manifest(plan, parts)
    _create(out, plan, MANIFEST, manifest)
    if out.read(MANIFEST) != manifest:
        raise OutputConflictError(out.uri_of(MANIFEST), "does not describe these parts")
    _create(out, plan, SUCCESS, b"")
    return parts


def is_finished(out: Storage) -> bool:
    """Whether the output is complete and sealed."""
    return out.exists(SUCCESS)


def read_manifest(out: Storage) -> list[Part]:
    """What a finished output says is in each part."""
    try:
        return [Part(**part) for part in json.loads(out.read(MANIFEST))["parts"]]
    except (ValueError, TypeError, KeyError) as error:
        raise OutputConflictError(out.uri_of(MANIFEST), "is no manifest of this program") from error


def verify(out: Storage) -> list[Part]:
    """Prove a finished output: every planned input has exactly one row, every part has the manifest's hash.

    Raises:
        TryAgainError: it is not finished.
        OutputConflictError: it is not what it says.
    """
    if not out.exists(PLAN):
        raise NotFoundError(out.uri_of(PLAN), "score has not written here")
    if not is_finished(out):
        raise TryAgainError(out.uri, f"has no {SUCCESS}: run score again to finish it")
    plan = read_plan(out)
    missing = set(range(plan.shards)) - committed_shards(out, plan)
    if missing:
        raise OutputConflictError(out.uri_of(part_key(min(missing))), "is missing")
    parts = _check_parts(out, plan, str(plan.settings.get("images")))
    said = {part.key: part for part in read_manifest(out)}
    for part in parts:
        if said.get(part.key) != part:
            raise OutputConflictError(out.uri_of(part.key), "is not what the manifest says")
    if out.read(MANIFEST) != _manifest(plan, parts):
        raise OutputConflictError(out.uri_of(MANIFEST), "does not describe these parts")
    return parts


def _manifest(plan: Plan, parts: Sequence[Part]) -> bytes:
    return _json({"plan": plan.hash, "rows": plan.rows, "parts": [asdict(part) for part in parts]})


def _check_parts(out: Storage, plan: Plan, root: str) -> list[Part]:
    def check(shard: int, entries: list[Entry]) -> Part:
        key = part_key(shard)
        data = out.read(key)
        table = _open(out.uri_of(key), data)
        uris, etags = [f"{root}/{entry.key}" for entry in entries], [entry.etag for entry in entries]
        _require_shard(out.uri_of(key), table, plan, shard, uris, etags)
        predicted, codes = table["label"].to_pylist(), table["error_code"].to_pylist()
        return Part(
            key,
            table.num_rows,
            hashlib.sha256(data).hexdigest(),
            _counts(predicted),
            _counts(codes),
            _confusion(plan, entries, predicted),
        )

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(check, range(plan.shards), read_inputs(out, plan)))


def _counts(names: Sequence[str | None]) -> dict[str, int]:
    counts = Counter(name for name in names if name is not None)
    return dict(sorted(counts.items()))


def _confusion(plan: Plan, entries: Sequence[Entry], predicted: Sequence[str | None]) -> dict[str, dict[str, int]]:
    found: dict[str, list[str | None]] = {}
    for entry, label in zip(entries, predicted, strict=True):
        if (folder := label_of(entry.key)) in plan.settings.get("classes", ()):
            found.setdefault(str(folder), []).append(label)
    return {folder: _counts(labels) for folder, labels in sorted(found.items())}


def _open(uri: str, data: bytes) -> pa.Table:
    try:
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:  # OSError is Arrow's word for many kinds of damage
        raise OutputConflictError(uri, "is no Parquet file, or a damaged one") from error


def _require_shard(
    uri: str, table: pa.Table, plan: Plan, shard: int, uris: Sequence[str], etags: Sequence[str]
) -> None:
    metadata = table.schema.metadata or {}
    if metadata.get(b"fruitray.plan") != plan.hash.encode():
        raise OutputConflictError(uri, "belongs to another plan")
    if metadata.get(b"fruitray.shard") != str(shard).encode():
        raise OutputConflictError(uri, "holds another shard")
    if table.schema.names != SCHEMA.names or table["uri"].to_pylist() != list(uris):
        raise OutputConflictError(uri, "does not hold exactly the planned inputs")
    if table["etag"].to_pylist() != list(etags):
        raise OutputConflictError(uri, "holds other versions of its inputs than were planned")
    if set(table["model_id"].to_pylist()) != {plan.settings["model_id"]}:
        raise OutputConflictError(uri, "holds rows of another model")


def _create(out: Storage, plan: Plan, key: str, data: bytes) -> bool:
    """Create-only, as far as the store allows."""
    if not plan.created_atomically and out.exists(key):
        return False
    return out.create(key, data)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
