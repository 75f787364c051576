"""Batch norm over the photos of all workers: what a network learns does not depend on how many share a batch.

torch's `SyncBatchNorm` does so on GPUs alone and takes the place of each layer; this stands in for the one function
that all batch norm layers call, those of timm too, on any device.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from fruitray.stand_in import StandIn


class Synchronised(DistributedDataParallel):
    """A module that shares gradients and batch norm statistics with those of the other workers.

    All workers must call it equally often.
    """

    def forward(self, *inputs: Any) -> Any:
        """The module's, with one batch of all workers' examples for its batch norms."""
        with StandIn(F.batch_norm, batch_norm):
            return super().forward(*inputs)  # type: ignore[no-untyped-call]


def batch_norm(
    input: torch.Tensor,  # noqa: A002  it may be called by its name
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As `torch.nn.functional.batch_norm`: (B, C, ...) of this worker, normalised, in training, by the mean and the
    variance of all workers' (Ioffe and Szegedy, "Batch normalization", 2015), each example weighing alike."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    count, mean, variance = _moments(input)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * count / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
    mean, variance = mean.float(), variance.float()
    weight, bias = torch.ones_like(mean) if weight is None else weight, torch.zeros_like(mean) if bias is None else bias
    normalised: torch.Tensor = _Normalise.apply(input, mean, variance, weight, bias, eps, count)
    return normalised


def _moments(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values per channel, (C,) mean, (C,) variance), all float64, over all workers."""
    unused = torch.zeros(2, inputs.shape[1], device=inputs.device)  # float32, so that the moments are, too
    # What torch's own layer computes them by: on a CPU many times as fast as `torch.var_mean`.
    mean, variance = (one.double() for one in torch.ops.aten.batch_norm_update_stats(inputs.detach(), *unused, 0.0))
    count = torch.full_like(mean[:1], inputs.numel() / inputs.shape[1])
    sums = _over_workers(torch.cat([count, count * mean, count * (variance + mean**2)]))
    count, first, second = sums[:1], *sums[1:].chunk(2)
    mean = first / count
    return count, mean, (second / count - mean**2).clamp(min=0)


def _over_workers(sums: torch.Tensor) -> torch.Tensor:
    """(N,) summed over all workers, which gather them: of so few numbers gloo's `all_reduce` takes several times as
    long."""
    each = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(each, sums)
    return torch.stack(each).sum(0)


class _Normalise(torch.autograd.Function):
    """(inputs - mean) / deviation * weight + bias, where mean and variance are those of all workers' inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        count: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, mean, variance, weight, count)
        ctx.eps = eps
        return F.batch_norm(inputs, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, mean, variance, weight, count = ctx.saved_tensors  # type: ignore[attr-defined]
        eps = ctx.eps  # type: ignore[attr-defined]
        # The gradients as if mean and variance were given.
        scale = (variance + eps).rsqrt()
        of_inputs, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], inputs, weight, mean, variance, mean, scale, False, eps, [True, True, True]
        )
        sums = _over_workers(torch.cat([of_weight, of_bias]).double())
        slope, offset = (sums / count).float().split(len(mean))
        # Less what each input moved through them: (slope * (input - mean) * scale + offset) * weight * scale.
        factor = -scale * weight.float()
        of_inputs += F.batch_norm(inputs, mean, variance, factor * slope, factor * offset, False, 0.0, eps)
        return of_inputs, None, None, of_weight, of_bias, None, None
