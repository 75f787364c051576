"""score: plan, predict shard by shard on the cluster, commit each shard once, seal the output."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from fruitray.cluster.runtime import connect, open_output, stream, worker_count
from fruitray.commit import (
    PLAN,
    Part,
    Plan,
    adopt_plan,
    commit,
    committed,
    finish,
    is_finished,
    read_manifest,
    read_plan,
    read_shards,
    write_plan,
)
from fruitray.config import ScoreConfig, to_json
from fruitray.console import progress, say, show_table
from fruitray.engines import pick_engine
from fruitray.errors import ImageError, NoInputError, OutputConflictError, TooManyBadImagesError
from fruitray.images import fetch
from fruitray.inputs import INPUTS, entries, list_inputs, uris
from fruitray.isolate import RGB, IsolatedPool
from fruitray.metrics import summary
from fruitray.package import Package, load_package, versions
from fruitray.predictor import Predictor, Square
from fruitray.reuse import Earlier
from fruitray.scores import score_rows
from fruitray.storage import Storage, open_storage

METRICS = "metrics.json"
DECIDING = (
    "top_k",
    "embeddings",
    "partition_by",
    "shard_rows",
    "batch_size",
    "full_precision",
    "previous",
    "retry_errors",
)
"""Options that decide what stands in the output."""
BURST = 64
"""Photos that a worker without a GPU decodes before it computes."""
PROBED = 64
"""Photos that a dry run scores, per worker."""


@dataclass(slots=True)
class Work:
    """What workers have done so far."""

    rows: int = 0
    errors: int = 0
    engine: str = ""
    seconds: Counter[str] = field(default_factory=Counter)
    """Of all workers together, by stage."""

    def add(self, result: Mapping[str, Any]) -> None:
        """Count a worker's answer in."""
        self.rows += result["rows"]
        self.errors += result["errors"]
        self.engine = result["engine"]
        self.seconds.update({stage: result[stage] for stage in STAGES})


STAGES = ("photos", "network", "commit")
"""What a worker spends its time on: waiting for photos to be fetched and decoded, computing, writing."""


def run(config: ScoreConfig) -> str:
    """Score what is not scored yet, write the manifest and `_SUCCESS`; show the rows by status and by label."""
    start = time.perf_counter()
    out = _open_output(config)
    package = load_package(config.package)
    if config.dry_run:
        return _dry_run(config, package)
    plan = _plan(config, package, out)
    if is_finished(out):
        return _summary(config, out, plan, read_manifest(out), "was complete already")
    shards = read_shards(out, plan)
    done = committed(out, shards)
    left = {key: inputs for key, inputs in shards.items() if key not in done}
    if done:
        say(f"score: {len(done)} of {plan.shards} shards were committed before")
    work = _score(config, left, plan.settings["engine"]) if left else Work()
    parts = finish(out, plan)
    return _summary(config, out, plan, parts, _speed(config, work, time.perf_counter() - start))


def _open_output(config: ScoreConfig) -> Storage:
    out = open_output(config.out)
    for place in config.images:
        out = open_output(config.out, open_storage(place))
    return out


def _settings(config: ScoreConfig, package: Package) -> dict[str, Any]:
    """All that decides a row, but for the engine."""
    known = {"images": list(config.images), "model_id": package.model_id, "classes": list(package.classes)}
    return known | {name: getattr(config, name) for name in DECIDING}


def _plan(config: ScoreConfig, package: Package, out: Storage) -> Plan:
    """Adopt the plan that stands, or list the inputs and write one."""
    settings = _settings(config, package)
    if out.exists(PLAN):
        standing = read_plan(out).settings.get("engine")
        if plan := adopt_plan(out, settings | {"engine": standing if config.engine == "auto" else config.engine}):
            return plan
    inputs, skipped = _inputs(config)
    settings["engine"] = _engine(config, inputs.num_rows)
    if config.previous:
        earlier = Earlier(config.previous)
        earlier.require(settings)
        inputs = earlier.mark(inputs, retry_errors=config.retry_errors)
        known = inputs.num_rows - inputs["known_part"].null_count
        say(f"score: {known:,} of {inputs.num_rows:,} rows are taken from {config.previous}")
    plan = write_plan(out, settings, inputs, config.shard_rows, partitioned=config.partition_by == "folder")
    out.create("score.json", to_json(config))
    say(f"score: {plan.rows:,} photos in {plan.shards} shards planned; hidden files skipped: {skipped}")
    if not plan.created_atomically:
        say(
            f"score: warning: {out.uri} ignores If-None-Match, so nothing stops two different jobs from writing there "
            "at once; one job at a time, killed and re-run at will, is safe"
        )
    return plan


