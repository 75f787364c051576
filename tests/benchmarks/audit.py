"""How fast and how lean `prepare` looks at photos, side by side with a bare loop and with cleanvision.

    python -m tests.benchmarks.audit [--images FOLDER] [--rounds 3]

Every contender runs in a process of its own, on two processes, and they take turns. `--images` is a folder of class
folders; without it, and without ../shared/data, 1,500 drawn photos are used. The memory part draws small photos.
"""

import argparse
import hashlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from fruitray.duplicates import find_duplicates
from fruitray.machine import process_peak

PROCESSES = 2
REAL = Path(__file__).parents[3] / "shared" / "data" / "vuw-fruit"


def bare(folder: str) -> float:
    """Seconds to read, decode and hash (SHA-256, imagehash's pHash) every file: what nobody can do without."""
    files = [str(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    start = time.perf_counter()
    with Pool(PROCESSES) as pool:
        pool.map(_hash, files, chunksize=64)
    return time.perf_counter() - start


def _hash(path: str) -> tuple[str, str]:
    import imagehash

    data = Path(path).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        return hashlib.sha256(data).hexdigest(), str(imagehash.phash(image.convert("RGB")))


def cleanvision(folder: str) -> float:
    """Seconds of cleanvision's default check."""
    from cleanvision import Imagelab

    start = time.perf_counter()
    Imagelab(data_path=folder, verbose=False).find_issues(n_jobs=PROCESSES, verbose=False)
    return time.perf_counter() - start


def fruitray(folder: str) -> float:
    """Seconds of everything that prepare does, on a running Ray of two CPUs whose workers have started."""
    import ray

    from fruitray.cluster.prepare import run
    from fruitray.config import PrepareConfig

    with tempfile.TemporaryDirectory() as out:
        start_ray()
        seconds = 0.0
        for turn in ("warm", "measured"):
            start = time.perf_counter()
            run(PrepareConfig(images=folder, out=f"{out}/{turn}"))
            seconds = time.perf_counter() - start
        ray.shutdown()
    return seconds


def start_ray() -> None:
    """A Ray of this process alone."""
    import ray

    settings = {"num_cpus": PROCESSES, "object_store_memory": 500_000_000, "include_dashboard": False}
    ray.init(address="local", log_to_driver=False, logging_level="error", **settings)


def driver_memory(folder: str) -> float:
    """Peak resident MiB of the process that runs prepare, Ray's start and all."""
    from fruitray.cluster.prepare import run
    from fruitray.config import PrepareConfig

    with tempfile.TemporaryDirectory() as out:
        start_ray()
        run(PrepareConfig(images=folder, out=out))
    return peak()


def peak() -> float:
    """MiB that this process has held at most."""
    return process_peak() / 2**20


def draw(folder: Path, photos: int) -> str:
    """`photos` small photos of three classes, all unlike."""
    noise = np.random.default_rng(0)
    for number in range(photos):
        path = folder / f"class{number % 3}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blotches = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        blotches.resize((96, 96), Image.Resampling.BICUBIC).save(path)
    return str(folder)


CONTENDERS = {function.__name__: function for function in (bare, cleanvision, fruitray, driver_memory)}


def measure(name: str, folder: str) -> float:
    """What the contender answers, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.audit", "--only", name, "--images", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Run all contenders and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CONTENDERS)
    arguments = parser.parse_args()
    if arguments.only:
        print(CONTENDERS[arguments.only](arguments.images))
        return
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or (str(REAL) if REAL.is_dir() else draw(Path(scratch, "drawn"), 1500))
        count = sum(path.is_file() for path in Path(images).rglob("*"))
        rounds = [{name: measure(name, images) for name in list(CONTENDERS)[:3]} for _ in range(arguments.rounds)]
        print(f"{count} photos, {PROCESSES} processes each, median of {arguments.rounds} rounds")
        for name in rounds[0]:
            print(f"{name:12} {statistics.median(seconds[name] for seconds in rounds):7.2f} s")
        for one, other in (("fruitray", "bare"), ("cleanvision", "fruitray")):
            print(f"{one} takes {statistics.median(s[one] / s[other] for s in rounds):.2f} x the time of {other}")
        few, many = (driver(Path(scratch, str(photos)), photos) for photos in (4_500, 45_000))
        print(f"driver's peak memory: {few:.0f} MiB for 4,500 photos, {many:.0f} MiB for 45,000: {many / few:.2f} x")
    for photos in (100_000, 1_000_000):
        print(f"near duplicates among {photos:,} photos found in {near_duplicates(photos):.1f} s")


def near_duplicates(photos: int) -> float:
    """Seconds to find them among so many random hashes, of which each twentieth is nearly another one's."""
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, photos, dtype=np.uint64)
    near = photos // 20
    hashes[:near] = hashes[-near:] ^ (np.uint64(1) << random.integers(0, 64, near, dtype=np.uint64))
    thumbnails = random.integers(0, 256, (photos, 108), dtype=np.uint8)
    table = pa.table(
        {
            "sha256": [f"{number}" for number in range(photos)],
            "phash": [f"{number:016x}" for number in hashes.tolist()],
            "thumbnail": pa.FixedSizeBinaryArray.from_buffers(pa.binary(108), photos, [None, pa.py_buffer(thumbnails)]),
        }
    )
    start = time.perf_counter()
    find_duplicates(table, bits=8)
    return time.perf_counter() - start


def driver(folder: Path, photos: int) -> float:
    """Peak MiB of the driver over so many drawn photos."""
    return measure("driver_memory", draw(folder, photos))


if __name__ == "__main__":
    main()
