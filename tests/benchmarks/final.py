"""The final fine-tune through S3, from photos to scores, on an object store of this machine.

    python -m tests.benchmarks.final [--images FOLDER] [--weights FILE] [--backbone timm/NAME] [OPTION OF TRAIN ...]

The jobs run as they do for a person, one after the other. What the model reached stands in what `train` prints; at the
end it says how far what `score` predicts is from what `predictor` predicts in this process, and how long the jobs took.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq

import fruitray
from fruitray.s3server import s3_server
from fruitray.storage import Storage, open_storage
from tests.benchmarks.audit import REAL

BUCKET = "final"
WEIGHTS = REAL.parents[1] / "weights" / "tf_efficientnetv2_b0.safetensors"


def job(name: str, *options: str) -> float:
    """Seconds that the job took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"jobs.{name}", *options], check=True)
    return time.perf_counter() - start


def compare(scores: Storage, package: str, photos: Storage) -> None:
    """Print how many labels of `score` and `predictor` differ, and the greatest difference of any score."""
    predictor, differing, greatest, count = fruitray.load(package), 0, 0.0, 0
    for entry in scores.list("data/"):
        rows = pq.read_table(pa.BufferReader(scores.read(entry.key))).to_pylist()
        keys = [row["uri"].removeprefix(f"{photos.uri}/") for row in rows]
        for row, told in zip(rows, predictor.predict([photos.read(key) for key in keys]), strict=True):
            assert row["status"] == told.status
            differing += row["label"] != told.label
            one, other = (dict(zip(*lists, strict=True)) for lists in (_lists(row), _lists(asdict(told))))
            greatest = max([greatest, *(abs(share - other.get(label, 0.0)) for label, share in one.items())])
        count += len(rows)
    print(f"{differing} of {count:,} photos get another label of predictor; scores differ by {greatest:.1g} at most")


def _lists(row: dict[str, Any]) -> tuple[list[str], list[float]]:
    return row["top_labels"] or [], row["top_scores"] or []


def main() -> None:
    """Upload, prepare, train, score, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", default=str(REAL))
    parser.add_argument("--weights", default=str(WEIGHTS))
    parser.add_argument("--backbone", default="timm/tf_efficientnetv2_b0")
    given, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch, s3_server(Path(scratch), buckets=[BUCKET]) as server:
        os.environ.update(server.environment)
        boto3.setup_default_session()
        root = open_storage(f"s3://{BUCKET}")
        weights = Path(given.weights)
        root.write(f"weights/{weights.name}", weights.read_bytes())
        for path in sorted(path for path in Path(given.images).rglob("*") if path.is_file()):
            root.write(f"raw/{path.relative_to(given.images).as_posix()}", path.read_bytes())
        raw, index, model, scores = (root.uri_of(name) for name in ("raw", "index", "model", "scores"))
        network = ["--backbone", given.backbone, "--weights", root.uri_of(f"weights/{weights.name}")]
        seconds = {
            "prepare": job("prepare", "--images", raw, "--out", index),
            "train": job("train", "--index", index, "--out", model, *network, *options),
            "score": job("score", "--package", model, "--images", raw, "--out", scores, "--engine", "eager"),
        }
        job("verify", "--out", scores)
        compare(open_storage(scores), model, open_storage(raw))
    print(", ".join(f"{name} took {spent / 60:.1f} min" for name, spent in seconds.items()))


if __name__ == "__main__":
    main()