def _inputs(config: ScoreConfig) -> tuple[pa.Table, int]:
    inputs, skipped = list_inputs(config.images)
    if not inputs.num_rows:
        raise NoInputError(" ".join(config.images))
    return inputs, skipped


def _engine(config: ScoreConfig, photos: int) -> str:
    if config.engine != "auto":
        return config.engine
    return pick_engine(photos // (config.workers or os.cpu_count() or 1), gpu=config.gpu)


def _score(config: ScoreConfig, shards: Mapping[str, pa.Table], engine: str) -> Work:
    """Have workers score `shards`, and commit them unless it is a dry run."""
    connect()
    workers = min(worker_count(config.workers, gpu=config.gpu), len(shards))
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // workers) if config.gpu else 1
    work = Work()
    tables = [pa.table({"part": [key], "inputs": [inputs.to_pylist()]}) for key, inputs in shards.items()]
    with progress("score", sum(inputs.num_rows for inputs in shards.values()), "photos") as advance:
        for result in stream(
            tables,
            _Scorer,
            fn_constructor_args=(config, engine, cpus),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=1 if config.gpu else 0,
        ):
            for answer in result.to_pylist():
                if not work.rows:
                    say(f"score: {workers} workers, {answer['engine']}")
                work.add(answer)
                advance(answer["rows"], f"{work.errors:,} errors" if work.errors else "")
    if work.errors:
        say(f"score: {work.errors} photos could not be read; their rows say why")
    return work


class _Scorer:
    """One worker: a shard in, its rows committed, their counts out."""

    def __init__(self, config: ScoreConfig, engine: Any, cpus: int) -> None:
        torch.set_num_threads(1)
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
        self._decoders = IsolatedPool(RGB, cpus)
        self._storages: dict[str, Storage] = {}
        self._earlier: Earlier | None = None
        if config.dry_run:
            return
        self._out = open_storage(config.out)
        self._plan = read_plan(self._out)
        if self._package.model_id != self._plan.settings["model_id"]:
            raise OutputConflictError(config.package, "is not the model that was planned: it was replaced meanwhile")

    def __call__(self, task: pa.Table) -> pa.Table:
        [shard] = task.to_pylist()
        start, computed = time.perf_counter(), self._predictor.seconds
        inputs = pa.Table.from_pylist(shard["inputs"], INPUTS)
        fresh = inputs.filter(pc.is_null(inputs["known_part"]))
        predictions = self._predictor.predict_squares(self._squares(fresh))
        predicted = time.perf_counter()
        if not self._config.dry_run:
            rows = score_rows(fresh, predictions, self._package.model_id, embeddings=self._config.embeddings)
            rows = self._with_known(inputs, rows)
            commit(self._out, self._plan, shard["part"], inputs, rows, _lineage(self._package, self._predictor))
        network = self._predictor.seconds - computed
        answer = {
            "rows": inputs.num_rows,
            "errors": sum(prediction.status == "error" for prediction in predictions),
            "engine": self._predictor.engine.name,
            "photos": predicted - start - network,
            "network": network,
            "commit": time.perf_counter() - predicted,
        }
        return pa.Table.from_pylist([answer])

    def _with_known(self, inputs: pa.Table, rows: pa.Table) -> pa.Table:
        """`rows`, and those that an earlier output has, in the order of `inputs`."""
        known = inputs.filter(pc.is_valid(inputs["known_part"]))
        if not known.num_rows:
            return rows
        if self._earlier is None:
            self._earlier = Earlier(str(self._config.previous))
        together = pa.concat_tables([rows, self._earlier.rows(known).cast(rows.schema)])
        return together.take(pc.index_in(uris(inputs), together["uri"]))

    def _squares(self, inputs: pa.Table) -> Iterator[Square | ImageError]:
        """Fetched, and decoded in processes of their own."""
        for root, rows in groupby(entries(inputs), itemgetter(0)):
            if root not in self._storages:
                self._storages[root] = open_storage(root)
            contents = iter(fetch(self._storages[root], [entry for _, entry in rows]))
            if self._config.gpu:
                yield from self._decode(contents)
            else:  # one core does it all, and is slower when it goes to and fro
                while burst := list(self._decode(islice(contents, BURST))):
                    yield from burst

    def _decode(self, contents: Iterable[bytes | ImageError]) -> Iterator[Square | ImageError]:
        return self._decoders.map(contents, lambda found: self._predictor.square(_pixels(found)))


def _pixels(found: Mapping[str, Any]) -> Any:
    return found["pixels"].transpose(2, 0, 1)


def _lineage(package: Package, predictor: Predictor) -> dict[str, str]:
    """What a part says of its origin, besides the plan."""
    said = {
        "model_id": package.model_id,
        "package": package.uri,
        "classes": json.dumps(package.classes),
        "preprocessing": json.dumps(package.description["preprocessing"]),
        "engine": predictor.engine.name,
        "versions": json.dumps(versions()),
    }
    return {f"fruitray.{name}": value for name, value in said.items()}


# ---- What a person is told


def _dry_run(config: ScoreConfig, package: Package) -> str:
    inputs, skipped = _inputs(config)
    photos, size = inputs.num_rows, sum(inputs["size"].to_pylist())
    engine = _engine(config, photos)
    connect()
    workers = min(worker_count(config.workers, gpu=config.gpu), photos)
    step = max(1, photos // (workers * PROBED))
    probe = inputs.take(list(range(0, photos, step))[: workers * PROBED])
    each = -(-probe.num_rows // workers)
    shards = {str(number): probe.slice(number * each, each) for number in range(workers)}
    start = time.perf_counter()
    work = _score(config, {key: rows for key, rows in shards.items() if rows.num_rows}, engine)
    busy = sum(work.seconds.values()) / workers
    started = time.perf_counter() - start - busy
    seconds = started + busy * photos / work.rows
    say(f"score: {photos:,} photos, {size / 1e6:,.1f} MB; hidden files skipped: {skipped}; nothing was written")
    return f"score: all would take about {_duration(seconds)}{_cost(config, seconds, photos)}, start-up {started:.0f} s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cost(config: ScoreConfig, seconds: float, photos: int) -> str:
    if config.cost_per_hour is None:
        return ""
    cost = config.cost_per_hour * seconds / 3600
    return f" and cost {cost:,.4g}, {1000 * cost / max(photos, 1):,.4g} per 1,000 photos"


def _speed(config: ScoreConfig, work: Work, seconds: float) -> str:
    rate = work.rows / max(seconds, 1e-9)
    stages = ", ".join(f"{stage} {work.seconds[stage]:.1f} s" for stage in STAGES)
    cost = _cost(config, seconds, work.rows)
    return (
        f"{work.rows:,} rows in {seconds:.1f} s, {rate:.1f} images/s, start-up included{cost}; workers' time: {stages}"
    )


def show_rows(parts: Sequence[Part]) -> None:
    """How many rows have each status, with the label or the error code."""
    counts = Counter[tuple[str, str]]()
    for part in parts:
        counts.update({("ok", label): count for label, count in part.labels.items()})
        counts.update({("error", code): count for code, count in part.errors.items()})
    names = ("status", "label or code", "rows")
    show_table("rows by status", [dict(zip(names, (*key, counts[key]), strict=True)) for key in sorted(counts)])


def measured(classes: Sequence[str], parts: Sequence[Part]) -> dict[str, Any]:
    """How right the rows are, by the labels that were known, where they are classes; empty without such. What could not
    be read does not count."""
    together = Counter[tuple[str, str]]()
    for part in parts:
        together.update({(folder, label): n for folder, row in part.confusion.items() for label, n in row.items()})
    counts = torch.tensor([[together[folder, label] for label in classes] for folder in classes])
    if not counts.any():
        return {}
    return {"classes": list(classes), "photos": together.total(), **summary(counts), "confusion": counts.tolist()}


def show_measured(metrics: dict[str, Any]) -> None:
    """The confusion, and the accuracy with its interval."""
    classes = metrics["classes"]
    rows = [
        {"folder": name, **dict(zip(classes, counts, strict=True)), "recall": f"{recall:.4f}"}
        for name, counts, recall in zip(classes, metrics["confusion"], metrics["recalls"], strict=True)
    ]
    show_table("folders against predictions", rows)
    interval = f"{metrics['accuracy_low']:.4f}-{metrics['accuracy_high']:.4f}"
    say(f"score: accuracy {metrics['accuracy']:.4f} (95% interval {interval}) by folder, {metrics['photos']:,} photos")


def _summary(config: ScoreConfig, out: Storage, plan: Plan, parts: list[Part], said: str) -> str:
    show_rows(parts)
    if metrics := measured(plan.settings["classes"], parts):
        if not out.exists(METRICS):
            out.create(METRICS, json.dumps(metrics, indent=2).encode())
        show_measured(metrics)
    say(f"score: {said}")
    rows, errors = sum(part.rows for part in parts), sum(sum(part.errors.values()) for part in parts)
    if errors == rows or errors / rows > config.max_error_rate:
        raise TooManyBadImagesError(out.uri, errors, rows, config.max_error_rate)
    return f"score: {rows:,} rows, {errors} of them errors, in {out.uri_of('data/')}"
