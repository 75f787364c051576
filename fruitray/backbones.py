"""The networks: how each is built, what it wants as input, which part of it is the head.

A `Classifier` takes raw uint8 squares and normalises them itself, so nobody outside can get that wrong.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from torch import nn

from fruitray.config import REPORT_BACKBONES, SCRATCH, ModelConfig, require
from fruitray.errors import UsageError
from fruitray.preprocess import Preprocessing
from fruitray.weights import Weights, download, load_all_but_head, load_file, state_hash, timm_pretrained


class Classifier(nn.Module):
    """A trunk that embeds photos and a head that tells classes: (B, 3, S, S) uint8 -> (B, C) float32 logits.

    The trunk computes in bfloat16 where the device is fast at it; normalisation and the head stay in float32.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.preprocessing = preprocessing
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def embed(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, what the head sees."""
        inputs = (photos.float() - self.mean) / self.std
        with autocast(photos.device):
            embedding: torch.Tensor = self.trunk(inputs)
        return embedding.float()

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, C) float32 logits."""
        logits: torch.Tensor = self.head(self.embed(photos))
        return logits


def build(config: ModelConfig, classes: int, seed: int = 0) -> tuple[Classifier, Weights]:
    """A new classifier with `classes` outputs; its random parts are drawn from `seed`: same call, same bits.

    Raises:
        UsageError: no such backbone, or its package is missing.
        WeightsError: the weights cannot be had.
        ModelRejectedError: the weights file is broken or belongs to another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plan, weights = _plan(config)
        head = plan.head(classes, plan.dropout if config.dropout is None else config.dropout)
    preprocessing = plan.preprocessing
    if config.image_size:
        preprocessing = replace(preprocessing, size=config.image_size)
    model = Classifier(plan.trunk, head, preprocessing)
    return model.to(memory_format=torch.channels_last), weights


def skeleton(config: ModelConfig, classes: int, preprocessing: Preprocessing) -> Classifier:
    """The classifier of a package before its weights are loaded: same shapes, no download."""
    model, _ = build(replace(config, weights="none", frozen=False, image_size=preprocessing.size), classes)
    return Classifier(model.trunk, model.head, preprocessing).to(memory_format=torch.channels_last)


def freeze(model: Classifier) -> None:
    """Leave only the head to train."""
    model.trunk.requires_grad_(False)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all, trained) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def pick_device(*, gpu: bool) -> torch.device:
    """The GPU if it is wanted and this process sees one, else the CPU. A Ray worker may see GPUs it did not reserve."""
    return torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 for what may lose precision, on devices that are fast at it; elsewhere nothing."""
    cpu_is_fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # private, so it may go: then False
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_is_fast()
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a builder answers: the trunk with its weights, how to make a head, and the defaults."""

    trunk: nn.Module
    head: Callable[[int, float], nn.Module]
    dropout: float
    preprocessing: Preprocessing


def _plan(config: ModelConfig) -> tuple[_Plan, Weights]:
    name = config.backbone
    if name in SCRATCH:
        size = config.image_size or 300
        return (_mlp(size) if name == "mlp" else _cnn(size)), Weights("none", None)
    if name.startswith("timm/"):
        return _timm(config)
    if name in _TORCHVISION_HEADS:
        return _torchvision(config)
    known = ", ".join((*REPORT_BACKBONES, "mobilenet_v2", "timm/NAME"))
    raise UsageError(f"--backbone {name}: no such backbone; there are {known}")


def _mlp(size: int) -> _Plan:
    """The report's perceptron: 270,000-255-3 on 300x300 photos."""
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 255), nn.ReLU())
    return _Plan(trunk, _linear_head(255), 0.0, _plain(size))


def _cnn(size: int) -> _Plan:
    """The report's network: two 5x5 convolutions with pooling, then 120 and 84 units with two dropout layers."""
    side = ((size - 4) // 2 - 4) // 2
    convolutions = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    trunk = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * side * side, 120), nn.ReLU())
    return _Plan(trunk, _two_layer_head(120, 84, first_dropout=True), 0.5, _plain(size))


