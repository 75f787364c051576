"""The workers of score: a shard in, its rows committed, their counts out."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from ray import ObjectRef

from fruitray.backbones import reserved_device
from fruitray.cluster.connection import connect
from fruitray.cluster.placement import cpus_per_gpu, say_who_waits, worker_count
from fruitray.cluster.runtime import stream
from fruitray.commit import commit, read_plan
from fruitray.config import ScoreConfig
from fruitray.console import progress, say
from fruitray.engines import EngineName
from fruitray.errors import ImageError, OutputConflictError, TryAgainError
from fruitray.images import fetch
from fruitray.inputs import INPUTS, LISTS, entries, uris
from fruitray.isolate import RGB, IsolatedPool
from fruitray.machine import versions
from fruitray.package import load_package
from fruitray.predictor import Predictor, Square
from fruitray.reuse import Earlier
from fruitray.scores import score_rows
from fruitray.storage import Entry, LocalStorage, Storage, open_storage

BURST = 64
"""Photos that a worker without a GPU decodes before it computes."""
GIVE_UP = 8
"""Shards that fail one after the other before a job does: then it is hardly single photos, and each takes its time."""
WARM_UP = 8
"""Photos that a worker of a dry run reads before its clock starts: clients and decoders take a while to get going."""
AT_ONCE = 2
"""Shards that a worker has in hand: one is computed, the one before it written or the next one's photos fetched."""
STAGES = ("photos", "network", "commit")
"""What a worker spends its time on: waiting for photos to be fetched and decoded, computing, writing."""


@dataclass(slots=True)
class Work:
    """What workers have done so far."""

    rows: int = 0
    scored: int = 0
    """Rows that were not taken from an earlier output."""
    errors: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    """Of all workers together, by stage."""

    def add(self, result: Mapping[str, Any]) -> None:
        """Count a worker's answer in."""
        self.rows += result["rows"]
        self.scored += result["scored"]
        self.errors += result["errors"]
        self.seconds.update({stage: result[stage] for stage in STAGES})


def score_shards(config: ScoreConfig, shards: Sequence[ObjectRef], photos: int, engine: EngineName) -> Work:
    """Have workers score `shards`, of so many photos, and commit them unless it is a dry run. Each is a table of
    `INPUTS` and of the `part` that is to hold its rows, which workers fetch by themselves.

    Raises:
        TryAgainError: some could not be scored now; unless `GIVE_UP` in a row could not, all others are.
    """
    connect()
    workers = min(worker_count(config.workers, gpu=config.gpu), len(shards))
    cpus = cpus_per_gpu() if config.gpu else 1
    work, failed, in_a_row, engines = Work(), list[list[str]](), 0, set[str]()
    if not config.dry_run:  # which has said it
        say_who_waits("score", workers, cpus=cpus, gpus=int(config.gpu))
    numbers = [pa.table({"shard": [number]}) for number in range(len(shards))]
    with progress("score", photos, "photos") as advance:
        for result in stream(
            numbers,
            Scorer,
            fn_constructor_args=(config, engine, cpus, shards),
            compute=ray.data.ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=AT_ONCE,
                max_concurrent_calls_per_actor=AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=cpus,
            num_gpus=1 if config.gpu else 0,
        ):
            for answer in result.to_pylist():
                if answer["failed"]:
                    if not failed:
                        say(f"score: {': '.join(answer['failed'])}; its shard waits, the others go on")
                    failed.append(answer["failed"])
                    in_a_row += 1
                    continue
                in_a_row = 0
                if answer["engine"] not in engines:
                    engines.add(answer["engine"])
                    say(f"score: {workers} workers, {answer['engine']}")
                work.add(answer)
                advance(answer["rows"], f"{work.errors:,} errors" if work.errors else "")
            if in_a_row >= GIVE_UP:
                break
        if failed:
            uri, reason = failed[0]
            raise TryAgainError(uri, f"{reason}; {len(failed)} shards wait, the same command scores what is left")
    if work.errors:
        say(f"score: {work.errors} photos could not be read; their rows say why")
    return work


_ANSWER = pa.schema(
    [
        *((name, pa.int64()) for name in ("rows", "scored", "errors")),
        ("engine", pa.string()),
        *((stage, pa.float64()) for stage in STAGES),
        ("failed", pa.list_(pa.string())),
    ]
)
"""What a worker says of a shard; `failed` is empty, or the URI and the reason of why it could not be scored now."""


