"""The networks by name: how each is built, what it wants as input, what its head is like."""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fruitray.config import SCRATCH, ModelConfig, require
from fruitray.errors import UsageError
from fruitray.preprocess import Preprocessing
from fruitray.weights import RANDOM, Weights, download, load_all_but_head, load_file, state_hash, timm_pretrained


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """How to make a head: (B, features) float32 -> (B, C) float32 logits."""

    features: int
    hidden: int
    """Units of the hidden layer; 0: none, one linear layer is all."""
    dropout: float
    dropout_first: bool = True
    """Whether there is dropout before a hidden layer, too."""
    standardise: bool = False
    """Give each embedding mean 0 and deviation 1 first."""

    def build(self, classes: int) -> nn.Sequential:
        """A new head of random weights."""
        layers: list[nn.Module] = []
        if self.standardise:
            layers.append(nn.LayerNorm(self.features, elementwise_affine=False))
        if self.dropout_first or not self.hidden:
            layers.append(nn.Dropout(self.dropout))
        if self.hidden:
            layers += [nn.Linear(self.features, self.hidden), nn.ReLU(), nn.Dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(self.hidden or self.features, classes))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a classifier is made of: (B, 3, S, S) float32 -> trunk -> (B, D) -> head."""

    trunk: nn.Module
    """With its weights."""
    head: Head
    """The backbone's own."""
    preprocessing: Preprocessing
    weights: Weights = RANDOM


def plan(config: ModelConfig) -> Plan:
    """The backbone of `config`, its random parts drawn from torch's global generator.

    Raises:
        UsageError: no such backbone, or its package is missing, or it does not take this image size.
        WeightsError: the weights cannot be had.
        ModelRejectedError: the weights file is broken or belongs to another network.
    """
    name = config.backbone
    if name in SCRATCH:
        size = config.image_size or (128 if name == "cnn_bn" else 300)
        trunk, head = {"mlp": mlp, "cnn": cnn, "cnn_bn": cnn_bn}[name](size)
        return Plan(trunk, head, Preprocessing(size=size, crop=0.0, mean=_HALF, std=_HALF))
    if name.startswith("timm/"):
        return _timm(config)
    from torchvision import models  # on use, as below: it takes a second to load

    classifiers = models.list_models(module=models)
    if name in classifiers:
        return _torchvision(config)
    near = _near(name, (*SCRATCH, *classifiers))
    kinds = f"{', '.join(SCRATCH)}, the classifiers of torchvision, and timm/NAME"
    raise UsageError(f"--backbone {name}: no such backbone{near}; there are {kinds}")


_HALF = (0.5, 0.5, 0.5)


def mlp(size: int) -> tuple[nn.Module, Head]:
    """The report's perceptron: 270,000-255-3 on 300x300 photos."""
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 255), nn.ReLU())
    return trunk, Head(features=255, hidden=0, dropout=0.0)


def cnn(size: int) -> tuple[nn.Module, Head]:
    """The report's network: two 5x5 convolutions with pooling, then 120 and 84 units with two dropout layers.

    Pooling stands before ReLU, which gives the same and then has a quarter of the work.
    """
    side = ((size - 4) // 2 - 4) // 2
    convolutions = [nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU()]
    trunk = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * side * side, 120), nn.ReLU())
    return trunk, Head(features=120, hidden=84, dropout=0.5)


class ShortCut(nn.Module):
    """A 3x3 convolution with batch norm that adds to what went in (He et al., "Deep residual learning", 2015), in its
    shortest form: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + F.relu(self.norm(self.conv(features)))


def cnn_bn(size: int) -> tuple[nn.Module, Head]:
    """The report's future work, `cnn` with batch norm: five times a 3x3 convolution after which the side is halved, and
    another with a short cut around it.

    Pooling stands before normalisation, which then has a quarter of the work.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128, 256, 512):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), ShortCut(width)]
        channels = width
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return trunk, Head(features=channels, hidden=0, dropout=0.2)


_REPORT: dict[str, tuple[tuple[str, ...], Head]] = {
    "vgg16": (("classifier.6",), Head(features=4096, hidden=256, dropout=0.5, dropout_first=False)),
    "resnet50": (("fc",), Head(features=2048, hidden=256, dropout=0.2, dropout_first=False)),
    "efficientnet_b2": (("classifier",), Head(features=1408, hidden=0, dropout=0.3)),
}
"""The report's: name -> (the modules that the head replaces, the head)."""
_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
"""Name -> heads that helped in training it, which its weights files still hold."""
_ONE_SIZE = ("vit_", "maxvit_")
"""Families with a weight for each place in the image."""


