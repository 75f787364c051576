"""Which client reads many small objects for the least CPU time: boto3, pyarrow's S3 file system, or obstore.

    python -m tests.benchmarks.fetch [--images FOLDER] [--rounds 3]

1,500 photos, from a real S3 server, by 16 threads of one process, the clients in turn. CPU time is that of this process
alone; the server works beside it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pyarrow.fs
from botocore.config import Config

from fruitray.s3reads import QuickReader
from fruitray.s3server import s3_server
from fruitray.storage import open_storage
from tests.benchmarks.audit import REAL, draw

THREADS, PHOTOS, BUCKET = 16, 1500, "fruit"
Read = Callable[[str], int]


def readers() -> dict[str, Read]:
    """By each client: key -> size of the whole object."""
    client = boto3.Session().client("s3", config=Config(max_pool_connections=THREADS))
    quick = QuickReader(client, BUCKET, "")
    files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{BUCKET}")

    def by_arrow(key: str) -> int:
        with files.open_input_stream(f"{BUCKET}/{key}") as stream:
            return len(stream.read())

    return {
        "boto3": lambda key: len(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()),
        "pyarrow.fs": by_arrow,
        "obstore": lambda key: len(quick.read(key, "") or b""),
    }


def main() -> None:
    """Run all clients and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder, "s3"), buckets=[BUCKET]) as server:
        images = Path(arguments.images or (REAL if REAL.is_dir() else draw(Path(folder, "drawn"), PHOTOS)))
        os.environ.update(server.environment)
        storage = open_storage(f"s3://{BUCKET}")
        photos = sorted(path for path in images.rglob("*") if path.is_file())
        keys = {}
        for number, path in enumerate(photos[:: max(1, len(photos) // PHOTOS)][:PHOTOS]):
            keys[f"{number}.jpg"] = path.stat().st_size
            storage.write(f"{number}.jpg", path.read_bytes())
        rounds = [{name: _measure(read, keys) for name, read in readers().items()} for _ in range(arguments.rounds)]
    print(f"{len(keys):,} photos, {THREADS} threads, median of {arguments.rounds} rounds")
    for name in rounds[0]:
        wall, busy = (1000 * statistics.median(of[name][part] for of in rounds) / len(keys) for part in (0, 1))
        print(f"{name:10} {busy:.2f} ms of CPU and {wall:.2f} ms in all per photo")


def _measure(read: Read, keys: dict[str, int]) -> tuple[float, float]:
    """Seconds, and seconds of CPU time, to read all."""
    with ThreadPoolExecutor(THREADS) as pool:
        start, busy = time.perf_counter(), time.process_time()
        sizes = list(pool.map(read, keys))
        taken = time.perf_counter() - start, time.process_time() - busy
    assert sizes == list(keys.values()), "a client has not read everything"
    return taken


if __name__ == "__main__":
    main()
