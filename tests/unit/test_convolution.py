"""Depthwise convolutions go back as PyTorch's own do, whatever type their gradients are computed in."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fruitray.backbones import build, compiled
from fruitray.config import ModelConfig
from fruitray.convolution import conv2d
from fruitray.stand_in import StandIn

CASES: dict[str, dict[str, Any]] = {
    "strided": {"kernel": 3, "stride": 2, "padding": 1},
    "large": {"kernel": 5, "padding": 2},
    "strided and large": {"kernel": 7, "stride": (2, 1), "padding": (3, 2)},
    "dilated": {"kernel": 5, "dilation": 2, "padding": 4},
    "as large as before": {"kernel": 5, "padding": "same"},
    "widening": {"kernel": 3, "outputs": 16},
    "small": {"kernel": 3, "padding": 1},
    "grouped": {"kernel": 5, "groups": 4},
    "ordinary": {"kernel": 5, "groups": 1},
}


def learned(
    kernel: int, dtype: torch.dtype, quick: bool, outputs: int = 8, groups: int = 8, **shape: Any
) -> list[torch.Tensor]:
    """The result's sum of squares, and its gradients by inputs, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 8, 13, 12), (outputs, 8 // groups, kernel, kernel), (outputs,))
    tensors = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        if quick:
            with StandIn(torch.conv2d, conv2d):
                result = F.conv2d(*tensors, groups=groups, **shape)
        else:
            result = F.conv2d(*tensors, groups=groups, **shape)
    assert result.dtype == dtype
    loss = result.float().square().mean()
    loss.backward()
    found = [tensor.grad for tensor in tensors]
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_are_those_of_pytorch(case: str, dtype: torch.dtype, near: float) -> None:
    expected = learned(**CASES[case], dtype=torch.float32, quick=False)
    found = learned(**CASES[case], dtype=dtype, quick=True)
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= near * other.abs().max()


@pytest.mark.parametrize("learns", ["trunk", "weights of one layer", "nothing"])
def test_only_what_learns_has_a_gradient(learns: str) -> None:
    inputs, weight = torch.randn(2, 4, 9, 9), torch.randn(4, 1, 5, 5)
    inputs.requires_grad_(learns == "trunk")
    weight.requires_grad_(learns != "nothing")
    with StandIn(torch.conv2d, conv2d):
        result = F.conv2d(input=inputs, weight=weight, groups=4)
    assert result.requires_grad == (learns != "nothing")
    if result.requires_grad:
        result.sum().backward()
    assert (inputs.grad is not None, weight.grad is not None) == (learns == "trunk", learns != "nothing")


def learned_by(backbone: str, *, full_precision: bool, in_one_graph: bool = False) -> torch.Tensor:
    """All gradients of a fresh network, one after the other."""
    model, _ = build(ModelConfig(backbone=backbone, weights="none", image_size=64), classes=3)
    model.full_precision = full_precision
    photos = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network: Any = compiled(model, backend="aot_eager", fullgraph=True) if in_one_graph else model
    model.eval()
    network(photos).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize("backbone", ["timm/test_efficientnet", "timm/test_convnext", "mobilenet_v3_small"])
def test_a_network_in_bfloat16_learns_what_one_in_float32_does(monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    monkeypatch.setattr("fruitray.backbones.fast_in_bfloat16", lambda device: True)
    found = [learned_by(backbone, full_precision=full_precision) for full_precision in (False, True)]
    assert F.cosine_similarity(*found, dim=0) > 0.99


def test_a_network_compiles_to_one_graph() -> None:
    """In whatever type this machine is quick at."""
    found = [
        learned_by("timm/test_efficientnet", full_precision=False, in_one_graph=in_one_graph)
        for in_one_graph in (True, False)
    ]
    assert F.cosine_similarity(*found, dim=0) > 0.99
