"""What is done beside Ray Tune while it runs the trials of a search: workers that die in ways it does not know, ends
that are told, and what it keeps of its trials.
"""

import json
import logging
import os
import textwrap
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import STOP, UnpicklingError
from typing import Any

from pyarrow.fs import FileSelector
from ray import cloudpickle, tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as Tried

from fruitray.cluster.trial import LONGEST
from fruitray.console import LOG_INTERVAL_S, reached, say
from fruitray.errors import FruitrayError, find_ours, one_line
from fruitray.search import Network
from fruitray.storage import Storage, open_storage

RETRIES = 2
"""How often a trial whose worker was lost begins again."""
SHORT_OF_MEMORY = "its node was short of memory, and Ray ended it; more --cpus-per-trial, in another --out, run fewer"
TUNE = "_ray/tune/"
STATES = ("searcher-state-", "search_gen_state-", "basic-variant-state-", "experiment_state-")
"""How the names begin of files in which Tune keeps what draws its trials, and, last, its trials; they end in the time
of day when their driver began."""
FIRST = "0"
"""Comes before any time of day."""
KEPT = "_ray/kept/"
"""Our copies of those files."""
SAVED_S = 10.0
"""After which Tune's own state is sure to know of a trial that has ended: it is kept every second."""

# The whole stack of a trial that fails, whose reason is a line of ours.
logging.getLogger("ray.tune.execution.tune_controller").addFilter(
    lambda record: not record.getMessage().startswith("Trial task failed")
)
# Else Tune writes the driver's keys into every trial's runtime environment, which Ray shows and logs in clear.
class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


def _as_death(hear: Callable[..., None]) -> Callable[..., None]:
    """Tells `hear`, of Tune's manager of actors, of a worker's death where an error is of another kind, as where one is
    killed for want of memory: else that ends the search."""

    def told(manager: RayActorManager, *, exception: Exception, **whose: Any) -> None:
        if not isinstance(exception, RayActorError | RayTaskError):
            short = isinstance(exception, OutOfMemoryError)
            exception = RayActorError(error_msg=SHORT_OF_MEMORY if short else one_line(exception))
        hear(manager, exception=exception, **whose)

    return told


for _name in ("_actor_start_failed", "_actor_task_failed"):
    setattr(RayActorManager, _name, _as_death(getattr(RayActorManager, _name)))


def _once(fail: Callable[..., None]) -> Callable[..., None]:
    """Tells Tune but once that the worker which a trial was to have from one before is dead: it would hear that of the
    worker and of the trial, fail the trial for good, and wait for the worker."""

    def told(controller: TuneController, trial: Tried, exception: Exception) -> None:
        known = trial in controller._resetting_trials and trial.status == Tried.PENDING  # it is to begin again
        if known and isinstance(exception, RayActorError):
            controller._resetting_trials.discard(trial)
        else:
            fail(controller, trial, exception)

    return told


TuneController._trial_task_failure = _once(TuneController._trial_task_failure)


def mend_state(out: Storage) -> bool:
    """Whether Tune has kept what it knows of its trials, which is then renamed to come first: clocks go back, and Tune
    takes the last by name for the newest. It writes in place: where a kill cut that, the last copies of ours take the
    place of it, without which Tune would begin anew."""
    found = _states(out)
    states = {keys[-1]: out.read(keys[-1]) for keys in found.values()}
    if not all(map(_is_whole, states.values())) and all(out.exists(KEPT + kind) for kind in found):
        states = {keys[-1]: out.read(KEPT + kind) for kind, keys in found.items()}
    for (kind, keys), (newest, state) in zip(found.items(), states.items(), strict=True):
        first = f"{TUNE}{kind}{FIRST}{Path(newest).suffix}"
        out.write(first, state)
        for key in keys:
            if key != first:
                out.delete(key)
    return STATES[-1] in found


