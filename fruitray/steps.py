"""One training run's steps: the module as it is trained, its optimizer, its average. `fit.py` makes epochs of them."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fruitray.backbones import Classifier, allow_tf32, compiled, freeze, parameter_groups, unfreeze
from fruitray.batches import Batch, Batches, epoch_seed
from fruitray.config import FitConfig
from fruitray.errors import DivergedError, UsageError, one_line
from fruitray.machine import has_compiler
from fruitray.memory import as_out_of_memory, keep_freed_memory

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over all workers; the identity where there is one."""
Wrap = Callable[[nn.Module], nn.Module]
"""Makes a module one that shares gradients and batch statistics with the other workers; the identity where there are
none."""

ASKED_EVERY = 8
"""Steps after which the workers agree whether to pause; it is a wait for all of them."""
CHECKED_EVERY = 32
"""Steps after which it is looked whether the loss is a number still; on a GPU each look is a wait."""


class Run:
    """What lives as long as one training run."""

    def __init__(
        self, module: nn.Module, train: Batches, config: FitConfig, device: torch.device, reduce: Reduce, wrap: Wrap
    ) -> None:
        assert config.learning_rate is not None
        self._module, self._train, self._config, self._device = module, train, config, device
        self._reduce, self._wrap = reduce, wrap
        groups = parameter_groups(
            module,
            learning_rate=config.learning_rate,
            trunk_rate=config.trunk_rate,
            weight_decay=config.weight_decay,
        )
        self._optimizer = _optimizer(groups, config)
        self._average = AveragedModel(module, multi_avg_fn=self._lerp, use_buffers=True) if config.ema else None
        self._weights = _class_weights(train).to(device) if config.class_weights else None
        whole = isinstance(module, Classifier) and not module.frozen
        self.head_epochs = config.head_epochs if whole else 0
        """How many are for the head alone."""
        self._stages = [self.head_epochs] * (self.head_epochs > 0) + [config.epochs]
        self._stage, self._wrapped = -1, module
        self.parts = config.accumulate
        """Parts that a step is computed in, one after the other; twice as many whenever the GPU's memory is too small
        and no other worker waits."""

    def epoch(self, number: int, done: int, total: float, due: Callable[[], bool]) -> Iterator[tuple[int, float]]:
        """Train epoch `number`, from 1, of which `done` steps with a sum of losses of `total` were before.

        Yields (steps done, sum of the losses of all workers' examples) where the workers find a pause `due`, and last
        at the end.

        Raises:
            DivergedError: the loss is no number any more.
            UsageError: it was to be deterministic, and an operation of the network is not.
        """
        first, last = self._enter_stage(number)
        self._wrapped.train()
        steps, mine = len(self._train), torch.zeros(1, dtype=torch.float64, device=self._device)
        for step, batch in enumerate(self._train.epoch(number, done), start=done):
            torch.manual_seed(self._seed(number, step))
            self._set_learning_rate(_factor(self._config, (number - 1 - first) * steps + step, (last - first) * steps))
            mine += self._step(batch)
            if step % CHECKED_EVERY == CHECKED_EVERY - 1:
                require_finite(number, mine.item())
            ended = step == steps - 1
            if ended or (step % ASKED_EVERY == ASKED_EVERY - 1 and self._agree(due())):
                total += self._reduce(mine.cpu()).item()
                mine.zero_()
                require_finite(number, total)
                yield step + 1, total
                self._wrapped.train()

    def _seed(self, number: int, step: int) -> int:
        """Of what drops out; the same after a resume, and each worker's own."""
        seed = epoch_seed(self._config.seed, number) * 1_000_003 + step + self._train.rank * 1_000_000_007
        return seed % 2**63

    def _agree(self, due: bool) -> bool:
        """Whether it is due for any worker."""
        return due if self._train.world == 1 else bool(self._reduce(torch.tensor([float(due)])).item())

    def _enter_stage(self, number: int) -> tuple[int, int]:
        """Freeze or unfreeze for epoch `number`; answers the epochs before its stage, and those to its end."""
        stage = next(place for place, last in enumerate(self._stages) if number <= last)
        if stage != self._stage:
            self._stage = stage
            if len(self._stages) > 1 and isinstance(self._module, Classifier):
                (freeze if stage == 0 else unfreeze)(self._module)
            module: Any = compiled(self._module) if self._config.compile else self._module
            self._wrapped = self._wrap(module)
        return ([0, *self._stages])[stage], self._stages[stage]

    def _step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; answers the sum of this worker's losses."""
        loss = self._backward(batch)
        if self._config.clip_norm:
            nn.utils.clip_grad_norm_(self._module.parameters(), self._config.clip_norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self._module)
        return loss

    def _backward(self, batch: Batch) -> torch.Tensor:
        """The gradients of this worker's share of a batch, in more parts where memory is too small for fewer."""
        inputs, labels = batch.inputs.to(self._device), batch.labels.to(self._device)
        while True:
            try:
                self._optimizer.zero_grad(set_to_none=True)
                with as_out_of_memory():
                    return self._backward_in_parts(inputs, labels, batch.together)
            except torch.OutOfMemoryError:
                if self._train.world > 1 or self.parts >= len(inputs):
                    raise
            except ValueError as error:  # of batch norm, to which one number tells nothing of how numbers spread
                if "more than 1 value per channel" not in str(error):
                    raise
                if self.parts > self._config.accumulate:
                    raise torch.OutOfMemoryError from error
                lone = "leaves a part of a step with one photo, of which this network's batch norm can learn nothing"
                raise UsageError(f"--batch-size {self._config.batch_size}: {lone}; take another") from error
            except RuntimeError as error:  # of networks that such operations cannot make
                if self._config.deterministic and "deterministic" in str(error):
                    raise UsageError(f"--deterministic: not this network on this device: {one_line(error)}") from error
                raise
            self.parts *= 2
            torch.cuda.empty_cache()

    def _backward_in_parts(self, inputs: torch.Tensor, labels: torch.Tensor, together: int) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        parts = list(zip(self._cut(inputs, together), self._cut(labels, together), strict=True))
        for place, (part, target) in enumerate(parts):
            waits = place < len(parts) - 1 and self._train.world > 1
            with self._wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                losses = F.cross_entropy(
                    self._wrapped(part), target, label_smoothing=self._config.label_smoothing, reduction="none"
                )
                loss = (losses * self._weights_of(target)).sum()
                # The workers' gradients are averaged: so it is the global mean's.
                (loss * self._train.world / together).backward()  # type: ignore[no-untyped-call]
            total += loss.detach().double()
        return total

    def _weights_of(self, target: torch.Tensor) -> torch.Tensor | float:
        """(B,) float32, each example's by its class, or by its shares of classes. (torch would weigh each class in an
        example's smoothed target: of a common class and a very rare one it would learn the rare one.)"""
        if self._weights is None:
            return 1.0
        return target @ self._weights if target.is_floating_point() else self._weights[target]

    def _cut(self, tensor: torch.Tensor, together: int) -> tuple[torch.Tensor, ...]:
        """This worker's share of a batch of `together`, in as many parts as all workers' shares can be cut into: each
        waits for the others in every part."""
        least = self._train.examples // len(self._train) // self._train.world
        parts = min(self.parts, max(1, least))
        return cut(tensor, parts, together=together, rank=self._train.rank, world=self._train.world)

    def _lerp(self, averages: Tensors, news: Tensors, _: Any) -> None:
        """An exponential moving average that forgets its start: at step n the decay is (1 + n) / (10 + n) at most. What
        counts or points, as Swin's indices of positions, is no average, but the newest."""
        assert self._average is not None
        if not averages[0].is_floating_point():  # they come by type
            torch._foreach_copy_(averages, news)
            return
        step = int(self._average.n_averaged)  # on the CPU, while what is handed here was copied to the GPU
        decay = min(self._config.ema, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(averages, news, step)  # type: ignore[no-untyped-call]

    def _set_learning_rate(self, factor: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * group["rate"] * factor

    @property
    def learning_rate(self) -> float:
        """Of the head, in the last step."""
        rate: float = self._optimizer.param_groups[-1]["lr"]
        return rate

    @property
    def validated(self) -> nn.Module:
        """The module to validate, and to keep: the average where there is one, else the trained one itself."""
        return self._module if self._average is None else self._average.module

    def state_dict(self) -> dict[str, Any]:
        """Live references to all that training changes; the same on every worker."""
        average = None if self._average is None else self._average.state_dict()
        return {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": average,
            "parts": self.parts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.parts = max(self.parts, state["parts"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])


def cut(share: torch.Tensor, parts: int, *, together: int, rank: int, world: int) -> tuple[torch.Tensor, ...]:
    """Cut the `share` (B, ...) of worker `rank`, each `world`-th example of a batch of `together`, so that the workers'
    parts together are those of one worker: what batch norm sees does not depend on their number."""
    whole, more = divmod(together, parts)
    ends = [part * whole + min(part, more) for part in range(1, parts)]
    return share.tensor_split([-(-(end - rank) // world) for end in ends])


def use_threads(count: int) -> None:
    """Have the calling thread compute with `count` of them, all of which take a number below the least normal float
    for zero; to be called before it computes anything, as they inherit that from it when they start.

    A CPU takes many times as long over such numbers, and Adam comes to hold millions: the averages of a weight
    whose gradient has become zero, as that of a unit that no photo excites any more, dwindle until they are there.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(count)


def prepare(device: torch.device, config: FitConfig) -> None:
    """Set this process up for training on `device`.

    Raises:
        UsageError: it is to compile, and there is no compiler.
    """
    if config.compile and not has_compiler():
        raise UsageError("--compile: needs a C++ compiler where the training runs: install g++")
    if config.compile:
        torch.compiler.reset()  # what was compiled before in this process counts towards a limit
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        allow_tf32(not config.full_precision)


def _optimizer(groups: list[dict[str, Any]], config: FitConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, fused=True)


def _factor(config: FitConfig, step: int, steps: int) -> float:
    """The learning rate, as a share of its peak, in a stage's step of that number, from 0, of so many."""
    warmup = config.warmup * steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _class_weights(train: Batches) -> torch.Tensor:
    """(C,) float32, so that all classes weigh alike: examples / (classes * examples of the class)."""
    counts = torch.bincount(train.labels[train.rows], minlength=train.classes)
    return counts.sum() / (train.classes * counts.clamp(min=1))


def require_finite(number: int, loss: float) -> None:
    """Raise `DivergedError` where a loss of epoch `number` is no number any more."""
    if not math.isfinite(loss):
        raise DivergedError(number, loss)
