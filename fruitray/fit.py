"""THE training loop: a generator over plain PyTorch that yields one `Epoch` per epoch.

A Tune trial iterates it and reports; a Train worker iterates it and reports with a checkpoint; a test iterates it over
four tensors. What is trained on (`recipe.py`) and where it runs (`cluster/`) are not known here.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fruitray.batches import Batches, epoch_seed
from fruitray.config import FitConfig
from fruitray.errors import DivergedError
from fruitray.metrics import accuracy, confusion

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over all workers; the identity where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """One finished epoch. Counts and losses are over all workers' examples."""

    number: int
    """From 1."""
    train_loss: float
    val_loss: float
    counts: torch.Tensor
    """(C, C) int64 confusion of the validation photos, rows true."""
    seconds: float
    images_per_s: float
    """Training examples per second, validation left out."""
    best_number: int
    """The best epoch so far."""
    best_counts: torch.Tensor
    state: dict[str, Any]
    """What `fit(resume=...)` goes on from. Live references: save it before taking the next epoch."""

    @property
    def accuracy(self) -> float:
        """Validation accuracy of this epoch."""
        return accuracy(self.counts)

    @property
    def best_accuracy(self) -> float:
        """Validation accuracy of the best epoch so far."""
        return accuracy(self.best_counts)


def fit(
    module: nn.Module,
    train: Batches,
    val: Batches,
    config: FitConfig,
    *,
    device: torch.device,
    reduce: Reduce = lambda tensor: tensor,
    resume: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Train `module` (inputs -> logits) on `device`, where it must be already, yielding after each epoch; when
    exhausted, it holds the best epoch's weights.

    Best is the highest validation accuracy, then the lowest validation loss. AdamW under a cosine; stops after
    `config.patience` epochs without a better one. With several workers, `module` is wrapped in DistributedDataParallel.

    Raises:
        DivergedError: a loss, of training or validation, is no number any more.
    """
    plain: nn.Module = getattr(module, "module", module)
    optimizer = torch.optim.AdamW(_trained(module), lr=config.learning_rate, weight_decay=config.weight_decay)
    best: dict[str, Any] = {"number": 0, "counts": None, "score": (-1.0, 0.0), "weights": None}
    first = 1
    if resume:
        plain.load_state_dict(resume["module"])
        optimizer.load_state_dict(resume["optimizer"])
        best, first = resume["best"], resume["number"] + 1
    for number in range(first, config.epochs + 1):
        if best["number"] and number - 1 - best["number"] >= config.patience:
            break
        start = time.perf_counter()
        train_loss = _train_epoch(module, optimizer, train, config, number, device, reduce)
        trained = time.perf_counter()
        _average_statistics(plain, train.world, reduce)
        val_loss, counts = evaluate(plain, val, device, reduce)
        for loss in (train_loss, val_loss):
            if not math.isfinite(loss):
                raise DivergedError(number, loss)
        score = (accuracy(counts), -val_loss)
        if score > best["score"]:
            best = {"number": number, "counts": counts, "score": score, "weights": _copy(plain)}
        yield Epoch(
            number=number,
            train_loss=train_loss,
            val_loss=val_loss,
            counts=counts,
            seconds=time.perf_counter() - start,
            images_per_s=train.examples / (trained - start),
            best_number=best["number"],
            best_counts=best["counts"],
            state={
                "number": number,
                "module": plain.state_dict(),
                "optimizer": optimizer.state_dict(),
                "best": best,
            },
        )
    plain.load_state_dict(best["weights"])


def evaluate(
    module: nn.Module, batches: Batches, device: torch.device, reduce: Reduce = lambda tensor: tensor
) -> tuple[float, torch.Tensor]:
    """(mean cross-entropy, (C, C) confusion counts) over all workers' examples."""
    module.eval()
    total, counts = torch.zeros(1, dtype=torch.float64), torch.zeros(0)
    with torch.inference_mode():
        for inputs, labels, _ in batches.epoch(0):
            logits, target = module(inputs.to(device)), labels.to(device)
            total += F.cross_entropy(logits, target, reduction="sum").double().cpu()
            counts = confusion(logits, target) + (counts if len(counts) else 0)
    counts = reduce(counts)
    return reduce(total).item() / max(1, int(counts.sum())), counts


def _train_epoch(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Batches,
    config: FitConfig,
    number: int,
    device: torch.device,
    reduce: Reduce,
) -> float:
    """Mean training loss of one epoch."""
    module.train()
    torch.manual_seed(epoch_seed(config.seed, number))  # dropout; the same after a resume
    total, examples = torch.zeros(1, dtype=torch.float64), 0
    for step, (inputs, labels, together) in enumerate(train.epoch(number)):
        _set_learning_rate(optimizer, config, ((number - 1) * len(train) + step) / (config.epochs * len(train)))
        logits, target = module(inputs.to(device, non_blocking=True)), labels.to(device)
        loss = F.cross_entropy(logits, target, label_smoothing=config.label_smoothing, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        share = loss * train.world / together  # the workers' gradients are averaged: so it is the global mean's
        share.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach().double().cpu()
        examples += together
    return reduce(total).item() / examples


def _average_statistics(module: nn.Module, world: int, reduce: Reduce) -> None:
    """Give all workers one set of batch-norm statistics, so that they validate, and keep, one and the same model."""
    for buffer in module.buffers():
        if world > 1 and buffer.is_floating_point():
            buffer.copy_(reduce(buffer) / world)


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: FitConfig, progress: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
