"""How fast `score` is beside other ways to run a model over a folder, and how near to the bare model.

    python -m tests.benchmarks.score [--images FOLDER] [--engine openvino] [--rounds 1]

EfficientNet-B2 at 288 pixels, fresh weights, on two cores. `fruitray` is all of score on a running Ray, from a real S3
server, start-up and commit included; `fruitray busy` is the same run without start-up, by its workers' clocks. `bare`
is the same engine over ready tensors, in two processes. `report` is ImageFolder in one process (fp32, batch 8), `ray`
the documented pattern of Ray Data (read_images, map_batches, write_parquet; fp32), and `timm` what timm's inference.py
does (bf16, channels last, its loader); these three read local files, and only `PEERS_SEE` of the photos. `reading` is
score with a model of no weight, `read_images` is Ray Data's reader from the same server. Last comes what used the CPUs
during all of score, start-up included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from fruitray.backbones import build
from fruitray.config import ModelConfig, ScoreConfig
from fruitray.package import load_package, save_package
from fruitray.s3server import s3_server
from fruitray.storage import open_storage
from tests.benchmarks.audit import REAL, draw, start_ray

SIZE, PROCESSES, PEERS_SEE, BUCKET = 288, 2, 600, "fruit"
CLASSES = ("cherry", "strawberry", "tomato")


def fruitray(place: str, package: str, engine: str) -> dict[str, float]:
    """All of score, and its workers' busy time."""
    import ray

    start_ray()
    out = f"{place}-scores-{Path(package).name}-{engine}-{time.time_ns()}"
    with _cpu_users() as users:
        seconds, rows, busy = timed(place, package, out, engine)
    ray.shutdown()
    speeds = {"fruitray": rows / seconds, "fruitray busy": PROCESSES * rows / busy}
    return speeds | {f"CPU of {user}": 1000 * used / rows for user, used in users.items()}


def timed(place: str, package: str, out: str, engine: Any) -> tuple[float, int, float]:
    """(seconds, rows, seconds that the workers were busy, together) of score on the Ray that runs."""
    from fruitray.cluster import score
    from fruitray.cluster.scorer import Work, score_shards

    seen: list[Work] = []

    def remember(*given: Any) -> Work:
        seen.append(score_shards(*given))
        return seen[-1]

    with mock.patch.object(score, "score_shards", remember):
        start = time.perf_counter()
        score.run(ScoreConfig(package=package, images=(place,), out=out, engine=engine, workers=PROCESSES))
        seconds = time.perf_counter() - start
    return seconds, seen[0].rows, sum(seen[0].seconds.values())


USERS = {"weed": "the server", "fruitray.images:rgb": "decoders", "MapWorker": "workers", "ray": "Ray's own processes"}
"""By a word in the command; the first that fits."""


@contextmanager
def _cpu_users() -> Iterator[dict[str, float]]:
    """Yields seconds of CPU by user, of all processes there are meanwhile, known when the context ends."""
    first, last, over, users = {}, {}, threading.Event(), Counter[str]()
    begin = time.time()

    def look() -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words, times = " ".join(process.cmdline()), process.cpu_times()
                used, key = times.user + times.system, (process.pid, process.create_time())
                first.setdefault(key, used if process.create_time() < begin else 0.0)
                user = "the driver" if process.pid == os.getpid() else None
                last[key] = user or next((user for word, user in USERS.items() if word in words), "others"), used

    def watch() -> None:
        while not over.wait(1):
            look()

    look()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield users
    finally:
        over.set()
        watcher.join()
        look()
        for key, (user, used) in last.items():
            users[user] += used - first[key]


def reading(place: str, package: str, engine: str) -> dict[str, float]:
    """Score with the package beside `package` that computes next to nothing."""
    return {"reading": fruitray(place, f"{package}-tiny", "eager")["fruitray busy"]}


def read_images(place: str, package: str, engine: str) -> dict[str, float]:
    """Ray Data's own reader, from the same server, to the same size."""
    import pyarrow.fs
    import ray
    import ray.data

    start_ray()
    files, path = pyarrow.fs.FileSystem.from_uri(place)
    start = time.perf_counter()
    read = ray.data.read_images(path, filesystem=files, size=(SIZE, SIZE), mode="RGB")
    count = sum(len(batch["image"]) for batch in read.iter_batches(batch_size=64))
    seconds = time.perf_counter() - start
    ray.shutdown()
    return {"read_images": count / seconds}


def bare(place: str, package: str, engine: str) -> dict[str, float]:
    """The engine over ready tensors: what no pipeline can beat."""
    code = f"from tests.benchmarks.score import bare_process as run; print(run({package!r}, {engine!r}))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(PROCESSES)
    ]
    return {"bare": sum(float(process.communicate()[0].split()[-1]) for process in processes)}


def bare_process(package: str, name: Any) -> float:
    """Images per second of one of them."""
    from fruitray.engines import make_engine
    from fruitray.memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    engine = make_engine(name, load_package(package).model, torch.device("cpu"))
    photos = torch.randint(256, (512, 3, SIZE, SIZE), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    engine(photos[:32])
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < 10:
        engine(photos[:64])
    start, passes = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 10:
        engine(photos[64 * (passes % 8) :][:64])
        passes += 1
    return 64 * passes / seconds


def _network(package: str) -> torch.nn.Module:
    model = load_package(package).model
    return torch.nn.Sequential(model.trunk, model.head).eval()


def report(folder: str, package: str, engine: str) -> dict[str, float]:
    """The report's own way."""
    from torchvision import datasets
    from torchvision.transforms import v2

    steps = [v2.Resize((SIZE, SIZE)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    data = datasets.ImageFolder(folder, v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.5] * 3)]))
    network = _network(package).to(memory_format=torch.contiguous_format)
    start, count = time.perf_counter(), 0
    with torch.no_grad():
        for photos, _ in torch.utils.data.DataLoader(data, batch_size=8):
            network(photos).softmax(dim=1)
            count += len(photos)
    return {"report": count / (time.perf_counter() - start)}


