"""score: plan, predict shard by shard on the cluster, commit each shard once, seal the output."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray

from fruitray.cluster.runtime import connect, open_input, open_output, stream, worker_count
from fruitray.commit import (
    Part,
    Plan,
    adopt_plan,
    commit,
    committed_shards,
    finish,
    is_finished,
    read_inputs,
    read_manifest,
    read_plan,
    write_plan,
)
from fruitray.config import ScoreConfig, to_json
from fruitray.console import progress, say, show_table
from fruitray.errors import ImageError, NoInputError, OutputConflictError, TooManyBadImagesError
from fruitray.images import fetch, list_images
from fruitray.isolate import RGB, Isolated
from fruitray.metrics import summary
from fruitray.package import load_package
from fruitray.predictor import Predictor
from fruitray.storage import Entry, Storage, open_storage

METRICS = "metrics.json"


def run(config: ScoreConfig) -> str:
    """Score what is not scored yet, write the manifest and `_SUCCESS`; show the rows by status and by label."""
    images = open_input(config.images)
    out = open_output(config.out, images)
    plan = _plan(config, images, out)
    if is_finished(out):
        return _summary(config, out, plan, read_manifest(out), "was complete already")
    done = committed_shards(out, plan)
    shards = [(number, rows) for number, rows in enumerate(read_inputs(out, plan)) if number not in done]
    if done:
        say(f"score: {len(done)} of {plan.shards} shards were committed before")
    start = time.perf_counter()
    if shards:
        connect()
        _score(config, out, shards)
    seconds = time.perf_counter() - start
    rows = sum(len(rows) for _, rows in shards)
    said = f"{rows:,} rows in {seconds:.1f} s, {rows / max(seconds, 1e-9):.1f} images/s, start-up included"
    return _summary(config, out, plan, finish(out, plan, images.uri), said)


def _plan(config: ScoreConfig, images: Storage, out: Storage) -> Plan:
    """Adopt the plan that stands, or list the inputs and write one."""
    package = load_package(config.package)
    settings = {
        "images": images.uri,
        "model_id": package.model_id,
        "classes": list(package.classes),
        "top_k": config.top_k,
        "shard_rows": config.shard_rows,
        "batch_size": config.batch_size,
    }
    if plan := adopt_plan(out, settings):
        return plan
    entries, skipped = list_images(images)
    if not entries:
        raise NoInputError(images.uri)
    plan = write_plan(out, settings, entries, config.shard_rows)
    out.create("score.json", to_json(config))
    say(f"score: {plan.rows:,} photos in {plan.shards} shards planned; hidden files skipped: {skipped}")
    if not plan.created_atomically:
        say(
            f"score: warning: {out.uri} ignores If-None-Match, so nothing stops two different jobs from writing there "
            "at once; one job at a time, killed and re-run at will, is safe"
        )
    return plan


def _score(config: ScoreConfig, out: Storage, shards: list[tuple[int, list[Entry]]]) -> None:
    tables = [
        pa.table({"shard": [number], "entries": [[asdict(entry) for entry in entries]]}) for number, entries in shards
    ]
    workers = min(worker_count(config.workers, gpu=config.gpu), len(tables))
    errors = 0
    with progress("score", sum(len(entries) for _, entries in shards), "photos") as advance:
        for result in stream(
            tables,
            _Scorer,
            fn_constructor_args=(config,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if config.gpu else 0,
        ):
            advance(sum(result["rows"].to_pylist()))
            errors += sum(result["errors"].to_pylist())
    if errors:
        say(f"score: {errors} photos could not be read; their rows say why")


class _Scorer:
    """One worker: a shard in, its rows committed, their counts out."""

    def __init__(self, config: ScoreConfig) -> None:
        torch.set_num_threads(1)
        package = load_package(config.package)
        self._predictor = Predictor(package, top_k=config.top_k, batch_size=config.batch_size, gpu=config.gpu)
        self._images, self._out = open_input(config.images), open_storage(config.out)
        self._plan = read_plan(self._out)
        self._isolated = Isolated(RGB)
        if package.model_id != self._plan.settings["model_id"]:
            raise OutputConflictError(config.package, "is not the model that was planned: it was replaced meanwhile")

    def __call__(self, task: pa.Table) -> pa.Table:
        [shard] = task.to_pylist()
        entries = [Entry(**entry) for entry in shard["entries"]]
        predictions = self._predictor.predict_decoded(self._decoded(entries))
        commit(
            self._out,
            self._plan,
            shard["shard"],
            [self._images.uri_of(entry.key) for entry in entries],
            [entry.etag for entry in entries],
            predictions,
            self._predictor.package.model_id,
        )
        errors = sum(prediction.status == "error" for prediction in predictions)
        return pa.table({"shard": [shard["shard"]], "rows": [len(predictions)], "errors": [errors]})

    def _decoded(self, entries: list[Entry]) -> Iterator[NDArray[np.uint8] | ImageError]:
        """(3, H, W) each, decoded in a process of its own."""
        for answer in self._isolated.map(fetch(self._images, entries)):
            yield answer if isinstance(answer, ImageError) else answer["pixels"].transpose(2, 0, 1)


def show_rows(parts: Sequence[Part]) -> None:
    """How many rows have each status, with the label or the error code."""
    counts = Counter[tuple[str, str]]()
    for part in parts:
        counts.update({("ok", label): count for label, count in part.labels.items()})
        counts.update({("error", code): count for code, count in part.errors.items()})
    names = ("status", "label or code", "rows")
    show_table("rows by status", [dict(zip(names, (*key, counts[key]), strict=True)) for key in sorted(counts)])


def measured(classes: Sequence[str], parts: Sequence[Part]) -> dict[str, Any]:
    """How right the rows are, by the folders that have a class's name; empty without such. What could not be read, and
    lies in other folders, does not count."""
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
