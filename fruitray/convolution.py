"""Depthwise convolutions, as EfficientNet, MobileNet and ConvNeXt have: in bfloat16 forwards, in float32 backwards
where a CPU has no quick kernel in bfloat16.

oneDNN has none for the gradient of what such a convolution strides over, nor for that of a kernel larger than 3x3, and
takes many times as long as in float32 (tests/benchmarks/RESULTS.md).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable


def conv2d(
    input: torch.Tensor,  # noqa: A002  it may be called by its name
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """As `torch.nn.functional.conv2d`, going back in the quicker type: (B, C, H, W) -> (B, D, H', W')."""
    stride, dilation = _pair(stride), _pair(dilation)
    widens = len(weight) > groups
    wide = widens or max(stride) > 1, widens or max(weight.shape[2:]) > 3
    if not (groups > 1 and weight.shape[1] == 1 and any(wide)) or isinstance(padding, str):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    result: torch.Tensor = _Conv2d.apply(wide, input, weight, bias, stride, _pair(padding), dilation, groups)
    return result


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else list(value)


class _Conv2d(torch.autograd.Function):
    """With `wide`, whether the gradient of the inputs is computed in float32, and whether the weight's is."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        wide: tuple[bool, bool],
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *shape: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.wide, ctx.shape = wide, shape  # type: ignore[attr-defined]
        return torch.conv2d(inputs, weight, bias, *shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.shape

        def gradients(wide: bool, *wanted: bool) -> tuple[torch.Tensor | None, ...]:
            kind = torch.float32 if wide else gradient.dtype
            # The gradient of the inputs follows from their shape, not from their values.
            read = inputs.to(kind) if any(wanted[1:]) else torch.empty_like(inputs, dtype=kind)
            found: tuple[torch.Tensor | None, ...] = torch.ops.aten.convolution_backward(
                gradient.to(kind),
                read,
                weight.to(kind),
                [len(weight)],
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                groups,
                wanted,
            )
            return found

        _, of_inputs, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            None,
            gradients(ctx.wide[0], of_inputs, False, False)[0],
            *gradients(ctx.wide[1], False, of_weight, of_bias)[1:],
            *[None] * len(ctx.shape),
        )
