"""Training on a GPU: `fit()` beside timm's own train step, what its input takes by itself, and the report's job.

    python -m tests.benchmarks.gpu [--images FOLDER] [--rounds 3] [--photos 3312] [--device cuda]

EfficientNet-B2 at 288 px in bfloat16, both with batches of 64, AdamW and smoothed labels; timm's step is handed one
batch that lies ready in the GPU's memory, `fit()` crops, mirrors and normalises each anew. They take turns; the last of
three epochs counts. The report's job is 7 epochs of the eightfold set of 3,312 photos at 300 px, decoding included,
which took its T4 73.5 minutes. Without Ray; `--device cpu`, with few photos, shows that it runs.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2

from fruitray.backbones import Classifier, autocast, build
from fruitray.batches import Batches, near
from fruitray.config import RECIPES, FitConfig, ModelConfig
from fruitray.fit import fit
from tests.benchmarks.audit import REAL, draw
from tests.benchmarks.fit import photos_and_labels

BATCH, SIZE, REPORT_SIZE, CLASSES = 64, 288, 300, 3
SHOWN = 12_800
"""Examples of an epoch whose speed is measured, as many times as there are photos."""
FIT = FitConfig(epochs=3, patience=3, batch_size=BATCH, learning_rate=1e-4, augment="crop+mirror")
REPORT = replace(RECIPES["report"], epochs=7, patience=7, batch_size=BATCH)


def _ready(folder: str, count: int, size: int, device: torch.device) -> tuple[Classifier, partial[Batches]]:
    """An untrained network, and batches of `count` decoded photos."""
    model, _ = build(ModelConfig(backbone="efficientnet_b2", weights="none", image_size=size), classes=CLASSES)
    photos, labels = photos_and_labels(folder, model, count)
    return model.to(device), partial(
        Batches, inputs=near(photos, device), labels=labels, classes=CLASSES, batch_size=BATCH, device=device
    )


def fruitray(folder: str, count: int, device: torch.device) -> tuple[float, float]:
    """Images per second of `fit()`, and of its input alone."""
    model, batches = _ready(folder, count, SIZE, device)
    rows = torch.arange(SHOWN if device.type == "cuda" else count) % count
    train = batches(rows=rows, shuffle=True, policy=FIT.augment)
    speed = [epoch.images_per_s for epoch in fit(model, train, batches(rows=rows[:BATCH]), FIT, device=device)][-1]
    _wait(device)
    start = time.perf_counter()
    for batch in train.epoch(1):
        last = batch.inputs
    last.sum().item()
    return speed, len(rows) / (time.perf_counter() - start)


def timm_step(count: int, device: torch.device) -> float:
    """Images per second of timm's step, over and over on one batch."""
    model = timm.create_model("efficientnet_b2", num_classes=CLASSES).to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.01)
    criterion = LabelSmoothingCrossEntropy(0.1)
    batch = min(BATCH, count)
    inputs = torch.randn(batch, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)
    torch.backends.cudnn.benchmark = True
    model.train()
    steps = -(-(SHOWN if device.type == "cuda" else count) // batch)
    for _ in range(FIT.epochs):
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            with autocast(device):
                loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait(device)
    return steps * batch / (time.perf_counter() - start)


def report(folder: str, count: int, device: torch.device) -> tuple[float, int]:
    """Seconds of the report's job, and the images that it trains on."""
    start = time.perf_counter()
    model, batches = _ready(folder, count, REPORT_SIZE, device)
    train = batches(rows=torch.arange(count), shuffle=True, policy=REPORT.augment)
    for _ in fit(model, train, batches(rows=torch.arange(0, count, 4)), REPORT, device=device):
        pass
    _wait(device)
    return time.perf_counter() - start, train.examples * REPORT.epochs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Run all and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=3312)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device, count = torch.device(arguments.device), arguments.photos
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or (str(REAL) if REAL.is_dir() else draw(Path(scratch, "drawn"), count))
        ours, inputs, timms = [], [], []
        for _ in range(arguments.rounds):
            speed, alone = fruitray(images, count, device)
            ours.append(speed)
            inputs.append(alone)
            timms.append(timm_step(count, device))
        seconds, shown = report(images, count, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"efficientnet_b2, {SIZE} px, batch {BATCH}, on {name}, median of {arguments.rounds} rounds")
    for what, speeds in (("fruitray", ours), ("its input", inputs), ("timm's step", timms)):
        print(f"  {what:11} {statistics.median(speeds):8.1f} images/s")
    for what, speeds, others in (("fruitray trains", ours, "timm's step"), ("its input is", inputs, "fruitray")):
        against = timms if others == "timm's step" else ours
        ratio = statistics.median(speed / other for speed, other in zip(speeds, against, strict=True))
        print(f"  {what} {ratio:.2f} x as fast as {others}")
    print(f"the report's job, {shown:,} images, batch {BATCH}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
