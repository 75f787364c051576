"""A model package in a form that others run, ONNX or torch.export, checked on photos before it is kept.

    package -> Exported -> program -> file -> its own runtime, beside the package's model -> storage

`export.json` is written last, so an export that has one is whole and has answered as its package does.
"""

import copy
import hashlib
import importlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim, ExportedProgram

from fruitray.backbones import Classifier
from fruitray.errors import ExportError, ImageError, NoInputError, OutputConflictError, UsageError
from fruitray.images import decode, fetch, list_images
from fruitray.machine import versions
from fruitray.package import Package
from fruitray.preprocess import Preprocessing, stack
from fruitray.storage import Storage
from fruitray.synthetic import LABELS, draw

DESCRIPTION = "export.json"
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
"""Packages that only one format asks for."""
INPUT, OUTPUT = "photos", "probabilities"
PHOTOS = 16
"""How many photos the exported model is checked on, at most."""
TOLERANCE = 1e-4
"""By how much a class's share may differ. The same float32 sums in another order were measured to give 1e-6, so there
is room for deeper networks; bfloat16, in which `score` computes where the device is fast at it, gives 2e-2."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""(B, 3, S, S) uint8 -> (B, C) float32 shares of the classes."""


class Exported(nn.Module):
    """What is exported: (B, 3, S, S) uint8 -> (B, C) float32 softmax shares. All of it in float32, on any machine."""

    def __init__(self, package: Package) -> None:
        super().__init__()
        self.package = package
        model = copy.deepcopy(package.model).requires_grad_(False)
        self.model = model.to(memory_format=torch.contiguous_format)
        self.model.full_precision = True

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, C) float32 shares, whose sum is 1."""
        return shares(self.package, self.model, photos)


def shares(package: Package, model: Classifier, photos: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) uint8 -> (B, C) float32 shares, as `package` says that they come from the logits of `model`."""
    return package.inference.scores(package.inference.logits(model, photos))


def require_runtime(kind: str) -> None:
    """Raise `UsageError` unless the packages that `kind` needs are installed."""
    for name in NEEDED[kind]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"--format {kind}: needs {name}: pip install fruitray[export]") from error


def require_free(out: Storage, model_id: str, kind: str) -> None:
    """Raise `OutputConflictError` if another model, or another format of it, was exported to `out`."""
    if not out.exists(DESCRIPTION):
        return
    try:
        standing = json.loads(out.read(DESCRIPTION))
        same = (standing["model_id"], standing["format"]) == (model_id, kind)
    except (ValueError, TypeError, KeyError):
        same = False
    if not same:
        raise OutputConflictError(out.uri_of(DESCRIPTION), "is of another model or format; choose another --out")


def read_squares(images: Storage | None, preprocessing: Preprocessing) -> torch.Tensor:
    """(N, 3, S, S) uint8: up to `PHOTOS` photos from below `images`, the same ones each time; else drawn ones.

    Raises:
        NoInputError: no photo below `images` can be read.
    """
    found = _drawn() if images is None else _read(images)
    squares = [preprocessing.resize(pixels) for pixels, _ in zip(found, range(PHOTOS), strict=False)]
    if not squares:
        assert images is not None
        raise NoInputError(images.uri)
    return stack(squares)


def _drawn() -> Iterator[NDArray[np.uint8]]:
    for number in range(PHOTOS):
        yield np.asarray(draw(LABELS[number % len(LABELS)], number)).transpose(2, 0, 1)


def _read(images: Storage) -> Iterator[NDArray[np.uint8]]:
    """Each photo below `images` that can be read, in an order that mixes its folders."""
    entries, _ = list_images(images)
    random.Random(0).shuffle(entries)
    for content in fetch(images, entries):
        try:
            if isinstance(content, ImageError):
                raise content
            yield decode(content).pixels
        except ImageError:
            continue


