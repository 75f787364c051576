"""Where a trunk's weights come from: a library's download, or a file of one's own, read without running code in it."""

import contextlib
import hashlib
import io
import json
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from fruitray.config import ModelConfig
from fruitray.errors import FruitrayError, ModelRejectedError, NotFoundError, WeightsError
from fruitray.preprocess import Preprocessing
from fruitray.storage import open_file

State = Mapping[str, torch.Tensor]
Got = TypeVar("Got")

SILENCE_S = 6
"""How long a download may wait for a connection, or for the next bytes, before it has failed."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a trunk starts from. `sha256` is of the file, or of the tensors where the library downloaded them."""

    source: str
    sha256: str | None


RANDOM = Weights("none", None)


def download(backbone: str, get: Callable[[], Got]) -> Got:
    """What `get` downloads, or takes from the library's cache.

    Raises:
        WeightsError: it cannot be had.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        return get()
    except Exception as error:  # urllib, ssl, socket, hub and hash errors alike
        raise WeightsError(backbone, f"the download failed ({str(error).partition(chr(10))[0]})") from error
    finally:
        socket.setdefaulttimeout(before)


def timm_pretrained(name: str) -> Any:
    """timm's network with its weights, from the hub's cache or the hub, which timm itself would ask for a minute."""
    import huggingface_hub as hub
    import timm
    from huggingface_hub.errors import HfHubHTTPError

    origin = timm.get_pretrained_cfg(name)
    if origin and origin.hf_hub_id:
        repo, file = origin.hf_hub_id.partition("@")[0], origin.hf_hub_filename or "model.safetensors"
        cached = hub.try_to_load_from_cache(repo, file)
        if isinstance(cached, str) and not origin.custom_load:
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": cached})
        with contextlib.suppress(HfHubHTTPError):  # a refusal is an answer
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=SILENCE_S)
    return timm.create_model(name, pretrained=True)


def load_file(
    config: ModelConfig, network: nn.Module, heads: tuple[str, ...], preprocessing: Preprocessing
) -> tuple[Weights, Preprocessing]:
    """Load a weights file into `network`, and correct the preprocessing by the NAME.json that may lie beside it."""
    uri = config.weights
    if not uri.endswith((".safetensors", ".pt", ".pth", ".bin")):
        uri = f"{uri.rstrip('/')}/{config.backbone.removeprefix('timm/')}.safetensors"
    storage, key = open_file(uri)
    try:
        data = storage.read(key)
    except NotFoundError as error:
        raise WeightsError(config.backbone, f"{uri} does not exist") from error
    load_all_but_head(network, _parse(uri, data), heads, uri)
    beside = key.rpartition(".")[0] + ".json"
    if storage.exists(beside):
        try:
            preprocessing = Preprocessing.from_json(asdict(preprocessing) | json.loads(storage.read(beside)))
        except (ValueError, TypeError, FruitrayError) as error:
            raise ModelRejectedError(storage.uri_of(beside), f"not preprocessing: {error}") from error
    return Weights(uri, hashlib.sha256(data).hexdigest()), preprocessing


def _parse(uri: str, data: bytes) -> State:
    try:
        if uri.endswith(".safetensors"):
            return dict(load_safetensors(data))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise TypeError("a checkpoint with more than tensors")
        return {str(name): tensor for name, tensor in state.items()}
    except Exception as error:
        raise ModelRejectedError(uri, f"not a file of weights ({type(error).__name__})") from error


def load_all_but_head(network: nn.Module, state: State, heads: tuple[str, ...], uri: str) -> str:
    """Load strictly, the head (which is about to be replaced) aside; answers the hash of what was loaded."""
    replaced = tuple(f"{head}." for head in heads)
    trunk = {_present_name(name): tensor for name, tensor in state.items() if not name.startswith(replaced)}
    try:
        keys = network.load_state_dict(trunk, strict=False)
    except RuntimeError as error:
        raise ModelRejectedError(uri, "the shapes belong to another network") from error
    missing = [name for name in keys.missing_keys if not name.startswith(replaced)]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or keys.unexpected_keys:
        odd = (missing + keys.unexpected_keys)[0]
        raise ModelRejectedError(uri, f"belongs to another network ({len(missing)} tensors missing, first odd: {odd})")
    return state_hash(trunk)


def _present_name(name: str) -> str:
    """Official files of DenseNet still say `denselayer1.norm.1.weight` for what is `denselayer1.norm1.weight` now."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def state_hash(state: State) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
