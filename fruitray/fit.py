"""THE training loop: a generator over plain PyTorch that yields one `Epoch` per epoch.

A Tune trial iterates it and reports; a Train worker iterates it and reports with a checkpoint; a test iterates it over
four tensors. What is trained on (`recipe.py`) and where it runs (`cluster/`) are not known here.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fruitray.backbones import Classifier, freeze, parameter_groups, unfreeze
from fruitray.batches import Batches, epoch_seed
from fruitray.config import FitConfig
from fruitray.errors import DivergedError
from fruitray.memory import keep_freed_memory
from fruitray.metrics import accuracy, confusion

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over all workers; the identity where there is one."""
Wrap = Callable[[nn.Module], nn.Module]
"""Makes a module one that shares its gradients with the other workers; the identity where there are none."""

CHECKED_EVERY = 32
"""Steps after which it is looked whether the loss is a number still; on a GPU each look is a wait."""


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
    best_predictions: torch.Tensor
    """(M,) int64, the class predicted for each validation photo, in order."""
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
    wrap: Wrap = lambda module: module,
    resume: dict[str, Any] | None = None,
) -> Iterator[Epoch]:
    """Train `module` (inputs -> logits) on `device`, where it must be already, yielding after each epoch; when
    exhausted, it holds the best epoch's weights.

    Best is the highest validation accuracy, then the lowest validation loss; training stops after `config.patience`
    epochs without a better one. `config.learning_rate` must be given.

    Raises:
        DivergedError: a loss, of training or validation, is no number any more.
    """
    _prepare(device, config)
    run = _Run(module, train, config, device, reduce, wrap)
    best: dict[str, Any] = {"number": 0, "predictions": None, "score": (-1.0, 0.0), "weights": None}
    first = 1
    if resume:
        run.load_state_dict(resume["run"])
        best, first = resume["best"], resume["number"] + 1
    for number in range(first, config.epochs + 1):
        if best["number"] and number - 1 - best["number"] >= config.patience:
            break
        start = time.perf_counter()
        train_loss = run.epoch(number)
        trained = time.perf_counter()
        validated = run.validated()
        val_loss, predictions = evaluate(validated, val, device, reduce)
        if not math.isfinite(val_loss):
            raise DivergedError(number, val_loss)
        counts = _count(val, predictions)
        score = (accuracy(counts), -val_loss)
        if score > best["score"]:
            best = {"number": number, "predictions": predictions, "score": score, "weights": _copy(validated)}
        yield Epoch(
            number=number,
            train_loss=train_loss,
            val_loss=val_loss,
            counts=counts,
            seconds=time.perf_counter() - start,
            images_per_s=train.examples / (trained - start),
            best_number=best["number"],
            best_counts=_count(val, best["predictions"]),
            best_predictions=best["predictions"],
            state={"number": number, "run": run.state_dict(), "best": best},
        )
    module.load_state_dict(best["weights"])


def evaluate(
    module: nn.Module, batches: Batches, device: torch.device, reduce: Reduce = lambda tensor: tensor
) -> tuple[float, torch.Tensor]:
    """(mean cross-entropy, (M,) int64 the class predicted for each example, in order) over all workers' examples."""
    module.eval()
    total = torch.zeros(1, dtype=torch.float64, device=device)
    predictions = torch.zeros(batches.examples, dtype=torch.int64)
    with torch.inference_mode():
        for batch in batches.epoch(0):
            logits = module(batch.inputs.to(device))
            total += F.cross_entropy(logits, batch.labels.to(device), reduction="sum").double()
            predictions[batch.examples] = logits.argmax(dim=1).cpu()
    return reduce(total.cpu()).item() / max(1, batches.examples), reduce(predictions)


