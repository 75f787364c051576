"""The model package: all a scorer needs to know, and what is known of the model. Plain data, no pickle.

    package.json          the contract: network, classes, preprocessing, inference; the SHA-256 of every other file
    model.safetensors     the weights
    ...                   of a trained model, its evaluation, history, predictions and model card

`package.json` is written last, so a package that can be opened is whole. One whose files are not those that it names is
refused, the ones that no scorer reads, too: figures of another model are as wrong as its weights.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fruitray.backbones import Classifier, skeleton
from fruitray.config import ModelConfig
from fruitray.errors import ModelRejectedError, NotFoundError
from fruitray.inference import UNCALIBRATED, Inference
from fruitray.machine import versions
from fruitray.preprocess import Preprocessing
from fruitray.storage import Storage, open_storage

FORMAT = 2
DESCRIPTION, WEIGHTS = "package.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Package:
    """A loaded package. `model_id` is the SHA-256 of `package.json`, which in turn names those of all other files."""

    uri: str
    model: Classifier
    classes: tuple[str, ...]
    inference: Inference
    model_id: str
    description: dict[str, Any]


def save_package(
    storage: Storage,
    model: Classifier,
    config: ModelConfig,
    classes: tuple[str, ...],
    facts: dict[str, Any],
    *,
    inference: Inference = UNCALIBRATED,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the package into `storage`: `facts` (index hash, config, metrics, ...) into package.json, `files` beside
    it, by name."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    files = {**(files or {}), WEIGHTS: save_safetensors(state)}
    description = {
        **facts,
        **asdict(inference),
        "format": FORMAT,
        "model": asdict(config),
        "classes": list(classes),
        "preprocessing": asdict(model.preprocessing),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "versions": versions(),
    }
    for name, data in files.items():
        storage.write(name, data)
    storage.write(DESCRIPTION, json.dumps(description, indent=2, sort_keys=True).encode())


def is_whole(storage: Storage) -> bool:
    """Whether there is a package in `storage` that can be loaded."""
    try:
        load_package(storage.uri)
    except ModelRejectedError:
        return False
    return True


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
    """Open the package at `uri`: all files verified, loaded strictly, in evaluation mode on the CPU.

    Raises:
        ModelRejectedError: anything about it is wrong.
    """
    storage = open_storage(uri)
    description, model_id = read_description(storage)
    try:
        for part, kind in (("model", ModelConfig), ("preprocessing", Preprocessing)):
            _require_whole(part, description[part], kind)
        config, classes = ModelConfig(**description["model"]), _class_names(description["classes"])
        preprocessing = Preprocessing.from_json(description["preprocessing"])
        inference, names = Inference.from_json(description), _file_names(description["files"])
        model = skeleton(config, len(classes), preprocessing)
    except Exception as error:  # values of any type may stand there
        raise ModelRejectedError(storage.uri_of(DESCRIPTION), f"does not describe a package: {error}") from error
    for name in names:
        data = read_file(storage, description, name)
        if name == WEIGHTS:
            _load_weights(storage.uri_of(name), model, data)
    return Package(uri, model.eval(), classes, inference, model_id, description)


def _require_whole(part: str, said: Any, kind: type[Any]) -> None:
    """Nothing is left to a default, which may be another than what the network was trained with."""
    if missing := {field.name for field in fields(kind)} - set(said):
        raise ValueError(f"{part} lacks {', '.join(sorted(missing))}")


def _file_names(said: Any) -> list[str]:
    """The names in `files`: plain ones, so that no description leads out of its folder."""
    if WEIGHTS not in said or not all(re.fullmatch(r"\w[\w.-]*", name) for name in said):
        raise ValueError(f"the files are no plain names, {WEIGHTS} among them")
    return list(said)


def read_file(storage: Storage, description: Mapping[str, Any], name: str) -> bytes:
    """A file of the package that `description` describes.

    Raises:
        ModelRejectedError: it is missing, or not the one that was written with the description.
    """
    try:
        expected = description["files"][name]
    except (TypeError, KeyError) as error:
        raise ModelRejectedError(storage.uri_of(DESCRIPTION), f"does not describe a package: no {name}") from error
    try:
        data = storage.read(name)
    except NotFoundError as error:
        raise ModelRejectedError(storage.uri_of(name), "is missing") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise ModelRejectedError(storage.uri_of(name), f"does not have the SHA-256 that {DESCRIPTION} names")
    return data


def _class_names(said: Any) -> tuple[str, ...]:
    names = isinstance(said, list) and len(said) > 0 and all(isinstance(name, str) for name in said)
    if not names or len(set(said)) != len(said):
        raise ValueError("the classes are no list of distinct names")
    return tuple(said)


def _load_weights(uri: str, model: Classifier, data: bytes) -> None:
    try:
        state, wanted = load_safetensors(data), model.state_dict()
        if any(state[name].dtype != tensor.dtype for name, tensor in wanted.items()):
            raise ValueError("of other types")
        model.load_state_dict(state)
    except Exception as error:  # safetensors and torch raise types of their own
        raise ModelRejectedError(uri, "does not hold the weights of this model") from error
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ModelRejectedError(uri, "holds weights that are no numbers")
