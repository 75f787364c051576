"""How fast `train` is: one worker beside a plain PyTorch loop, and two workers of one thread beside one of two.

    python -m tests.benchmarks.train [--images FOLDER] [--rounds 3] [--backbones cnn_bn efficientnet_b2]

`train` runs on a Ray of this process with two CPUs, and its workers' time counts, not their start; the plain loop is
that of `tests.benchmarks.fit`, with the same settings. They take turns; of each run the last of three epochs counts.
"""

import argparse
import io
import shutil
import statistics
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import ray

from fruitray.cluster.prepare import run as prepare
from fruitray.cluster.train import run as train
from fruitray.config import FitConfig, ModelConfig, PrepareConfig, TrainConfig
from fruitray.storage import open_storage
from tests.benchmarks.audit import REAL, draw, start_ray
from tests.benchmarks.fit import BATCH, PHOTOS, SIZES, measure

FIT = FitConfig(epochs=3, patience=3, batch_size=BATCH, learning_rate=1e-4, augment="none")


def some_photos(images: str, folder: Path, count: int) -> str:
    """A folder of about `count` photos, evenly from all of `images`."""
    storage = open_storage(images)
    keys = sorted(entry.key for entry in storage.list())
    for key in keys[:: max(1, len(keys) // count)]:
        Path(folder, key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(storage.uri_of(key), folder / key)
    return str(folder)


def trained(index: str, backbone: str, workers: int) -> float:
    """Images per second of the last epoch of `train`."""
    model = ModelConfig(backbone=backbone, weights="none", image_size=SIZES.get(backbone))
    with tempfile.TemporaryDirectory() as out:
        train(TrainConfig(index=index, out=out, model=model, fit=FIT, workers=workers))
        history = pq.read_table(io.BytesIO(open_storage(out).read("history.parquet")))
    return float(history["images_per_s"][-1].as_py())


def compare(images: str, backbone: str, rounds: int) -> None:
    """Measure and print."""
    one, two, plain = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = some_photos(images, Path(scratch, "photos"), PHOTOS[backbone])
        start_ray()
        prepare(PrepareConfig(images=folder, out=f"{scratch}/index"))
        for _ in range(rounds):
            one.append(trained(f"{scratch}/index", backbone, 1))
            two.append(trained(f"{scratch}/index", backbone, 2))
            plain.append(measure("plain", folder, backbone))
        ray.shutdown()
    print(f"{backbone}, about {PHOTOS[backbone]} photos, median of {rounds} rounds")
    for name, speeds in (("plain loop", plain), ("one worker", one), ("two workers", two)):
        print(f"  {name:11} {statistics.median(speeds):7.1f} images/s")
    for name, speeds, others in (("one worker", one, plain), ("two workers", two, one)):
        ratio = statistics.median(speed / other for speed, other in zip(speeds, others, strict=True))
        print(f"  {name} of train: {ratio:.2f} x the {'plain loop' if others is plain else 'one worker'}")


def main() -> None:
    """Compare for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", choices=PHOTOS, default=["cnn_bn", "efficientnet_b2"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or (str(REAL) if REAL.is_dir() else draw(Path(scratch, "drawn"), 1500))
        for backbone in arguments.backbones:
            compare(images, backbone, arguments.rounds)


if __name__ == "__main__":
    main()