class _Run:
    """What lives as long as one training run: the module as it is trained, its optimizer, its average."""

    def __init__(
        self, module: nn.Module, train: Batches, config: FitConfig, device: torch.device, reduce: Reduce, wrap: Wrap
    ) -> None:
        assert config.learning_rate is not None
        self._module, self._train, self._config, self._device = module, train, config, device
        self._reduce, self._wrap = reduce, wrap
        self._groups = parameter_groups(
            module,
            learning_rate=config.learning_rate,
            trunk_rate=config.trunk_rate,
            weight_decay=config.weight_decay,
        )
        self._optimizer = _optimizer(self._groups, config)
        self._average = AveragedModel(module, multi_avg_fn=_lerp(config.ema), use_buffers=True) if config.ema else None
        self._weights = _class_weights(train).to(device) if config.class_weights else None
        whole = isinstance(module, Classifier) and any(tensor.requires_grad for tensor in module.trunk.parameters())
        self._stages = [config.head_epochs] * (whole and config.head_epochs > 0) + [config.epochs]
        self._stage, self._wrapped = -1, module

    def epoch(self, number: int) -> float:
        """Train epoch `number`, from 1; answers its mean loss over all workers' examples.

        Raises:
            DivergedError: the loss is no number any more.
        """
        first, last = self._enter_stage(number)
        self._wrapped.train()
        torch.manual_seed(epoch_seed(self._config.seed, number))  # dropout; the same after a resume
        total, examples, steps = torch.zeros(1, dtype=torch.float64, device=self._device), 0, len(self._train)
        for step, batch in enumerate(self._train.epoch(number)):
            done = ((number - 1 - first) * steps + step) / ((last - first) * steps)
            self._set_learning_rate(_factor(self._config, done))
            self._optimizer.zero_grad(set_to_none=True)
            total += self._backward(batch.inputs.to(self._device), batch.labels.to(self._device), batch.together)
            if self._config.clip_norm:
                nn.utils.clip_grad_norm_(self._module.parameters(), self._config.clip_norm)
            self._optimizer.step()
            if self._average is not None:
                self._average.update_parameters(self._module)
            examples += batch.together
            if step % CHECKED_EVERY == CHECKED_EVERY - 1:
                _require_number(number, total.item())
        loss: float = self._reduce(total.cpu()).item() / examples
        _require_number(number, loss)
        return loss

    def _enter_stage(self, number: int) -> tuple[int, int]:
        """Freeze or unfreeze for epoch `number`; answers the epochs before its stage, and those to its end."""
        stage = next(place for place, last in enumerate(self._stages) if number <= last)
        if stage != self._stage:
            self._stage = stage
            if len(self._stages) > 1 and isinstance(self._module, Classifier):
                (freeze if stage == 0 else unfreeze)(self._module)
            module: Any = torch.compile(self._module) if self._config.compile else self._module
            self._wrapped = self._wrap(module)
        return ([0, *self._stages])[stage], self._stages[stage]

    def _backward(self, inputs: torch.Tensor, labels: torch.Tensor, together: int) -> torch.Tensor:
        """Add the gradients of this worker's share of a batch; answers the sum of its losses."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        parts = list(zip(_cut(inputs, self._config), _cut(labels, self._config), strict=True))
        for place, (part, target) in enumerate(parts):
            waits = place < len(parts) - 1 and self._train.world > 1
            with self._wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                loss = F.cross_entropy(
                    self._wrapped(part),
                    target,
                    weight=self._weights,
                    label_smoothing=self._config.label_smoothing,
                    reduction="sum",
                )
                # The workers' gradients are averaged: so it is the global mean's.
                (loss * self._train.world / together).backward()  # type: ignore[no-untyped-call]
            total += loss.detach().double()
        return total

    def _set_learning_rate(self, factor: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * group["rate"] * factor

    def validated(self) -> nn.Module:
        """The module to validate, and to keep: the average where there is one, else the trained one itself."""
        module = self._module if self._average is None else self._average.module
        _average_statistics(module, self._train.world, self._reduce)
        return module

    def state_dict(self) -> dict[str, Any]:
        """Live references to all that training changes."""
        average = None if self._average is None else self._average.state_dict()
        return {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])


def _prepare(device: torch.device, config: FitConfig) -> None:
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        torch.set_float32_matmul_precision("high")


def _optimizer(groups: list[dict[str, Any]], config: FitConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, fused=True)


def _factor(config: FitConfig, done: float) -> float:
    """The learning rate, as a share of its peak, when a share of `done` of its stage's steps are."""
    if done < config.warmup:
        return done / config.warmup
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))


def _lerp(decay: float) -> Callable[[Tensors, Tensors, torch.Tensor | int], None]:
    """An exponential moving average that forgets its start: at step n the decay is (1 + n) / (10 + n) at most."""

    def update(averages: Tensors, news: Tensors, step: torch.Tensor | int) -> None:
        left = min(decay, (1 + float(step)) / (10 + float(step)))
        for average, new in zip(averages, news, strict=True):
            if average.is_floating_point():
                average.lerp_(new, 1 - left)
            else:
                average.copy_(new)

    return update


def _class_weights(train: Batches) -> torch.Tensor:
    """(C,) float32, so that all classes weigh alike: examples / (classes * examples of the class)."""
    counts = torch.bincount(train.labels[train.rows], minlength=train.classes)
    return counts.sum() / (train.classes * counts.clamp(min=1))


def _cut(tensor: torch.Tensor, config: FitConfig) -> tuple[torch.Tensor, ...]:
    return tensor.tensor_split(min(config.accumulate, max(1, len(tensor))))


def _require_number(number: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise DivergedError(number, loss)


def _average_statistics(module: nn.Module, world: int, reduce: Reduce) -> None:
    """Give all workers one set of batch-norm statistics, so that they validate, and keep, one and the same model."""
    for buffer in module.buffers():
        if world > 1 and buffer.is_floating_point():
            buffer.copy_(reduce(buffer) / world)


def _count(val: Batches, predictions: torch.Tensor) -> torch.Tensor:
    return confusion(predictions, val.labels[val.rows], val.classes)


def _copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
