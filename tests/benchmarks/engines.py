"""The engines beside each other: how fast, how long to start, and how near to PyTorch in float32.

    python -m tests.benchmarks.engines --package PACKAGE [--images FOLDER] [--photos 900]

Two processes of one thread each compute ready tensors. `labels` is the share of photos with the same label as float32
gives them, `scores` the greatest difference of any score.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fruitray.engines import make_engine
from fruitray.images import decode
from fruitray.memory import keep_freed_memory
from fruitray.package import load_package
from fruitray.preprocess import stack
from tests.benchmarks.audit import REAL

PROCESSES, SECONDS = 2, 10.0
ENGINES = ("float32", "eager", "compile", "openvino")


def _photos(images: str, count: int, package: Any) -> torch.Tensor:
    files = sorted(path for path in Path(images).rglob("*") if path.is_file())
    files = files[:: max(1, len(files) // count)][:count]
    return stack([package.model.preprocessing.resize(decode(path.read_bytes()).pixels) for path in files])


def process(name: str, uri: str, images: str, count: int) -> None:
    """Print what one process finds: seconds to start, images per second, and each photo's scores."""
    torch.set_num_threads(1)
    keep_freed_memory()
    package = load_package(uri)
    photos = _photos(images, count, package)
    start = time.perf_counter()
    precise = name == "float32"
    chosen: Any = "eager" if precise else name
    engine = make_engine(chosen, package.model, torch.device("cpu"), full_precision=precise)
    engine(photos[: engine.batch])
    ready = time.perf_counter() - start
    scores = package.inference.scores(package.inference.logits(lambda view: engine(view)[0], photos))
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < SECONDS:
        done += len(engine(photos[done % (len(photos) - 64) :][:64])[0])
    print(json.dumps({"name": engine.name, "start": ready, "speed": done / seconds, "scores": scores.tolist()}))


def main() -> None:
    """Run all engines and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", required=True)
    parser.add_argument("--images", default=str(REAL))
    parser.add_argument("--photos", type=int, default=900)
    parser.add_argument("--only", choices=ENGINES)
    given = parser.parse_args()
    if given.only:
        process(given.only, given.package, given.images, given.photos)
        return
    expected = torch.empty(0)
    for name in ENGINES:
        if name == "openvino" and not importlib.util.find_spec(name):
            continue
        command = [sys.executable, "-m", "tests.benchmarks.engines", *sys.argv[1:], "--only", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(PROCESSES)]
        found = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
        scores = torch.tensor(found[0]["scores"])
        expected = scores if name == "float32" else expected
        alike = (scores.argmax(dim=1) == expected.argmax(dim=1)).float().mean()
        speed, start = sum(one["speed"] for one in found), max(one["start"] for one in found)
        print(
            f"{found[0]['name']:22} {speed:7.1f} images/s, ready after {start:5.1f} s, "
            f"labels {100 * alike:.2f}%, scores {(scores - expected).abs().max():.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
