"""One trial of a search, in a worker that may have had others before: reports after every epoch, and goes on where it
was broken off."""

import os
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from ray import tune

from fruitray.backbones import parameter_counts, rebuilt, reserved_device, trained_part
from fruitray.checkpoints import Pace, to_bytes
from fruitray.cluster.embed import initial_model
from fruitray.config import FitConfig, ModelConfig
from fruitray.errors import GpuFullError, TryAgainError, find_ours, one_line
from fruitray.fit import fit
from fruitray.index import Pool, read_index
from fruitray.memory import forget_peak, peak_memory
from fruitray.metrics import accuracy, confusion, summary
from fruitray.package import Package
from fruitray.recipe import make_recipe
from fruitray.split import cross_validation
from fruitray.steps import use_threads
from fruitray.storage import open_storage
from fruitray.trials import pack

CHECKPOINT = "checkpoint.pt"
STOPS_WITHIN = "TUNE_FUNCTION_THREAD_TIMEOUT_S"
"""The seconds that Tune waits for a trial that ASHA stops, before it fails the next one in its worker."""
LONGEST = 300
"""Characters of a reason that is not ours."""


def run_trial(space: dict[str, Any]) -> None:
    """Train the trial that `space` describes, reporting to Tune. A failure is reported before it is raised, but for one
    that may pass."""
    os.environ[STOPS_WITHIN] = "600"
    forget_peak()
    use_threads(max(1, int(space["cpus"])))
    last: dict[str, Any] = {"accuracy": 0.0, "epochs": 0}
    pace = Pace()
    try:
        for last, state in train(space, _read_checkpoint()):
            if not pace.cheap():
                tune.report(last)
                continue
            with pace.saving(), _passing(), tempfile.TemporaryDirectory() as folder:
                Path(folder, CHECKPOINT).write_bytes(to_bytes(state))
                tune.report(last, checkpoint=tune.Checkpoint.from_directory(folder))
    except TryAgainError:
        raise
    except Exception as error:
        tune.report({**last, "error": reason(error)})
        raise


@contextmanager
def _passing() -> Iterator[None]:
    """Takes what goes wrong as a checkpoint is kept, as where the storage cannot be reached, for what may pass."""
    try:
        yield
    except OSError as error:
        raise TryAgainError("a checkpoint", f"cannot be kept: {one_line(error)}") from error


def reason(error: BaseException) -> str:
    """Why a trial failed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return str(GpuFullError())
    return str(find_ours(error) or textwrap.shorten(f"{type(error).__name__}: {error}", LONGEST))


def _read_checkpoint() -> dict[str, Any] | None:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    unfit = OSError, EOFError, RuntimeError, UnpicklingError  # gone, as its trial had ended or gone on; or cut
    with suppress(*unfit), checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(os.path.join(folder, CHECKPOINT), map_location="cpu", weights_only=True)
        return state
    return None


def train(
    space: dict[str, Any], state: dict[str, Any] | None = None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """After each epoch: what was measured, and the state to go on from, which is live: save it at once."""
    state = state or {"fold": 0, "fit": None, "predictions": [], "curve": [], "epochs": 0, "seconds": 0.0}
    start, spent = time.perf_counter(), state["seconds"]
    config, fit_config = ModelConfig(**space["trial"]["model"]), FitConfig(**space["trial"]["fit"])
    index = read_index(space["index"], space["index_sha256"])
    initial = initial_model(open_storage(space["out"]), config, index.classes, fit_config.seed)
    device = reserved_device(gpu=space["gpu"])
    pool = index.pool()
    parts = held_out(pool, space["folds"], fit_config.seed)
    truth = [torch.tensor(pool.labels)[part] for part in parts]
    for fold in range(state["fold"], len(parts)):
        model = rebuilt(initial.model, config, len(index.classes))
        validation = parts[fold] if space["folds"] else None
        recipe = make_recipe(
            space["index"], index, model, fit_config, frozen=config.frozen, validation=validation, device=device
        )
        facts = _facts(recipe.model.to(device), initial)
        resume, done = state["fit"], state["predictions"][:fold]
        before, epoch = state["epochs"] - (resume["number"] if resume else 0), None
        for epoch in fit(recipe.module, recipe.train, recipe.val, fit_config, device=device, resume=resume):
            state = {
                "fold": fold,
                "fit": epoch.state,
                "predictions": [*done, epoch.best_predictions],
                "curve": [*state.get("curve", []), epoch.accuracy],
                "epochs": before + epoch.number,
                "seconds": spent + time.perf_counter() - start,
            }
            measured = _measured(state["predictions"], truth[: fold + 1], len(index.classes))
            known = {name: state[name] for name in ("curve", "epochs", "seconds")}
            cost = {"images_per_s": epoch.images_per_s, "peak_memory": peak_memory(device), "parts": epoch.parts}
            yield {**facts, **measured, **known, "best_epoch": epoch.best_number, **cost}, state
        state = {**state, "fit": None}
        del model, recipe, epoch  # before the next fold's photos or embeddings are there


def held_out(pool: Pool, folds: int, seed: int) -> list[torch.Tensor]:
    """Of each fold (N,) bool: which photos of the pool are held out; without folds, of the index's split."""
    if not folds:
        return [torch.tensor(pool.validated)]
    numbers = torch.tensor(cross_validation(pool, folds, seed))
    return [numbers == fold for fold in range(folds)]


def _facts(model: Any, initial: Package) -> dict[str, Any]:
    total, trained = parameter_counts(model)
    return {
        "part": trained_part(model),
        "parameters": total,
        "trained_parameters": trained,
        "initial_state_hash": initial.description["state_hash"],
    }


def _measured(predictions: list[torch.Tensor], truth: list[torch.Tensor], classes: int) -> dict[str, Any]:
    """Over all folds so far, each at its best epoch."""
    counts = [confusion(*fold, classes) for fold in zip(predictions, truth, strict=True)]
    together = torch.stack(counts).sum(0)
    return {
        **summary(together),
        "fold_accuracies": [accuracy(fold) for fold in counts],
        "right": pack(torch.cat(predictions) == torch.cat(truth)),
        "photos": int(together.sum()),
    }
