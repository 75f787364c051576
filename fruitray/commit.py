"""Scored shards, exactly once: kill anything, run the same command again, and every planned input has one row.

    write_plan -> commit (per shard) -> finish; verify proves it at any later time

    _fruitray/plan/inputs-HASH.parquet   the inputs: part, root, key, size, etag, ...; named by its content
    _fruitray/plan.json                  create-only: settings, inputs file, shard and row counts
    data/part-000123.parquet             create-only: the rows of shard 123; or data/folder=NAME/part-000123.parquet
    manifest.json, _SUCCESS              rows, SHA-256 and error counts per part; then the seal

Nothing is renamed, deleted or overwritten. Where a store ignores `If-None-Match` (`Storage.creates_once` finds out),
what exists is looked for before each write instead: as safe for one job at a time, killed and re-run as often as you
like, but two *different* jobs that race for one output could then mix their files; `verify` would tell.
"""

import hashlib
import itertools
import json
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from fruitray.errors import NotFoundError, OutputConflictError, TryAgainError, UsageError
from fruitray.inputs import INPUTS, uris
from fruitray.scores import schema
from fruitray.storage import Storage, is_hidden
from fruitray.tables import parquet, read_parquet

PLAN, MANIFEST, SUCCESS, PROBE = "_fruitray/plan.json", "manifest.json", "_SUCCESS", "_fruitray/probe"
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""Folder of what has no label."""
MAX_FOLDER = 240
"""Bytes of a label in a folder's name, escaped; most file systems take 255 in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be scored and how. Two jobs with equal `settings` share one plan; the first one's inputs hold."""

    settings: dict[str, Any]
    """All that decides a row: places of the images, model id, top_k, engine, ...; and the `classes` of the model."""
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
    """Rows per label that was known before, of those that are classes, and in each per predicted label."""


def write_plan(
    out: Storage, settings: dict[str, Any], inputs: pa.Table, shard_rows: int, *, partitioned: bool = False
) -> Plan:
    """Plan to score `inputs` (`INPUTS`, at least one) with `settings`, or adopt what an equal job planned before.
    `partitioned`: no shard holds photos of two labels, and its part lies in a folder named after its own.

    Raises:
        OutputConflictError: `out` holds the plan of another job.
        UsageError: a label is too long to name a folder.
    """
    planned = _sharded(inputs, shard_rows, partitioned=partitioned)
    data = parquet(planned)
    key = _inputs_key(data)
    out.create(key, data)
    plan = Plan(
        settings=settings,
        inputs=key,
        rows=inputs.num_rows,
        shards=len(planned["part"].unique()),
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


def _sharded(inputs: pa.Table, shard_rows: int, *, partitioned: bool) -> pa.Table:
    """`inputs` with the key of the part that each goes to."""
    if partitioned:
        inputs = inputs.take(pc.sort_indices(inputs["label"].combine_chunks()))  # a stable sort: by URI within
        for label in inputs["label"].unique().to_pylist():
            if len(quote(label or "", safe="")) > MAX_FOLDER:
                raise UsageError(f"--partition-by folder: {label!r} is too long for a folder's name")
    folders = inputs["label"].to_pylist() if partitioned else [None] * inputs.num_rows
    parts: list[str] = []
    numbers = itertools.count()
    for folder, rows in itertools.groupby(folders):
        left = len(list(rows))
        while left > 0:
            key = part_key(next(numbers), (folder or HIVE_NULL) if partitioned else None)
            parts += [key] * min(shard_rows, left)
            left -= shard_rows
    return inputs.add_column(0, "part", pa.array(parts, pa.string()))


def part_key(number: int, folder: str | None = None) -> str:
    """Where the rows of a shard lie; with `folder` as Hive, and all who read its layout, would have it."""
    place = f"data/folder={quote(folder, safe='')}/" if folder else "data/"
    return f"{place}part-{number:06d}.parquet"


def read_shards(out: Storage, plan: Plan) -> dict[str, pa.Table]:
    """The planned inputs (`INPUTS`) of each shard, in order, by the key of its part.

    Raises:
        OutputConflictError: the inputs file is not the one that was planned.
    """
    data = out.read(plan.inputs)
    if plan.inputs != _inputs_key(data):
        raise OutputConflictError(out.uri_of(plan.inputs), "is not what was planned")
    table = read_parquet(out.uri_of(plan.inputs), data)
    if table.column_names != ["part", *INPUTS.names]:
        raise OutputConflictError(out.uri_of(plan.inputs), "was planned by another version of fruitray")
    runs = pc.run_end_encode(table["part"].combine_chunks())
    ends, inputs = runs.run_ends.to_pylist(), table.select(INPUTS.names)
    slices = [inputs.slice(start, end - start) for start, end in itertools.pairwise([0, *ends])]
    return dict(zip(runs.values.to_pylist(), slices, strict=True))


def _inputs_key(data: bytes) -> str:
    return f"_fruitray/plan/inputs-{hashlib.sha256(data).hexdigest()[:32]}.parquet"


def committed(out: Storage, shards: Container[str]) -> set[str]:
    """Which of the `shards` are done. Folder markers and hidden files (a file manager's) do not count.

    Raises:
        OutputConflictError: something lies in `data/` that is none of them.
    """
    found = {entry.key for entry in out.list("data/") if not is_hidden(entry.key)}
    if strangers := sorted(key for key in found if key not in shards):
        raise OutputConflictError(out.uri_of(strangers[0]), "is no part of this plan")
    return found


def commit(
    out: Storage, plan: Plan, key: str, inputs: pa.Table, rows: pa.Table, lineage: Mapping[str, str] | None = None
) -> bool:
    """Write the `rows` of the shard `key` at once or not at all; False if they were committed before (by a lost self or
    a twin). `lineage` says in the file's schema where they come from.

    Raises:
        OutputConflictError: other rows stand in the shard's place.
    """
    marks = {**(lineage or {}), "fruitray.plan": plan.hash, "fruitray.shard": key}
    if _create(out, plan, key, parquet(rows.replace_schema_metadata(marks))):
        return True
    _require_shard(out.uri_of(key), read_parquet(out.uri_of(key), out.read(key)), plan, key, inputs)
    return False


def finish(out: Storage, plan: Plan) -> list[Part]:
    """Check that every shard is committed, write the manifest, then `_SUCCESS`. Answers what is in each part.

    Raises:
        TryAgainError: shards are missing.
        OutputConflictError: a part does not hold what was planned.
    """
    shards = read_shards(out, plan)
    missing = len(shards) - len(committed(out, shards))
    if missing:
        raise TryAgainError(out.uri, f"{missing} of {plan.shards} shards are not scored yet: run score again")
    parts = _check_parts(out, plan, shards)
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
    shards = read_shards(out, plan)
    missing = shards.keys() - committed(out, shards)
    if missing:
        raise OutputConflictError(out.uri_of(min(missing)), "is missing")
    parts = _check_parts(out, plan, shards)
    said = {part.key: part for part in read_manifest(out)}
    for part in parts:
        if said.get(part.key) != part:
            raise OutputConflictError(out.uri_of(part.key), "is not what the manifest says")
    if out.read(MANIFEST) != _manifest(plan, parts):
        raise OutputConflictError(out.uri_of(MANIFEST), "does not describe these parts")
    return parts


def _manifest(plan: Plan, parts: Sequence[Part]) -> bytes:
    return _json({"plan": plan.hash, "rows": plan.rows, "parts": [asdict(part) for part in parts]})


def _check_parts(out: Storage, plan: Plan, shards: Mapping[str, pa.Table]) -> list[Part]:
    def check(key: str) -> Part:
        data = out.read(key)
        table = read_parquet(out.uri_of(key), data)
        _require_shard(out.uri_of(key), table, plan, key, shards[key])
        labels, codes = _counts(table["label"]), _counts(table["error_code"])
        confusion = _confusion(plan, shards[key]["label"], table["label"])
        return Part(key, table.num_rows, hashlib.sha256(data).hexdigest(), labels, codes, confusion)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(check, shards))


def _counts(names: pa.ChunkedArray) -> dict[str, int]:
    found = pc.value_counts(names.drop_null())
    return dict(sorted(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)))


def _confusion(plan: Plan, known: pa.ChunkedArray, predicted: pa.ChunkedArray) -> dict[str, dict[str, int]]:
    classes = sorted(plan.settings.get("classes", ()))
    found = {before: predicted.filter(pc.equal(known, before)) for before in classes}
    return {before: _counts(labels) for before, labels in found.items() if len(labels)}


def _require_shard(uri: str, table: pa.Table, plan: Plan, key: str, inputs: pa.Table) -> None:
    metadata = table.schema.metadata or {}
    if metadata.get(b"fruitray.plan") != plan.hash.encode():
        raise OutputConflictError(uri, "belongs to another plan")
    if metadata.get(b"fruitray.shard") != key.encode():
        raise OutputConflictError(uri, "holds another shard")
    names = schema(embeddings=bool(plan.settings.get("embeddings"))).names
    if table.schema.names != names or not table["uri"].equals(pa.chunked_array([uris(inputs)])):
        raise OutputConflictError(uri, "does not hold exactly the planned inputs")
    if not table["etag"].equals(inputs["etag"]):
        raise OutputConflictError(uri, "holds other versions of its inputs than were planned")
    if table["model_id"].unique().to_pylist() != [plan.settings["model_id"]]:
        raise OutputConflictError(uri, "holds rows of another model")


def _create(out: Storage, plan: Plan, key: str, data: bytes) -> bool:
    """Create-only, as far as the store allows."""
    if not plan.created_atomically and out.exists(key):
        return False
    return out.create(key, data)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
