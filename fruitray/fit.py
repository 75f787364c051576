"""THE training loop: a generator over plain PyTorch that yields one `Epoch` per epoch.

A Tune trial iterates it and reports; a Train worker iterates it and keeps checkpoints; a test iterates it over four
tensors. What a step is stands in `steps.py`; what is trained on (`recipe.py`) and where it runs (`cluster/`) are not
known here.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fruitray.batches import Batches
from fruitray.config import FitConfig
from fruitray.memory import in_halves
from fruitray.metrics import accuracy, confusion
from fruitray.steps import Reduce, Run, Wrap, prepare, require_finite


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause:
    """A moment within an epoch at which training can be broken off."""

    state: dict[str, Any]
    """What `fit(resume=...)` goes on from. Live references: save it before going on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch(Pause):
    """One finished epoch. Counts and losses are over all workers' examples."""

    number: int
    """From 1."""
    train_loss: float
    val_loss: float
    counts: torch.Tensor
    """(C, C) int64 confusion of the validation photos, rows true."""
    seconds: float
    """Of this process: where an epoch was resumed, since then."""
    images_per_s: float
    """Training examples per second, validation and pauses left out."""
    learning_rate: float
    """Of the head, in the epoch's last step."""
    parts: int
    """Into how many parts each step's share of photos was cut: `accumulate`, or more where memory was too small."""
    best_number: int
    """The best epoch so far."""
    best_predictions: torch.Tensor
    """(M,) int64, the class predicted for each validation photo, in order."""

    @property
    def accuracy(self) -> float:
        """Validation accuracy of this epoch."""
        return accuracy(self.counts)


def fit(
    module: nn.Module, train: Batches, val: Batches, config: FitConfig, *, device: torch.device, **options: Any
) -> Iterator[Epoch]:
    """As `fit_with_pauses`, without any."""
    for moment in fit_with_pauses(module, train, val, config, device=device, **options):
        if isinstance(moment, Epoch):
            yield moment


def fit_with_pauses(
    module: nn.Module,
    train: Batches,
    val: Batches,
    config: FitConfig,
    *,
    device: torch.device,
    reduce: Reduce = lambda tensor: tensor,
    wrap: Wrap = lambda module: module,
    due: Callable[[], bool] = lambda: False,
    parts: int = 1,
    resume: dict[str, Any] | None = None,
) -> Iterator[Epoch | Pause]:
    """Train `module` (inputs -> logits) on `device`, where it must be already, yielding after each epoch, and within
    one where any worker finds a pause `due`; when exhausted, it holds the best epoch's weights. Each step is computed
    in so many `parts` at least: memory is known to be too small for fewer.

    Best is the highest validation accuracy, then the lowest validation loss; training stops after `config.patience`
    epochs without a better one, those of the head alone not counted. `config.learning_rate` must be given.

    Raises:
        DivergedError: a loss, of training or validation, is no number any more.
    """
    prepare(device, config)
    run = Run(module, train, config, device, reduce, wrap)
    run.parts = max(run.parts, parts)
    best: dict[str, Any] = {"number": 0, "predictions": None, "score": (-1.0, 0.0), "weights": None}
    number, done, total = 0, 0, 0.0  # epochs, and steps in the next one with the sum of their losses
    if resume:
        run.load_state_dict(resume["run"])
        best, number, done, total = (resume[name] for name in ("best", "number", "step", "total"))

    def state(number: int, step: int = 0, total: float = 0.0) -> dict[str, Any]:
        return {"number": number, "step": step, "total": total, "run": run.state_dict(), "best": best}

    while number < config.epochs and not _is_stuck(number, best["number"], run.head_epochs, config.patience):
        number, before, start, paused = number + 1, done, time.perf_counter(), 0.0
        for step, summed in run.epoch(number, done, total, due):
            total = summed
            if step < len(train):
                stopped = time.perf_counter()
                yield Pause(state=state(number - 1, step, total))
                paused += time.perf_counter() - stopped
        trained = time.perf_counter() - paused
        val_loss, predictions = evaluate(run.validated, val, device, reduce)
        require_finite(number, val_loss)
        counts = confusion(predictions, val.labels[val.rows], val.classes)
        score = (accuracy(counts), -val_loss)
        if score > best["score"]:
            best = {"number": number, "predictions": predictions, "score": score, "weights": _copy(run.validated)}
        yield Epoch(
            state=state(number),
            number=number,
            train_loss=total / train.examples,
            val_loss=val_loss,
            counts=counts,
            seconds=time.perf_counter() - start,
            images_per_s=train.examples * (1 - before / len(train)) / (trained - start),
            learning_rate=run.learning_rate,
            parts=run.parts,
            best_number=best["number"],
            best_predictions=best["predictions"],
        )
        done, total = 0, 0.0
    module.load_state_dict(best["weights"])


def _is_stuck(number: int, best: int, head_epochs: int, patience: int) -> bool:
    return best > 0 and number - max(best, head_epochs) >= patience


def evaluate(
    module: nn.Module, batches: Batches, device: torch.device, reduce: Reduce = lambda tensor: tensor
) -> tuple[float, torch.Tensor]:
    """(mean cross-entropy, (M,) int64 the class predicted for each example, in order) over all workers' examples."""
    module.eval()
    total = torch.zeros(1, dtype=torch.float64, device=device)
    predictions = torch.zeros(batches.examples, dtype=torch.int64)
    with torch.inference_mode():
        for batch in batches.epoch(0):
            if not len(batch.examples):
                continue  # fewer photos than workers; not every network takes none
            logits = in_halves(module, batch.inputs.to(device), torch.cat)
            total += F.cross_entropy(logits, batch.labels.to(device), reduction="sum").double()
            predictions[batch.examples] = logits.argmax(dim=1).cpu()
    return reduce(total.cpu()).item() / max(1, batches.examples), reduce(predictions)


def _copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
