"""Training speed: `fit()` beside a hand-written PyTorch loop of the same precision and layout, and the report's way.

    python -m tests.benchmarks.fit [--images FOLDER] [--rounds 3] [--backbones cnn efficientnet_b2]

The report's way is torchvision's ImageFolder, decoded in the loop without workers, fp32, batch size 8; `compiled` is
`fit()` with torch.compile. Every contender trains two epochs in a process of its own with two threads, and they take
turns; the second epoch counts.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2

from fruitray.backbones import Classifier, autocast, build
from fruitray.batches import Batches, decoded_photos
from fruitray.config import FitConfig, ModelConfig
from fruitray.fit import fit
from fruitray.steps import use_threads
from fruitray.storage import open_storage
from tests.benchmarks.audit import REAL, draw

THREADS = 2
BATCH = 64
PHOTOS = {"cnn": 1024, "cnn_bn": 1024, "efficientnet_b2": 192}
"""How many photos an epoch shows; many more would say the same."""
SIZES = {"efficientnet_b2": 288}


def _model(backbone: str) -> Classifier:
    return build(ModelConfig(backbone=backbone, weights="none", image_size=SIZES.get(backbone)), classes=3)[0]


def photos_and_labels(folder: str, model: Classifier, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` decoded photos, evenly from all classes, and their labels."""
    storage = open_storage(folder)
    entries = sorted(storage.list(), key=lambda entry: entry.key)
    entries = entries[:: max(1, len(entries) // count)][:count]
    names = sorted({entry.key.partition("/")[0] for entry in entries})
    labels = torch.tensor([names.index(entry.key.partition("/")[0]) for entry in entries])
    return decoded_photos(storage, entries, model.preprocessing), labels


def fruitray(folder: str, backbone: str, *, compiled: bool = False) -> float:
    """Images per second of `fit()`, with threads as `train` and `tune` start it."""
    use_threads(THREADS)
    model = _model(backbone)
    photos, labels = photos_and_labels(folder, model, PHOTOS[backbone])
    rows = torch.arange(len(labels))
    train = Batches(inputs=photos, labels=labels, rows=rows, classes=3, batch_size=BATCH, shuffle=True)
    val = Batches(inputs=photos, labels=labels, rows=rows[:8], classes=3, batch_size=BATCH)
    config = FitConfig(epochs=2, batch_size=BATCH, learning_rate=1e-4, compile=compiled)
    return [epoch.images_per_s for epoch in fit(model, train, val, config, device=torch.device("cpu"))][-1]


def plain(folder: str, backbone: str) -> float:
    """Images per second of a loop as one writes it by hand, over the same decoded photos."""
    model = _model(backbone)
    photos, labels = photos_and_labels(folder, model, PHOTOS[backbone])
    network, mean, std = nn.Sequential(model.trunk, model.head), model.mean, model.std

    def batches() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.randperm(len(labels)).split(BATCH):
            yield (photos[rows].float() - mean) / std, labels[rows]

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01)
    return _second_epoch(network, optimizer, batches, label_smoothing=0.1)


def report(folder: str, backbone: str) -> float:
    """Images per second of the report's loop."""
    model = _model(backbone)
    size = model.preprocessing.size
    steps = [
        v2.Resize((size, size)),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    data = datasets.ImageFolder(folder, v2.Compose(steps))
    some = torch.utils.data.Subset(data, range(0, len(data), max(1, len(data) // PHOTOS[backbone])))
    loader = torch.utils.data.DataLoader(some, batch_size=8, shuffle=True)
    network = nn.Sequential(model.trunk, model.head).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    return _second_epoch(network, optimizer, lambda: loader, precise=True)


def _second_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Iterable[Any]],
    *,
    precise: bool = False,
    label_smoothing: float = 0.0,
) -> float:
    network.train()
    for _ in range(2):
        start, count = time.perf_counter(), 0
        for inputs, labels in batches():
            with torch.autocast("cpu", enabled=False) if precise else autocast(torch.device("cpu")):
                logits = network(inputs)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            count += len(labels)
    return count / (time.perf_counter() - start)


CONTENDERS = {"fruitray": fruitray, "plain": plain, "report": report, "compiled": partial(fruitray, compiled=True)}


def measure(name: str, folder: str, backbone: str) -> float:
    """What the contender answers, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.fit",
        "--only",
        name,
        "--images",
        folder,
        "--backbones",
        backbone,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run all contenders and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", choices=PHOTOS, default=["cnn", "efficientnet_b2"])
    parser.add_argument("--only", choices=CONTENDERS)
    arguments = parser.parse_args()
    if arguments.only:
        torch.set_num_threads(THREADS)
        print(CONTENDERS[arguments.only](arguments.images, arguments.backbones[0]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or (str(REAL) if REAL.is_dir() else draw(Path(scratch, "drawn"), 1500))
        for backbone in arguments.backbones:
            rounds = [{name: measure(name, images, backbone) for name in CONTENDERS} for _ in range(arguments.rounds)]
            print(f"{backbone}, {PHOTOS[backbone]} photos, {THREADS} threads, median of {arguments.rounds} rounds")
            for name in CONTENDERS:
                print(f"  {name:9} {statistics.median(speeds[name] for speeds in rounds):7.1f} images/s")
            for other in itertools.islice(CONTENDERS, 1, None):
                ratio = statistics.median(speeds["fruitray"] / speeds[other] for speeds in rounds)
                print(f"  fruitray trains {ratio:.2f} x as fast as {other}")


if __name__ == "__main__":
    main()
