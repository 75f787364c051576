"""What a run has written, and where: what lies in the places that are given, and what those say they were made from."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from fruitray import status
from fruitray.errors import FruitrayError
from fruitray.storage import Storage, open_file, open_storage
from fruitray.tables import read_parquet

SIGNS = {
    "prepare": "index.parquet",
    "tune": "trials.parquet",
    "train": "package.json",
    "score": "_fruitray/plan.json",
}
"""Each job whose output can be shown, and the file by which it is known."""


@dataclass(frozen=True)
class Output:
    """What one job wrote."""

    job: str
    storage: Storage
    options: dict[str, Any] = field(default_factory=dict)
    """As the job keeps them in JOB.json; in groups, as `model` and `fit`."""
    status: dict[str, Any] = field(default_factory=dict)

    @cached_property  # of an index that may be large, and that several sections ask for
    def sha256(self) -> str:
        """Of the file by which it is known: it names this index, or this model."""
        return hashlib.sha256(self.storage.read(SIGNS[self.job])).hexdigest()

    def json(self, key: str) -> dict[str, Any]:
        """What the file `key` says; empty where there is none, or none that says anything."""
        return _json(self.storage, key)

    def table(self, key: str, columns: list[str] | None = None) -> pa.Table:
        """The Parquet file `key`, all of it or these columns."""
        return read_parquet(self.storage.uri_of(key), self.storage.read(key), columns)


def find_outputs(places: Sequence[str]) -> dict[str, Output]:
    """By job, one output of each: what those of later jobs were made from, else the first that lies in `places` or in a
    folder directly below one."""
    around = [storage for place in places for storage in _with_folders(open_storage(place))]
    found: dict[str, Output] = {}
    for job in reversed(SIGNS):
        named = [place for output in found.values() for place in _made_from(output.options)]
        if storage := next((storage for storage in [*named, *around] if _is_output(job, storage)), None):
            found[job] = Output(job, storage, _json(storage, f"{job}.json"), _json(storage, status.KEY))
    return {job: found[job] for job in SIGNS if job in found}


def _with_folders(storage: Storage) -> list[Storage]:
    return [storage, *(open_storage(storage.uri_of(name)) for name in storage.folders())]


def _made_from(options: dict[str, Any]) -> list[Storage]:
    """Where the job with these options took what it needed from."""
    named = [options.get(name) for name in ("package", "index", "config")]
    places = [place for place in named if isinstance(place, str)]
    return [open_file(place)[0] if place.endswith((".parquet", ".json")) else open_storage(place) for place in places]


def _is_output(job: str, storage: Storage) -> bool:
    with suppress(FruitrayError):
        strangers = job == "train" and "classes" not in _json(storage, SIGNS[job])  # others have a package.json, too
        return storage.exists(SIGNS[job]) and not strangers
    return False


def _json(storage: Storage, key: str) -> dict[str, Any]:
    with suppress(FruitrayError, ValueError):
        said = json.loads(storage.read(key))
        return said if isinstance(said, dict) else {}
    return {}