class Scorer:
    """One worker: the number of a shard in, its rows committed, their counts out. `AT_ONCE` threads may call it."""

    def __init__(self, config: ScoreConfig, engine: EngineName, cpus: int, shards: Sequence[ObjectRef] = ()) -> None:
        torch.set_num_threads(1)
        reserved_device(gpu=config.gpu)
        self._shards = shards
        self._config, self._package = config, load_package(config.package)
        self._predictor = Predictor(
            self._package,
            top_k=config.top_k,
            batch_size=config.batch_size,
            gpu=config.gpu,
            engine=engine,
            full_precision=config.full_precision,
            embeddings=config.embeddings,
        )
        self._decoders = IsolatedPool(f"{RGB}:{self._predictor.enough}", cpus)
        self._turn = threading.Lock()
        """Held by the thread that decodes and computes."""
        self._storages: dict[str, Storage] = {}
        self._folders = {open_storage(place).uri for place in config.images if not place.endswith(LISTS)}
        self._earlier = Earlier(config.previous) if config.previous else None
        if config.dry_run:
            return
        self._out = open_storage(config.out)
        self._plan = read_plan(self._out)
        if self._package.model_id != self._plan.settings["model_id"]:
            raise OutputConflictError(config.package, "is not the model that was planned: it was replaced meanwhile")
        if self._earlier:
            self._earlier.require(self._plan.settings)  # it may have been replaced, too

    def __call__(self, task: pa.Table) -> pa.Table:
        return self.score(ray.get(self._shards[task["shard"][0].as_py()]))

    def score(self, shard: pa.Table) -> pa.Table:
        """One row of `_ANSWER`: what became of the shard."""
        try:
            answer = {**self._score(shard), "failed": []}
        except TryAgainError as error:
            answer = {"failed": [error.uri, error.reason]}
        return pa.Table.from_pylist([answer], _ANSWER)

    def _score(self, shard: pa.Table) -> dict[str, Any]:
        if self._config.dry_run:
            with self._turn:
                self._predictor.predict_squares(self._squares(self._contents(shard.slice(0, WARM_UP))))
        inputs, part = shard.select(INPUTS.names), shard["part"][0].as_py()
        fresh = inputs.filter(pc.is_null(inputs["known_part"]))
        contents = self._contents(fresh)
        first = list(islice(contents, 1))  # fetched, as are those that follow it, while another shard is computed
        with self._turn:
            start, computed = time.perf_counter(), self._predictor.seconds
            predictions = self._predictor.predict_squares(self._squares(chain(first, contents)))
            network, predicted = self._predictor.seconds - computed, time.perf_counter()
        if not self._config.dry_run:
            rows = score_rows(fresh, predictions, self._package.model_id, embeddings=self._config.embeddings)
            rows = self._with_known(inputs, rows)
            commit(self._out, self._plan, part, inputs, rows, self._lineage(inputs))
        return {
            "rows": inputs.num_rows,
            "scored": fresh.num_rows,
            "errors": sum(prediction.status == "error" for prediction in predictions),
            "engine": self._predictor.engine.name,
            "photos": predicted - start - network,
            "network": network,
            "commit": time.perf_counter() - predicted,
        }

    def _with_known(self, inputs: pa.Table, rows: pa.Table) -> pa.Table:
        """`rows`, and those that an earlier output has, in the order of `inputs`."""
        known = inputs.filter(pc.is_valid(inputs["known_part"]))
        if self._earlier is None or not known.num_rows:
            return rows
        together = pa.concat_tables([rows, self._earlier.rows(known).cast(rows.schema)])
        return together.take(pc.index_in(uris(inputs), together["uri"]))

    def _lineage(self, inputs: pa.Table) -> dict[str, str]:
        """What a part says of its origin, besides the plan."""
        package = self._package
        said = {
            "model_id": package.model_id,
            "package": package.uri,
            "classes": json.dumps(package.classes),
            "preprocessing": json.dumps(package.description["preprocessing"]),
            "engine": self._predictor.engine.name,
            "versions": json.dumps(versions()),
        }
        if known := inputs.num_rows - inputs["known_part"].null_count:
            said["previous"] = json.dumps({"uri": self._config.previous, "rows": known})
        return {f"fruitray.{name}": value for name, value in said.items()}

    def _squares(self, contents: Iterator[bytes | ImageError]) -> Iterator[Square | ImageError]:
        """Decoded in processes of their own."""
        if self._config.gpu:
            yield from self._decode(contents)
        else:  # one core does it all, and is slower when it goes to and fro
            while burst := list(self._decode(islice(contents, BURST))):
                yield from burst

    def _contents(self, inputs: pa.Table) -> Iterator[bytes | ImageError]:
        for root, rows in groupby(entries(inputs), itemgetter(0)):
            yield from self._fetched(root, [entry for _, entry in rows])

    def _fetched(self, root: str, wanted: Sequence[Entry]) -> Iterator[bytes | ImageError]:
        if root not in self._storages:
            self._storages[root] = open_storage(root)
        storage, gone = self._storages[root], False
        for found in fetch(storage, wanted):
            gone |= isinstance(found, ImageError) and found.code == "E_SRC_GONE"
            yield found
        seen = isinstance(storage, LocalStorage) and any(entry.etag for entry in wanted)  # by who planned
        if gone and (seen or root in self._folders):
            storage.check_again()

    def _decode(self, contents: Iterable[bytes | ImageError]) -> Iterator[Square | ImageError]:
        def square(found: Mapping[str, Any]) -> Square:
            return self._predictor.square(found["pixels"].transpose(2, 0, 1), found["width"], found["height"])

        return self._decoders.map(contents, square)
