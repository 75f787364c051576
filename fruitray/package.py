"""The model package: `model.safetensors` and `package.json`, all a scorer needs to know. Plain data, no pickle.

`package.json` is written last, so a package that can be opened is whole.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from typing import Any

import numpy
import PIL
import torch
import torchvision
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

import fruitray
from fruitray.backbones import Classifier, skeleton
from fruitray.config import ModelConfig
from fruitray.errors import ModelRejectedError, NotFoundError
from fruitray.preprocess import Preprocessing
from fruitray.storage import Storage, open_storage

FORMAT = 1
DESCRIPTION, WEIGHTS = "package.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Package:
    """A loaded package. `model_id` is the SHA-256 of `package.json`, which in turn names that of the weights."""

    uri: str
    model: Classifier
    classes: tuple[str, ...]
    model_id: str
    description: dict[str, Any]


def save_package(
    storage: Storage, model: Classifier, config: ModelConfig, classes: tuple[str, ...], facts: dict[str, Any]
) -> None:
    """Write the package into `storage`; `facts` (index hash, config, metrics, ...) go into package.json."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = save_safetensors(state)
    description = {
        **facts,
        "format": FORMAT,
        "model": asdict(config),
        "classes": list(classes),
        "preprocessing": asdict(model.preprocessing),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "versions": versions(),
    }
    storage.write(WEIGHTS, weights)
    storage.write(DESCRIPTION, json.dumps(description, indent=2, sort_keys=True).encode())


def read_description(storage: Storage) -> tuple[dict[str, Any], str]:
    """What `package.json` says, and its SHA-256, the model id.

    Raises:
        ModelRejectedError: there is none, or it is not one this version understands.
    """
    try:
        data = storage.read(DESCRIPTION)
    except NotFoundError as error:
        raise ModelRejectedError(storage.uri, f"is no model package: it has no {DESCRIPTION}") from error
    try:
        description: dict[str, Any] = json.loads(data)
        known = description["format"] == FORMAT
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelRejectedError(storage.uri_of(DESCRIPTION), "does not describe a package") from error
    if not known:
        raise ModelRejectedError(storage.uri_of(DESCRIPTION), f"has format {description['format']}, not {FORMAT}")
    return description, hashlib.sha256(data).hexdigest()


def load_package(uri: str) -> Package:
    """Open the package at `uri`: hash verified, loaded strictly, in evaluation mode on the CPU.

    Raises:
        ModelRejectedError: anything about it is wrong.
    """
    storage = open_storage(uri)
    description, model_id = read_description(storage)
    try:
        config, classes = ModelConfig(**description["model"]), _class_names(description["classes"])
        preprocessing = Preprocessing.from_json(description["preprocessing"])
        expected = description["weights_sha256"]
        model = skeleton(config, len(classes), preprocessing)
    except Exception as error:  # values of any type may stand there
        raise ModelRejectedError(storage.uri_of(DESCRIPTION), f"does not describe a package: {error}") from error
    _load_weights(storage, model, expected)
    return Package(uri, model.eval(), classes, model_id, description)


def _class_names(said: Any) -> tuple[str, ...]:
    names = isinstance(said, list) and len(said) > 0 and all(isinstance(name, str) for name in said)
    if not names or len(set(said)) != len(said):
        raise ValueError("the classes are no list of distinct names")
    return tuple(said)


def _load_weights(storage: Storage, model: Classifier, expected: str) -> None:
    uri = storage.uri_of(WEIGHTS)
    try:
        data = storage.read(WEIGHTS)
    except NotFoundError as error:
        raise ModelRejectedError(uri, "is missing") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise ModelRejectedError(uri, f"does not have the SHA-256 that {DESCRIPTION} names")
    try:
        state = load_safetensors(data)
        model.load_state_dict(state)
    except Exception as error:  # safetensors and torch raise types of their own
        raise ModelRejectedError(uri, "does not hold the weights of this model") from error
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ModelRejectedError(uri, "holds weights that are no numbers")


def versions() -> dict[str, str]:
    """Of everything that can change a prediction."""
    return {
        "fruitray": fruitray.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }
