"""What the feature cache saves a search, and what Ray Tune costs it.

    python -m tests.benchmarks.search cache [--images FOLDER] [--weights FOLDER]
    python -m tests.benchmarks.search tune [--images FOLDER]

`cache`: 16 trials of a frozen backbone, 10 epochs each, over the eightfold set, with the cache, which is built first;
and without it, of which only some batches are run and the rest is computed, as it would take a day.
`tune`: 16 trials of about 30 s, over some of the photos, by Ray Tune on one CPU and one after the other in one process.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from fruitray.backbones import Classifier
from fruitray.batches import Batches
from fruitray.cluster.embed import initial_model
from fruitray.cluster.prepare import run as prepare
from fruitray.cluster.trial import train
from fruitray.cluster.tune import plain, run
from fruitray.config import FitConfig, PrepareConfig, TuneConfig
from fruitray.fit import fit
from fruitray.index import Index, read_index
from fruitray.recipe import make_recipe
from fruitray.search import draw_trials
from fruitray.storage import open_storage
from tests.benchmarks.audit import REAL, draw, start_ray
from tests.benchmarks.train import some_photos

TRIALS, EPOCHS = 16, 10
SOME = 800
"""Photos that a trial of about 30 s takes."""
WEIGHTS = REAL.parents[1] / "weights"


def cache(images: str, weights: str, out: str) -> None:
    """Print the seconds with and without the cache."""
    start_ray()
    index = _index(images, out)
    fit_config = FitConfig(epochs=EPOCHS, patience=EPOCHS, augment="eightfold")
    config = _config(out, "timm/tf_efficientnetv2_b0", fit_config, weights=weights)
    start = time.perf_counter()
    run(config)
    cached = time.perf_counter() - start
    ray.shutdown()
    torch.set_num_threads(os.cpu_count() or 1)
    model = draw_trials(config)[0].model
    package = initial_model(open_storage(config.out), model, index.classes, 0)
    recipe = make_recipe(config.index, index, package.model, config.fit, frozen=True, cached=False)
    speed = _frozen_speed(recipe.model, recipe.train)
    uncached = TRIALS * EPOCHS * recipe.train.examples / speed
    print(f"{TRIALS} trials of {EPOCHS} epochs over {recipe.train.examples:,} examples")
    print(f"with the cache, built in that time: {cached:,.0f} s")
    print(f"without: {speed:.1f} examples/s on all cores, so {uncached:,.0f} s (computed, not run)")
    print(f"that is {uncached / cached:.1f} x")


def _frozen_speed(model: Classifier, train_: Batches, batches: int = 40) -> float:
    """Examples per second of training the head over a trunk that embeds every example anew."""
    rows = train_.rows[: batches * train_.batch_size // 8]
    some = replace(train_, rows=rows)
    config = FitConfig(epochs=1, batch_size=train_.batch_size, learning_rate=1e-3)
    val = replace(some, rows=rows[:8], policy="none", shuffle=False)
    return next(fit(model, some, val, config, device=torch.device("cpu"))).images_per_s


def tune(images: str, out: str) -> None:
    """Print the seconds with and without Ray Tune."""
    ray.init(address="local", num_cpus=1, object_store_memory=500_000_000, include_dashboard=False, log_to_driver=False)
    index = _index(images, out)
    config = _config(out, "cnn_bn", FitConfig(epochs=8, patience=8), image_size=64)
    initial_model(open_storage(config.out), draw_trials(config)[0].model, index.classes, 0)
    trials = [_space(config, number) for number in range(TRIALS)]
    torch.set_num_threads(1)
    _back_to_back(trials[:1])  # photos are decoded now
    half = TRIALS // 2
    alone = _back_to_back(trials[:half])  # half before and half after, as a machine's speed may change meanwhile
    start = time.perf_counter()
    run(config)
    tuned = time.perf_counter() - start
    ray.shutdown()
    alone += _back_to_back(trials[half:])
    print(f"{TRIALS} trials of {alone / TRIALS:.1f} s each, one after the other: {alone:.0f} s; by Tune: {tuned:.0f} s")
    print(f"Tune takes {tuned / alone:.3f} x the time")


def _config(out: str, backbone: str, fit_config: FitConfig, **options: Any) -> TuneConfig:
    shared = {"index": f"{out}/index", "out": f"{out}/tune", "trials": TRIALS, "scheduler": "none"}
    return TuneConfig(**shared, backbones=(backbone,), fit=fit_config, **options)


def _space(config: TuneConfig, number: int) -> dict[str, Any]:
    shared = {"index": config.index, "index_sha256": "", "out": config.out, "folds": 0, "cpus": 1, "gpu": False}
    return {**shared, "trial": plain(number, draw_trials(config)[number])}


def _back_to_back(trials: list[dict[str, Any]]) -> float:
    start = time.perf_counter()
    for space in trials:
        for _ in train(space):
            pass
    return time.perf_counter() - start


def _index(images: str, out: str) -> Index:
    prepare(PrepareConfig(images=images, out=f"{out}/index"))
    return read_index(f"{out}/index")


def main() -> None:
    """Run the benchmark that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cache", "tune"])
    parser.add_argument("--images", default=None)
    parser.add_argument("--weights", default=str(WEIGHTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or (str(REAL) if REAL.is_dir() else draw(Path(scratch, "drawn"), 1500))
        os.environ["FRUITRAY_CACHE"] = f"{scratch}/cache"
        if arguments.what == "cache":
            cache(images, arguments.weights, f"{scratch}/out")
        else:
            tune(some_photos(images, Path(scratch, "some"), SOME), f"{scratch}/out")


if __name__ == "__main__":
    main()
