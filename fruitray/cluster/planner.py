"""Of score, what needs all inputs at once: list and plan them, hand out what is left, prove that none is missing.

Each is a task beside the driver, which holds references and counts, so its memory hardly grows with the inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc

from fruitray.commit import Part, Plan, committed, finish, read_plan, read_shards, write_plan
from fruitray.config import ScoreConfig
from fruitray.errors import AccessDeniedError, ImageError, NoInputError, TryAgainError
from fruitray.images import fetch
from fruitray.inputs import INPUTS, entries, list_inputs
from fruitray.reuse import Earlier
from fruitray.storage import open_storage

TRIED = 3
"""Photos that are read before a plan is written."""


def look(config: ScoreConfig, settings: Mapping[str, Any]) -> Iterator[dict[str, int] | pa.Table]:
    """Counts of what is to be scored, then all of it (`INPUTS`); of those that `--previous` knows, where it has them.

    Raises:
        NoInputError: there is none.
        AccessDeniedError: their names may be listed, but not one of some may be read.
        UsageError: `--previous` is of another model, or of other settings.
    """
    inputs, skipped = list_inputs(config.images, config.split)
    if not inputs.num_rows:
        lacking = {"reason": f"has no photo of the split {config.split}"} if config.split else {}
        raise NoInputError(" ".join(config.images), **lacking)
    _require_readable(inputs)
    if config.previous:
        earlier = Earlier(config.previous)
        earlier.require(settings)
        inputs = earlier.mark(inputs, retry_errors=config.retry_errors)
    known = inputs.num_rows - inputs["known_part"].null_count
    size = pc.sum(inputs["size"]).as_py()
    yield {"photos": inputs.num_rows, "bytes": size, "skipped_hidden": skipped, "known": known}
    yield inputs


def _require_readable(inputs: pa.Table) -> None:
    some = inputs.take([number * (inputs.num_rows - 1) // (TRIED - 1) for number in range(TRIED)])
    with suppress(TryAgainError):  # what cannot be had just now, workers try again
        for root, rows in groupby(entries(some), itemgetter(0)):
            refused = [found for found in fetch(open_storage(root), [entry for _, entry in rows]) if _is_refused(found)]
            if len(refused) == TRIED:
                raise AccessDeniedError(root, f"files may be listed but not read: {refused[0].detail}")


def _is_refused(found: bytes | ImageError) -> TypeGuard[ImageError]:
    return isinstance(found, ImageError) and found.code == "E_SRC_DENIED"


def plan(config: ScoreConfig, settings: dict[str, Any], shard_rows: int, inputs: pa.Table) -> Plan:
    """See `write_plan`."""
    out = open_storage(config.out)
    return write_plan(out, settings, inputs, shard_rows, partitioned=config.partition_by == "folder")


def hand_out(out: str) -> Iterator[dict[str, int] | pa.Table]:
    """Counts of what is planned at `out`, shards `done` and the `rows` of others; then each of those, a table of
    `INPUTS` and the `part` that is to hold its rows."""
    storage = open_storage(out)
    shards = read_shards(storage, read_plan(storage))
    done = committed(storage, shards)
    left = [key for key in shards if key not in done]
    yield {"done": len(done), "rows": sum(shards[key].num_rows for key in left)}
    for key in left:
        yield _task(shards[key], key)


def probe(each: int, workers: int, *inputs: pa.Table) -> Iterator[int | pa.Table]:
    """How many of `inputs` no earlier output knows; then for each of the workers up to `each` of them, as a shard."""
    table = pa.concat_tables([INPUTS.empty_table(), *(table.select(INPUTS.names) for table in inputs)])
    table = table.filter(pc.is_null(table["known_part"]))
    yield (photos := table.num_rows)
    if not photos:
        return
    workers = min(workers, photos)
    count = min(photos, workers * each)
    some = table.take([number * photos // count for number in range(count)])
    for number in range(workers):
        yield _task(some.take(list(range(number, count, workers))), str(number))


def _task(inputs: pa.Table, part: str) -> pa.Table:
    return inputs.append_column("part", pa.array([part] * inputs.num_rows, pa.string()))


def seal(out: str) -> list[Part]:
    """See `finish`."""
    storage = open_storage(out)
    return finish(storage, read_plan(storage))
