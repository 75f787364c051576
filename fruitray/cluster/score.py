"""score: plan, have workers score and commit each shard once, seal the output."""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ray import ObjectRef

from fruitray import status
from fruitray.cluster import planner
from fruitray.cluster.connection import connect
from fruitray.cluster.placement import needs, worker_count
from fruitray.cluster.preflight import preflight
from fruitray.cluster.runtime import answer_of, beside_driver, is_within, open_input, open_output, require_alone
from fruitray.cluster.scorer import STAGES, Work, score_shards
from fruitray.commit import PLAN, Part, Plan, adopt_plan, committed, is_finished, read_manifest, read_plan
from fruitray.config import ScoreConfig, to_json
from fruitray.confusions import confusion_table
from fruitray.console import say, show_table
from fruitray.engines import EngineName, pick_engine, require_engine
from fruitray.errors import TooManyBadImagesError, UsageError
from fruitray.inputs import LISTS
from fruitray.metrics import recalls, summary
from fruitray.package import Package, load_package
from fruitray.storage import Storage, open_storage

METRICS = "metrics.json"
DECIDING = (
    "split",
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
SHARDS_EACH, LEAST_ROWS, MOST_ROWS = 16, 32, 4096
"""Shards that there are for each worker, so that none is idle for long while others end; and rows of one."""
PROBED = 64
"""Photos that a dry run scores, per worker."""


def run(config: ScoreConfig) -> str:
    """Score what is not scored yet, write the manifest and `_SUCCESS`; show the rows by status and by label."""
    start = time.perf_counter()
    if config.engine != "auto":
        require_engine(config.engine, gpu=config.gpu)
    out = _open_output(config)
    for place in (config.package, *filter(None, [config.previous])):
        open_input(place)  # says within seconds what reading would say after minutes
    package = load_package(config.package)
    if config.dry_run:
        return _dry_run(config, package)
    plan = _plan(config, package, out)
    if not out.exists("score.json"):
        out.create("score.json", to_json(config))
    if is_finished(out):
        status.mend(out)
        return _summary(config, out, plan, read_manifest(out), "was complete already")
    if config.gpu and plan.settings["engine"] == "openvino":
        raise UsageError(f"--gpu: {out.uri} was planned for CPUs, with OpenVINO; go on without --gpu")
    status.begin(out)
    left, shards = _left(out)
    if left["done"]:
        say(f"score: {left['done']} of {plan.shards} shards were committed before")
    work = score_shards(config, shards, left["rows"], plan.settings["engine"]) if shards else Work()
    parts = answer_of(beside_driver(planner.seal).remote(out.uri))
    return _summary(config, out, plan, parts, _speed(config, work, time.perf_counter() - start))


def _left(out: Storage) -> tuple[dict[str, int], list[ObjectRef]]:
    """Counts of what is planned and not committed, and references to its shards, in an order of this run's own: else
    each would meet first what fails for good."""
    connect()
    counts, *shards = beside_driver(planner.hand_out).remote(out.uri)
    random.shuffle(shards)
    return answer_of(counts), shards


def _open_output(config: ScoreConfig) -> Storage:
    out = open_output(config.out)
    require_alone(out, "score")
    for place in config.images:
        images = open_storage(place)
        out = open_output(config.out, images)
        if is_within(images, open_storage(out.uri_of("data"))):
            raise UsageError(f"--out {config.out}: its rows would come to lie in data/ there, beside --images {place}")
    return out


def _folders(config: ScoreConfig) -> list[str]:
    return [place for place in config.images if not place.endswith(LISTS)]


def _settings(config: ScoreConfig, package: Package) -> dict[str, Any]:
    """All that decides a row, but for the engine."""
    known = {"images": list(config.images), "model_id": package.model_id, "classes": list(package.classes)}
    return known | {name: getattr(config, name) for name in DECIDING}


def _plan(config: ScoreConfig, package: Package, out: Storage) -> Plan:
    """Adopt the plan that stands, or list the inputs and write one."""
    settings = _settings(config, package)
    if standing := _standing_plan(config, settings, out):
        return standing
    committed(out, ())  # else what lies in the way is told when all is planned
    for place in _folders(config):
        open_input(place)
    connect()
    workers = worker_count(config.workers, gpu=config.gpu)
    found, inputs = _look(config, settings)
    settings["engine"] = _engine(config, found["photos"], workers)
    rows = _shard_rows(config, found["photos"], workers)
    plan: Plan = answer_of(beside_driver(planner.plan).remote(config, settings, rows, inputs))
    say(f"score: {plan.rows:,} photos in {plan.shards} shards planned; hidden files skipped: {found['skipped_hidden']}")
    if not plan.created_atomically:
        say(
            f"score: warning: {out.uri} has no hard links, or ignores If-None-Match, so nothing stops two different "
            "jobs from writing there at once; one job at a time, killed and re-run at will, is safe"
        )
    return plan


def _standing_plan(config: ScoreConfig, settings: Mapping[str, Any], out: Storage) -> Plan | None:
    if not out.exists(PLAN):
        return None
    standing = read_plan(out).settings
    engine = standing.get("engine") if config.engine == "auto" else config.engine
    shard_rows = config.shard_rows or standing.get("shard_rows")
    return adopt_plan(out, {**settings, "engine": engine, "shard_rows": shard_rows})


def _look(config: ScoreConfig, settings: Mapping[str, Any]) -> tuple[dict[str, int], ObjectRef]:
    """Counts of what is to be scored, and a reference to it."""
    counts, *inputs = beside_driver(planner.look).remote(config, settings)
    found = answer_of(counts)
    if config.previous:
        say(f"score: {found['known']:,} of {found['photos']:,} rows are taken from {config.previous}")
    return found, inputs[0]


def _engine(config: ScoreConfig, photos: int, workers: int) -> EngineName:
    return pick_engine(photos // workers, gpu=config.gpu) if config.engine == "auto" else config.engine


def _shard_rows(config: ScoreConfig, photos: int, workers: int) -> int:
    return config.shard_rows or min(max(photos // (workers * SHARDS_EACH), LEAST_ROWS), MOST_ROWS)


# ---- What a person is told


def _dry_run(config: ScoreConfig, package: Package) -> str:
    reads = [package.uri, *_folders(config)]
    each = needs(gpu=config.gpu)
    say(preflight("score", reads, config.out, workers=config.workers or 1, cpus=each["cpus"], gpus=each["gpus"]))
    settings, out = _settings(config, package), open_storage(config.out)
    workers = worker_count(config.workers, gpu=config.gpu)
    if plan := _standing_plan(config, settings, out):
        (left, inputs), engine = _left(out), plan.settings["engine"]
        say(f"score: {left['done']} of {plan.shards} shards are committed")
    else:
        found, listed = _look(config, settings)
        inputs, engine = [listed], _engine(config, found["photos"], workers)
        size = found["bytes"] / 1e6
        say(f"score: {found['photos']:,} photos, {size:,.1f} MB; hidden files skipped: {found['skipped_hidden']}")
    count, *shards = beside_driver(planner.probe).remote(PROBED, workers, *inputs)
    if not (photos := answer_of(count)):
        return "score: nothing is left to score; nothing was written"
    workers = min(workers, photos)
    start = time.perf_counter()
    work = score_shards(config, shards, min(photos, workers * PROBED), engine)
    busy = sum(work.seconds.values())
    started = time.perf_counter() - start - busy / workers
    rows = _shard_rows(config, photos, workers)
    turns = math.ceil(photos / rows / workers)  # the photos of a shard are one worker's
    seconds = started + busy / work.rows * max(photos / workers, min(photos, turns * rows))
    cost = _cost(config, seconds, photos)
    return f"score: all would take about {_duration(seconds)}{cost}, start-up {started:.0f} s; nothing was written"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _cost(config: ScoreConfig, seconds: float, photos: int) -> str:
    if config.cost_per_hour is None:
        return ""
    per_thousand = _cost_per_thousand(config.cost_per_hour, seconds, photos)
    return f" and cost {config.cost_per_hour * seconds / 3600:,.4g}, {per_thousand:,.4g} per 1,000 photos"


def _cost_per_thousand(per_hour: float, seconds: float, photos: int) -> float:
    return per_hour * seconds / 3.6 / max(photos, 1)


def _speed(config: ScoreConfig, work: Work, seconds: float) -> str:
    rate = work.scored / max(seconds, 1e-9)
    if work.scored:
        hour = config.cost_per_hour
        per_thousand = None if hour is None else _cost_per_thousand(hour, seconds, work.scored)
        status.note(scored=work.scored, seconds=seconds, images_per_s=rate, cost_per_1000=per_thousand)
    stages = ", ".join(f"{stage} {work.seconds[stage]:.1f} s" for stage in STAGES)
    cost = _cost(config, seconds, work.scored)
    known = f", {work.rows - work.scored:,} rows taken over" if work.rows > work.scored else ""
    return (
        f"{work.scored:,} photos in {seconds:.1f} s, {rate:.1f} images/s, start-up included{known}{cost}; "
        f"workers' time: {stages}"
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
    seen = counts.sum(dim=1).tolist()  # a class without photos has no recall
    found = [share if photos else None for share, photos in zip(recalls(counts), seen, strict=True)]
    known = {"classes": list(classes), "photos": together.total()}
    return {**known, **summary(counts), "recalls": found, "confusion": counts.tolist()}


def show_measured(metrics: dict[str, Any]) -> None:
    """The confusion, the folders being the true classes, and the accuracy with its interval."""
    show_table(*confusion_table(metrics["classes"], metrics["confusion"], metrics["recalls"]))
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