def _torchvision(config: ModelConfig) -> Plan:
    from torchvision import models

    name = config.backbone
    official = models.get_model_weights(name).DEFAULT
    preprocessing = _official_preprocessing(name, official.transforms())
    _require_size(name, official, config.image_size or preprocessing.size)
    network = _official_network(name, official)
    replaced, head = _REPORT.get(name) or _found_head(network)
    weights, aside = RANDOM, (*replaced, *_AUXILIARY.get(name, ()))
    if config.weights == "imagenet":
        state = download(name, lambda: official.get_state_dict(progress=False, check_hash=True, weights_only=True))
        weights = Weights(official.url, load_all_but_head(network, state, aside, official.url))
    elif config.weights != "none":
        weights, preprocessing = load_file(config, network, aside, preprocessing)
        _require_size(name, official, config.image_size or preprocessing.size)
    for place in replaced:
        network.set_submodule(place, nn.Identity())
    return Plan(network, head, preprocessing, weights)


def _official_network(name: str, official: Any) -> Any:
    from torchvision import models

    settings: dict[str, Any] = {}
    if name.startswith("vit_"):
        settings = {"image_size": official.meta["min_size"][0]}
    if name in _AUXILIARY:
        settings = {"aux_logits": False, "init_weights": False}  # theirs takes long
    network = models.get_model(name, weights=None, **settings)
    if name.startswith("mnasnet"):  # its own refuses tensors without a version, as safetensors holds them
        network._load_from_state_dict = functools.partial(nn.Module._load_from_state_dict, network)
    return network


def _official_preprocessing(name: str, given: Any) -> Preprocessing:
    own = name in _AUXILIARY  # with official weights, these two turn ImageNet's mean and deviation into 0.5 inside
    return Preprocessing(
        size=given.crop_size[0],
        crop=given.crop_size[0] / given.resize_size[0],
        interpolation=given.interpolation.value,
        mean=_HALF if own else tuple(given.mean),
        std=_HALF if own else tuple(given.std),
    )


def _require_size(name: str, official: Any, size: int) -> None:
    least = official.meta["min_size"][0]
    fits = size == least or not name.startswith(_ONE_SIZE)
    require(fits, "image_size", size, f"{name} takes {least} and nothing else")
    fits = size >= least or name.startswith("swin_")  # which pads
    require(fits, "image_size", size, f"{name} takes {least} at least")


def _found_head(network: nn.Module) -> tuple[tuple[str, ...], Head]:
    """What a head of ours replaces: the last linear layer (convolution where there is none) and dropout before it."""
    modules = dict(network.named_modules())
    names = list(modules)
    linear = [name for name in names if isinstance(modules[name], nn.Linear)]
    last = (linear or [name for name in names if isinstance(modules[name], nn.Conv2d)])[-1]
    before = names[names.index(last) - 1]
    replaced = (before, last) if isinstance(modules[before], nn.Dropout) else (last,)
    layer: Any = modules[last]
    features = layer.in_features if linear else layer.in_channels
    return replaced, Head(features=features, hidden=256, dropout=0.2, standardise=True)


def _timm(config: ModelConfig) -> Plan:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UsageError(f"--backbone {config.backbone}: needs timm: pip install timm") from error
    name = config.backbone.removeprefix("timm/")
    if name not in timm.list_models() and name not in timm.list_pretrained():
        near = _near(name, timm.list_models(), "timm/")
        raise UsageError(f"--backbone {config.backbone}: timm has no model of this name{near}")
    if config.weights == "imagenet":
        network = download(config.backbone, lambda: timm_pretrained(name))
    else:
        network = timm.create_model(name, pretrained=False)
    given = timm.data.resolve_data_config(model=network, use_test_size=True)
    preprocessing = Preprocessing(
        size=given["input_size"][1],
        crop=0.0 if given["crop_mode"] == "squash" else given["crop_pct"],
        interpolation="bilinear" if given["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
    )
    fits = config.image_size in (None, preprocessing.size) or not network.pretrained_cfg.get("fixed_input_size")
    require(fits, "image_size", config.image_size, f"{config.backbone} takes {preprocessing.size} and nothing else")
    weights = RANDOM
    if config.weights == "imagenet":
        weights = Weights(f"timm:{name}", state_hash(network.state_dict()))
    elif config.weights != "none":
        heads = network.pretrained_cfg["classifier"] or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        weights, preprocessing = load_file(config, network, heads, preprocessing)
    if not hasattr(network, "reset_classifier"):
        raise UsageError(f"--backbone {config.backbone}: is no classifier, so there is no head to replace")
    network.reset_classifier(0)
    head = Head(features=network.head_hidden_size, hidden=256, dropout=0.2, standardise=True)
    return Plan(network, head, preprocessing, weights)


def _near(name: str, names: Sequence[str], prefix: str = "") -> str:
    """`; did you mean this or that`, or nothing."""
    near = difflib.get_close_matches(name.lower(), names)
    return f"; did you mean {' or '.join(prefix + one for one in near)}" if near else ""
