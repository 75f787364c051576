"""How `score` grows: time and memory against the number of photos, and how long until the first row is there.

    python -m tests.benchmarks.scale [--images FOLDER] [--engine openvino]

`time`: all of score with EfficientNet-B2 at 288 pixels over 2,000, 4,000 and 8,000 photos (links to `LINKED` of
--images, or of ../shared/data, or of drawn ones). `start`: from the command to the first committed rows, on a Ray that
runs. `memory`: the driver's peak over 1,000 and 100,000 photos, with a model of no weight. `plan`: the peak while a
store of 1,000,000 keys, which is made up, is listed and planned. Each in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from fruitray.config import ModelConfig
from fruitray.storage import Entry, LocalStorage, open_storage
from tests.benchmarks.audit import REAL, draw, peak, start_ray
from tests.benchmarks.score import SIZE, save_fresh, timed

LINKED = 500
"""Photos that the many are links to."""
COUNTS, FEW, MANY, KEYS = (2_000, 4_000, 8_000), 1_000, 100_000, 1_000_000


def seconds(folder: str, package: str, engine: str) -> tuple[float, ...]:
    """Of all of score, and of its workers, together."""
    start_ray()
    with tempfile.TemporaryDirectory() as out:
        taken, _, busy = timed(folder, package, out, engine)
    return taken, busy


def memory(folder: str, package: str, engine: str) -> tuple[float, ...]:
    """The driver's peak in MiB: before, and after."""
    from fruitray.cluster import score  # noqa: F401  what is loaded counts as before

    start_ray()
    before = peak()
    with tempfile.TemporaryDirectory() as out:
        timed(folder, package, out, "eager")
    return before, peak()


def first(folder: str, package: str, engine: str) -> tuple[float, ...]:
    """Seconds from the command to the first rows."""
    import ray

    start_ray()
    with tempfile.TemporaryDirectory() as out:
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, "-m", "jobs.score", "--package", package, "--images", folder, "--out", out]
        start = time.perf_counter()
        job = subprocess.Popen(
            [*command, "--engine", engine, "--shard-rows", "16"],
            env=os.environ | {"RAY_ADDRESS": address},
            stdout=subprocess.DEVNULL,
        )
        while job.poll() is None and not next(open_storage(out).list("data/"), None):
            time.sleep(0.02)
        answer = time.perf_counter() - start
        job.wait()
    return (answer,)


class _MadeUp(LocalStorage):
    """As many keys as asked for."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        if prefix:
            yield from super().list(prefix)
            return
        for number in range(KEYS):
            key = number * 7_919 % KEYS  # not in order
            yield Entry(f"class{key % 3}/{key:09d}.jpg", 40_000, f'"{key:032x}"')


def plan(folder: str, package: str, engine: str) -> tuple[float, ...]:
    """Seconds and MiB more than before, to list and plan `KEYS` keys, and to read the plan."""
    from fruitray import inputs
    from fruitray.commit import read_shards, write_plan

    before = peak()
    start = time.perf_counter()
    with mock.patch.object(inputs, "open_storage", _MadeUp):
        listed, _ = inputs.list_inputs([folder])
    with tempfile.TemporaryDirectory() as out:
        read_shards(open_storage(out), write_plan(open_storage(out), {}, listed, 1000))
    return time.perf_counter() - start, peak() - before


CONTENDERS = {function.__name__: function for function in (seconds, memory, first, plan)}


def measure(name: str, folder: Path, package: str, engine: str) -> list[float]:
    """What the contender answers, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--only", name, str(folder), package]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--engine", engine], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def link(photos: list[Path], folder: Path, count: int) -> Path:
    """A folder of `count` photos, which are links to `photos`."""
    for number in range(count):
        path = folder / f"class{number % 3}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(photos[number % len(photos)], path)
    return folder


def main() -> None:
    """Measure each and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--only", nargs=3, metavar=("CONTENDER", "FOLDER", "PACKAGE"))
    arguments = parser.parse_args()
    if arguments.only:
        name, folder, package = arguments.only
        print(*CONTENDERS[name](folder, package, arguments.engine))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch, engine = Path(folder), arguments.engine
        images = Path(arguments.images or (REAL if REAL.is_dir() else draw(scratch / "drawn", LINKED)))
        found = sorted(path for path in images.rglob("*") if path.is_file())
        (scratch / "photos").mkdir()
        photos = []
        for number, path in enumerate(found[:: max(1, len(found) // LINKED)][:LINKED]):
            photos.append(scratch / "photos" / f"{number}.jpg")
            photos[-1].write_bytes(path.read_bytes())
        b2 = save_fresh(scratch / "b2", ModelConfig(backbone="efficientnet_b2", weights="none", image_size=SIZE))
        tiny = save_fresh(scratch / "tiny", ModelConfig(backbone="mlp", weights="none", image_size=32))
        for count in COUNTS:
            taken, busy = measure("seconds", link(photos, scratch / str(count), count), b2, engine)
            print(f"{count:,} photos: {taken:.1f} s in all, workers busy {1000 * busy / count:.2f} ms a photo")
        [until] = measure("first", scratch / str(COUNTS[0]), b2, engine)
        print(f"first rows {until:.1f} s after the command")
        peaks = {count: measure("memory", link(photos, scratch / str(count), count), tiny, "") for count in (FEW, MANY)}
        for count, (before, peak) in peaks.items():
            print(f"driver over {count:,} photos: {before:.0f} MiB before it starts, {peak:.0f} MiB at its peak")
        print(f"{peaks[MANY][1] / peaks[FEW][1]:.2f} x the peak for {MANY // FEW} x the photos")
        taken, more = measure("plan", scratch, tiny, "")
        print(f"{KEYS:,} keys listed and planned in {taken:.1f} s, with {more:.0f} MiB")


if __name__ == "__main__":
    main()