def copy_state(out: Storage) -> None:
    """Keep copies for `mend_state`, unless Tune is writing just now."""
    states = {kind: out.read(keys[-1]) for kind, keys in _states(out).items()}
    if all(map(_is_whole, states.values())):
        for kind, state in states.items():
            out.write(KEPT + kind, state)


def _states(out: Storage) -> dict[str, list[str]]:
    """The keys of each of `STATES` that is there, in the order of time."""
    found = {kind: sorted(entry.key for entry in out.list(f"{TUNE}{kind}")) for kind in STATES}
    return {kind: keys for kind, keys in found.items() if keys}


def _is_whole(state: bytes) -> bool:
    """Of JSON, or of a pickle, which ends in a word of its own."""
    with suppress(ValueError):
        return state.endswith(STOP) or bool(json.loads(state))
    return False


def end_of(tried: Tried) -> str:
    """Why a trial ended that could not say so itself; Ray tells it last."""
    here, error = Path(tried.pickled_error_file or ""), None
    with suppress(EOFError, UnpicklingError):  # Ray copies it to the storage while it writes it: a copy may be cut
        error = cloudpickle.loads(here.read_bytes()) if here.is_file() else tried.get_pickled_error()
    lines = str(error or tried.get_error() or "it has not begun").strip().splitlines()
    return str(find_ours(error) or textwrap.shorten(lines[-1], LONGEST))


class Ends(tune.Callback):  # type: ignore[misc]
    """What is done soon after a trial ends: Tune's state is copied, and the trial's checkpoints go, so that the disk
    holds those of running trials only."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._ended: deque[tuple[float, Any]] = deque()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        trial.max_failures = RETRIES  # also if it had failed for good, and the search is run again

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result.get("error"):  # it would fail again: only a lost worker is worth another try
            trial.max_failures = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended.append((time.monotonic(), trial))

    on_trial_error = on_trial_complete

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self._is_saved():
            with suppress(FruitrayError):  # the next trial to end tries again
                copy_state(open_storage(self._out))
        while self._is_saved():
            self._forget(self._ended.popleft()[1])

    def _is_saved(self) -> bool:
        """Whether Tune's own state is sure to know of the end that was first."""
        return bool(self._ended) and time.monotonic() - self._ended[0][0] > SAVED_S

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        for trial in trials:  # also those that ended before the search was broken off
            if trial.is_finished():
                self._forget(trial)

    def _forget(self, trial: Any) -> None:
        checkpoint = trial.checkpoint
        if checkpoint:
            with suppress(OSError):  # it is another's to clean up then; the results are safe
                for kept in checkpoint.filesystem.get_file_info(FileSelector(os.path.dirname(checkpoint.path))):
                    if kept.base_name.startswith("checkpoint_"):
                        checkpoint.filesystem.delete_dir(kept.path)


class Lines(tune.Callback):  # type: ignore[misc]
    """A line on the console for every trial that ends, and now and then for one that goes on."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if time.monotonic() - self._last >= LOG_INTERVAL_S and not result.get("error"):
            so_far = f"epoch {result['epochs']}, validation accuracy {result['accuracy']:.4f} so far"
            self._line(trials, trial, so_far, ended=False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        result = trial.last_result
        said = f"ended after epoch {result['epochs']}, validation accuracy {result['accuracy']:.4f}"
        self._line(trials, trial, said, ended=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._line(trials, trial, f"failed: {trial.last_result.get('error') or end_of(trial)}", ended=True)

    def _line(self, trials: list[Any], trial: Any, text: str, *, ended: bool) -> None:
        self._last = time.monotonic()
        number, model, fit = (trial.config["trial"][part] for part in ("number", "model", "fit"))
        options = f"learning rate {fit['learning_rate']:.3g}, batch {fit['batch_size']}, dropout {model['dropout']}"
        network = Network(model["backbone"], model["frozen"])
        count = ended + sum(other.is_finished() for other in trials if other is not trial)  # Tune may not know it yet
        reached(count)
        say(f"tune: {count} of {len(trials)} trials ended; number {number} ({network}, {options}): {text}")