def _plain(size: int) -> Preprocessing:
    return Preprocessing(size=size, crop=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _linear_head(features: int) -> Callable[[int, float], nn.Module]:
    return lambda classes, dropout: nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))


def _two_layer_head(
    features: int, hidden: int, *, first_dropout: bool = False, standardise: bool = False
) -> Callable[[int, float], nn.Module]:
    def make(classes: int, dropout: float) -> nn.Module:
        before: list[nn.Module] = [nn.LayerNorm(features, elementwise_affine=False)] if standardise else []
        before += [nn.Dropout(dropout)] if first_dropout else []
        return nn.Sequential(
            *before, nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )

    return make


_TORCHVISION_HEADS: dict[str, tuple[str, Callable[[int, float], nn.Module], float]] = {
    "vgg16": ("classifier.6", _two_layer_head(4096, 256), 0.5),
    "resnet50": ("fc", _two_layer_head(2048, 256), 0.2),
    "efficientnet_b2": ("classifier", _linear_head(1408), 0.3),
    "mobilenet_v2": ("classifier", _two_layer_head(1280, 256, first_dropout=True, standardise=True), 0.2),
}
"""Name -> (the module that the head replaces, the head, its dropout). The first three as in the report."""


def _torchvision(config: ModelConfig) -> tuple[_Plan, Weights]:
    place, head, dropout = _TORCHVISION_HEADS[config.backbone]
    official = torchvision.models.get_model_weights(config.backbone).DEFAULT
    network = torchvision.models.get_model(config.backbone, weights=None)
    given = official.transforms()
    preprocessing = Preprocessing(
        size=given.crop_size[0],
        crop=given.crop_size[0] / given.resize_size[0],
        interpolation=given.interpolation.value,
        mean=tuple(given.mean),
        std=tuple(given.std),
    )
    weights = Weights("none", None)
    if config.weights == "imagenet":
        state = download(
            config.backbone, lambda: official.get_state_dict(progress=False, check_hash=True, weights_only=True)
        )
        weights = Weights(official.url, load_all_but_head(network, state, (place,), official.url))
    elif config.weights != "none":
        weights, preprocessing = load_file(config, network, (place,), preprocessing)
    network.set_submodule(place, nn.Identity())
    return _Plan(network, head, dropout, preprocessing), weights


def _timm(config: ModelConfig) -> tuple[_Plan, Weights]:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UsageError(f"--backbone {config.backbone}: needs timm: pip install timm") from error
    name = config.backbone.removeprefix("timm/")
    if name not in timm.list_models() and name not in timm.list_pretrained():
        raise UsageError(f"--backbone {config.backbone}: timm has no model of this name")
    if config.weights == "imagenet":
        network = download(config.backbone, lambda: timm_pretrained(name))
    else:
        network = timm.create_model(name, pretrained=False)
    given = timm.data.resolve_data_config(model=network, use_test_size=True)
    preprocessing = Preprocessing(
        size=given["input_size"][1],
        crop=given["crop_pct"],
        interpolation="bilinear" if given["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
    )
    fits = config.image_size in (None, preprocessing.size) or not network.pretrained_cfg.get("fixed_input_size")
    require(fits, "image_size", config.image_size, f"{config.backbone} takes {preprocessing.size} and nothing else")
    weights = Weights("none", None)
    if config.weights == "imagenet":
        weights = Weights(f"timm:{name}", state_hash(network.state_dict()))
    elif config.weights != "none":
        heads = network.pretrained_cfg["classifier"] or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        weights, preprocessing = load_file(config, network, heads, preprocessing)
    network.reset_classifier(0)
    head = _two_layer_head(network.head_hidden_size, 256, first_dropout=True, standardise=True)
    return _Plan(network, head, 0.2, preprocessing), weights