def export(package: Package, kind: str, images: Storage | None, out: Storage) -> dict[str, Any]:
    """Write `package` as `kind` into `out`, once it has answered as it should on photos of `images`, or on drawn ones;
    answers what `export.json` says.

    Raises:
        NoInputError: no photo below `images` can be read.
        ExportError: the model cannot be exported, or its export answers otherwise.
    """
    squares = read_squares(images, package.model.preprocessing)
    model = Exported(package).eval()
    with tempfile.TemporaryDirectory(prefix="fruitray-") as folder:
        path = Path(folder, FILES[kind])
        try:
            _WRITERS[kind](_program(model), path)
            found = _answers(_OPENERS[kind](path), squares)
        except Exception as error:  # exporters and runtimes raise types of their own
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ExportError(package.uri, f"cannot be exported as {FILES[kind]}: {said}") from error
        parity = _parity(model, found, squares)
        data = path.read_bytes()
    parity["images"] = images.uri if images else "drawn"
    description = _describe(package, kind, data) | {"parity": parity}
    out.write(FILES[kind], data)
    out.write(DESCRIPTION, json.dumps(description, indent=2).encode())
    return description


def _program(model: Exported) -> ExportedProgram:
    """The graph of `model` for batches of any size from 1."""
    size = model.model.preprocessing.size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    return torch.export.export(model, (example,), dynamic_shapes={INPUT: {0: Dim("batch", min=1)}})


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert written is not None
    written.save(path, external_data=False)
    if len(list(path.parent.iterdir())) > 1:
        raise ValueError("it is over 2 GB, more than one ONNX file holds; --format torch has no such limit")


def _write_torch(program: ExportedProgram, path: Path) -> None:
    program.example_inputs = None  # they would be pickled; the rest is JSON and plain bytes
    torch.export.save(program, path)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda photos: torch.from_numpy(session.run([OUTPUT], {INPUT: photos.contiguous().numpy()})[0])


def _open_torch(path: Path) -> Run:
    return torch.export.load(path).module()


_WRITERS = {"onnx": _write_onnx, "torch": _write_torch}
_OPENERS = {"onnx": _open_onnx, "torch": _open_torch}


def _answers(run: Run, squares: torch.Tensor) -> torch.Tensor:
    """(N + 1, C) shares of all photos in one batch and of the first one alone."""
    with torch.inference_mode():
        return torch.cat([run(squares), run(squares[:1])])


def _parity(model: Exported, found: torch.Tensor, squares: torch.Tensor) -> dict[str, Any]:
    """By how much the exported model's shares differ from the package's.

    Raises:
        ExportError: by more than `TOLERANCE`, or they are no numbers.
    """
    package = model.package
    expected = _answers(model, squares)
    scored = _answers(lambda photos: shares(package, package.model, photos), squares)
    difference, from_score = ((found - others).abs().max().item() for others in (expected, scored))
    if not difference <= TOLERANCE:
        reason = f"exported, it answers otherwise: a class's share differs by {difference:.2g}, over {TOLERANCE:g}"
        raise ExportError(package.uri, reason)
    return {
        "photos": len(squares),
        "greatest_difference": difference,
        "tolerance": TOLERANCE,
        "greatest_difference_from_score": from_score,
    }


def _describe(package: Package, kind: str, data: bytes) -> dict[str, Any]:
    """What a user of the file has to know."""
    preprocessing = package.model.preprocessing
    size = preprocessing.size
    return {
        "format": kind,
        "file": FILES[kind],
        "sha256": hashlib.sha256(data).hexdigest(),
        "package": package.uri,
        "model_id": package.model_id,
        "classes": list(package.classes),
        "input": {"name": INPUT, "shape": ["batch", 3, size, size], "layout": "NCHW, RGB", "dtype": "uint8"},
        "preprocessing": {
            "orientation": "upright, by EXIF",
            "crop": preprocessing.crop,
            "resize": [size, size],
            "interpolation": preprocessing.interpolation,
            "antialias": True,
            "normalisation": "inside the model",
        },
        "output": {"name": OUTPUT, "shape": ["batch", len(package.classes)], "dtype": "float32", "softmax": True},
        "temperature": package.inference.temperature,
        "tta": package.inference.tta,
        "versions": versions() | {name: version(name) for name in NEEDED[kind]},
    }
