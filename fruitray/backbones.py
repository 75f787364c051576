"""Classifiers: a network with a head of ours, what of it is trained, and how it looks in a table.

A `Classifier` takes raw uint8 squares and normalises them itself, so nobody outside can get that wrong.
"""

import contextlib
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from torchinfo import summary

from fruitray.config import ModelConfig
from fruitray.convolution import conv2d
from fruitray.errors import UsageError
from fruitray.networks import plan
from fruitray.preprocess import Preprocessing
from fruitray.stand_in import StandIn
from fruitray.weights import Weights

FEW = 16
"""Channels that PyTorch computes side by side on a CPU with AVX-512."""


class Classifier(nn.Module):
    """A trunk that embeds photos and a head that tells classes: (B, 3, S, S) uint8 -> (B, C) float32 logits.

    The trunk computes in bfloat16 where the device is fast at it, unless `full_precision` is set; normalisation and the
    head stay in float32. A frozen trunk only ever evaluates: its statistics stay, nothing in it drops out, and there is
    no backward pass through it.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.preprocessing = preprocessing
        self.full_precision = False
        self.layout = torch.contiguous_format if _breaks_channels_last(trunk) else torch.channels_last
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    @property
    def frozen(self) -> bool:
        """Whether nothing in the trunk is trained."""
        return not any(parameter.requires_grad for parameter in self.trunk.parameters())

    def train(self, mode: bool = True) -> Self:
        """Switch to training, all but a frozen trunk, or to evaluation."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def embed(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, what the head sees."""
        inputs = (photos.float() - self.mean) / self.std
        if self.layout is torch.contiguous_format:
            inputs = inputs.contiguous()
        if self.full_precision:
            embedding: torch.Tensor = self.trunk(inputs)
        else:
            with autocast(photos.device), quick_gradients(photos.device):
                embedding = self.trunk(inputs)
        return embedding.float()

    def forward(self, photos: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, C) float32 logits."""
        logits: torch.Tensor = self.head(self.embed(photos))
        return logits


def _breaks_channels_last(trunk: nn.Module) -> bool:
    """Whether it strides over pixels of few channels, as timm's RepVGG does: PyTorch's backward pass of that on a CPU
    writes beside its memory where channels come last (2.14, two to seven channels with AVX2)."""
    convolutions = (module for module in trunk.modules() if isinstance(module, nn.Conv2d))
    return any(conv.kernel_size == (1, 1) and conv.stride != (1, 1) and conv.in_channels < FEW for conv in convolutions)


def build(config: ModelConfig, classes: int, seed: int = 0) -> tuple[Classifier, Weights]:
    """A new classifier with `classes` outputs; its random parts are drawn from `seed`: same call, same bits.

    Raises:
        UsageError: no such backbone, or its package is missing, or it does not take this image size.
        WeightsError: the weights cannot be had.
        ModelRejectedError: the weights file is broken or belongs to another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        planned = plan(config)
        head = planned.head
        if config.hidden is not None:
            head = replace(head, hidden=config.hidden)
        if config.dropout is not None:
            head = replace(head, dropout=config.dropout)
        layers = head.build(classes)
    preprocessing = planned.preprocessing
    if config.image_size:
        preprocessing = replace(preprocessing, size=config.image_size)
    if config.crop is not None:
        preprocessing = replace(preprocessing, crop=config.crop)
    model = Classifier(planned.trunk, layers, preprocessing)
    return model.to(memory_format=model.layout), planned.weights


def skeleton(config: ModelConfig, classes: int, preprocessing: Preprocessing) -> Classifier:
    """The classifier of a package before its weights are loaded: same shapes, no download."""
    model, _ = build(replace(config, weights="none", frozen=False, image_size=preprocessing.size), classes)
    return Classifier(model.trunk, model.head, preprocessing).to(memory_format=model.layout)


def rebuilt(model: Classifier, config: ModelConfig, classes: int) -> Classifier:
    """Another one with the weights of `model`; dropout and what is frozen may differ in `config`."""
    other = skeleton(config, classes, model.preprocessing)
    other.load_state_dict(model.state_dict())
    return other


def freeze(model: Classifier) -> None:
    """Leave only the head to train."""
    model.trunk.requires_grad_(False)
    model.train(model.training)


def unfreeze(model: Classifier) -> None:
    """Train the whole network, however it was frozen."""
    model.trunk.requires_grad_(True)
    model.train(model.training)


def trained_part(model: Classifier) -> str:
    """What of `model` is trained, in words for a table."""
    if not model.frozen:
        return "whole network"
    layers = sum(isinstance(module, nn.Linear) for module in model.head.modules())
    return "last two layers" if layers == 2 else "last layer"


def parameter_groups(
    module: nn.Module, *, learning_rate: float, trunk_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """All parameters, frozen ones too, in groups for an optimizer; biases and normalisation layers do not decay.

    `rate` is a group's share of the peak learning rate: `trunk_rate` below the head of a classifier, else 1.
    """
    shares = [(module, 1.0)]
    if isinstance(module, Classifier):
        shares = [(module.trunk, trunk_rate), (module.head, 1.0)]
    groups: list[dict[str, Any]] = []
    for part, rate in shares:
        parameters = list(part.parameters())
        decaying = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        for params, decay in ((decaying, weight_decay), (others, 0.0)):
            groups.append({"params": params, "lr": learning_rate * rate, "weight_decay": decay, "rate": rate})
    return [group for group in groups if group["params"]]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(all, trained) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def layer_summary(model: Classifier) -> str:
    """A table of layers with output shapes and parameters, and below it the totals, trained and not."""
    size, device = model.preprocessing.size, model.mean.device
    photo = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    columns = ("output_size", "num_params", "trainable")
    table = ""
    for depth in (3, 2):
        rows = summary(model, input_data=photo, device=device, depth=depth, col_names=columns, col_width=20, verbose=0)
        table = str(rows).partition("\nTotal mult-adds")[0]  # which misses attention
        if table.count("\n") < 60:
            break
    return table


def pick_device(*, gpu: bool) -> torch.device:
    """The GPU if it is wanted and this process sees one, else the CPU. A Ray worker may see GPUs it did not reserve."""
    return torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")


def reserved_device(*, gpu: bool) -> torch.device:
    """As `pick_device`, in a worker for which Ray has reserved the GPU that is wanted.

    Raises:
        UsageError: PyTorch cannot use it.
    """
    device = pick_device(gpu=gpu)
    if gpu and device.type == "cpu":
        raise UsageError("PyTorch sees no GPU on a node where Ray gives one to a worker; see its driver, and its torch")
    return device


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may compute float32 with the precision of half, which is quicker."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu_is_fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # private, so it may go: then False
    return device.type == "cpu" and bool(cpu_is_fast())


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 for what may lose precision, on devices that are fast at it; elsewhere nothing."""
    return torch.autocast(device.type, torch.bfloat16) if fast_in_bfloat16(device) else contextlib.nullcontext()


def quick_gradients(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU with bfloat16, the gradients that it is slow at there in float32; elsewhere nothing."""
    slow = device.type == "cpu" and fast_in_bfloat16(device) and torch.is_grad_enabled()
    return StandIn(torch.conv2d, conv2d) if slow else contextlib.nullcontext()


def compiled(module: nn.Module, **options: Any) -> Any:
    """`torch.compile` of a classifier, or a part of it, to one graph: what `fast_in_bfloat16` says is constant."""
    constant: Any = torch.compiler.assume_constant_result
    constant(fast_in_bfloat16)  # not as a decorator, which would load the compiler into every process
    return torch.compile(module, **options)
