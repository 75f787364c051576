"""What a run has written, and where: what lies in the places that are given, and what those say they were made from."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fruitray import status
from fruitray.errors import FruitrayError
from fruitray.storage import Storage, open_file, open_storage

SIGNS = {
    "prepare": "index.parquet",
    "tune": "trials.parquet",
    "train": "package.json",
    "score": "_fruitray/plan.json",
}
"""Each job whose output can be shown, and the file by which it is known."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one job wrote."""

    job: str
    storage: Storage
    options: dict[str, Any] = field(default_factory=dict)
    """As the job keeps them in JOB.json; in groups, as `model` and `fit`."""
    status: dict[str, Any] = field(default_factory=dict)

    def json(self, key: str) -> Any:
        """What the file `key` says; None where there is none, or none that can be read."""
        return _json(self.storage, key)


def find_outputs(places: list[str]) -> dict[str, Output]:
    """By job, the first output of each that lies in `places`, in folders directly below them, or that one of those was
    made from."""
    found: dict[str, Output] = {}
    waiting = [storage for place in places for storage in _with_folders(open_storage(place))]
    while waiting:
        storage = waiting.pop(0)
        for job in SIGNS.keys() - found.keys():
            if _holds(storage, SIGNS[job]):
                options = _json(storage, f"{job}.json") or {}
                found[job] = Output(job, storage, options, _json(storage, status.KEY) or {})
                waiting += _made_from(options)
    return {job: found[job] for job in SIGNS if job in found}


def _with_folders(storage: Storage) -> list[Storage]:
    return [storage, *(open_storage(storage.uri_of(name)) for name in storage.folders())]


def _made_from(options: dict[str, Any]) -> list[Storage]:
    """Where the job with these options took what it needed from."""
    named = [options.get(name) for name in ("package", "index", "config")]
    places = [place for place in named if isinstance(place, str)]
    return [open_file(place)[0] if place.endswith((".parquet", ".json")) else open_storage(place) for place in places]


def _holds(storage: Storage, key: str) -> bool:
    with suppress(FruitrayError):
        return storage.exists(key)
    return False


def _json(storage: Storage, key: str) -> Any:
    with suppress(FruitrayError, ValueError):
        return json.loads(storage.read(key))
    return None