def timm(folder: str, package: str, engine: str) -> dict[str, float]:
    """What timm's inference.py does at its best settings."""
    import timm.data

    network = _network(package).to(memory_format=torch.channels_last)
    data = timm.data.create_dataset(root=folder, name="")
    start, count = time.perf_counter(), 0
    options = {"batch_size": 8, "use_prefetcher": False, "num_workers": 1, "crop_pct": 1.0, "device": "cpu"}
    loader = timm.data.create_loader(data, input_size=(3, SIZE, SIZE), **options)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for photos, _ in loader:
            network(photos.contiguous(memory_format=torch.channels_last)).float().softmax(dim=1)
            count += len(photos)
    return {"timm": count / (time.perf_counter() - start)}


class _Predict:
    """Of Ray Data's documented pattern."""

    def __init__(self, package: str) -> None:
        self.network = _network(package)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        photos = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            return {"path": batch["path"], "label": self.network(photos).argmax(dim=1).numpy()}


def ray_pattern(folder: str, package: str, engine: str) -> dict[str, float]:
    """Ray Data's documented pattern."""
    import ray
    import ray.data

    start_ray()
    count = sum(path.is_file() for path in Path(folder).rglob("*"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        read = ray.data.read_images(folder, size=(SIZE, SIZE), mode="RGB", include_paths=True)
        pool = ray.data.ActorPoolStrategy(size=1)  # the reader needs the other core
        predicted = read.map_batches(_Predict, fn_constructor_args=(package,), batch_size=32, compute=pool)
        predicted.write_parquet(out)
    seconds = time.perf_counter() - start
    ray.shutdown()
    return {"ray": count / seconds}


FROM_S3 = (fruitray, bare, reading, read_images)
LOCAL = (report, ray_pattern, timm)
CONTENDERS = {function.__name__: function for function in (*FROM_S3, *LOCAL)}


def measure(name: str, place: str, package: str, engine: str) -> dict[str, float]:
    """What the contender answers, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.score", "--only", name, place, package, "--engine", engine]
    environment = os.environ | {"OMP_NUM_THREADS": "1" if name in ("fruitray", "reading") else str(PROCESSES)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    speeds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return speeds


def save_fresh(folder: Path, config: ModelConfig) -> str:
    """A package of a network with fresh weights."""
    model, _ = build(config, len(CLASSES))
    save_package(open_storage(str(folder)), model.eval(), config, CLASSES, {})
    return str(folder)


def main() -> None:
    """Run all contenders and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=None)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs=3, metavar=("CONTENDER", "PLACE", "PACKAGE"))
    arguments = parser.parse_args()
    if arguments.only:
        name, place, package = arguments.only
        print(json.dumps(CONTENDERS[name](place, package, arguments.engine)))
        return
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images = Path(arguments.images or (REAL if REAL.is_dir() else draw(scratch / "drawn", 1500)))
        package = save_fresh(scratch / "b2", ModelConfig(backbone="efficientnet_b2", weights="none", image_size=SIZE))
        save_fresh(scratch / "b2-tiny", ModelConfig(backbone="mlp", weights="none", image_size=32))
        files = sorted(path for path in images.rglob("*") if path.is_file())
        for path in files[:: max(1, len(files) // PEERS_SEE)]:
            some = scratch / "some" / path.relative_to(images)
            some.parent.mkdir(parents=True, exist_ok=True)
            some.symlink_to(path)
        server = stack.enter_context(s3_server(scratch / "s3", buckets=[BUCKET]))
        os.environ.update(server.environment)
        raw = open_storage(f"s3://{BUCKET}/raw")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: raw.write(str(path.relative_to(images)), path.read_bytes()), files))
        places = dict.fromkeys(FROM_S3, raw.uri) | dict.fromkeys(LOCAL, str(scratch / "some"))
        rounds: list[dict[str, float]] = []
        for _ in range(arguments.rounds):
            rounds.append({})
            for function, place in places.items():
                rounds[-1].update(measure(function.__name__, place, package, arguments.engine))
        _show(rounds, len(files), arguments.engine)


def _show(rounds: list[dict[str, float]], photos: int, engine: str) -> None:
    print(f"{photos:,} photos, engine {engine}, {PROCESSES} cores, median of {len(rounds)} rounds")
    for name in rounds[0]:
        unit = "ms a photo" if name.startswith("CPU") else "images/s"
        print(f"  {name:26} {statistics.median(speeds[name] for speeds in rounds):8.1f} {unit}")
    pairs = [("fruitray", other) for other in ("report", "ray", "timm", "bare")]
    for one, other in [*pairs, ("fruitray busy", "bare"), ("reading", "read_images")]:
        ratio = statistics.median(speeds[one] / speeds[other] for speeds in rounds)
        print(f"  {one}: {ratio:.2f} x {other}")


if __name__ == "__main__":
    main()
