"""Where a training can be watched: TensorBoard's event files below --out; MLflow, where the environment names a server.

A step is an epoch. Each epoch has an event file of its own, which a training that resumes and repeats the epoch
replaces: so no reader sees a step twice, and a bucket, which cannot append, is served like a folder. For the same
reason an MLflow run goes on, too, and is not told again of epochs that it knows.

Nothing that fails here ends a training.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from fruitray.storage import Storage

FOLDER = "tensorboard"
MLFLOW_RUN = "mlflow.json"
"""Names the MLflow run of the training beside it, so that a resumed one goes on with it."""
SERVER = "MLFLOW_TRACKING_URI"
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""What MLflow's client is told where the environment says nothing; its own patience would hold up a training."""

Row = Mapping[str, Any]
"""What is measured of an epoch; its numbers are tracked, under their names, at step `epoch`."""


class Tracker(Protocol):
    """One place that a training is tracked in. All of it may raise anything."""

    def epoch(self, row: Row) -> None:
        """Note a finished epoch."""

    def finish(self, row: Row) -> None:
        """Note the epoch whose weights were kept: the last call of a training that came to its end."""

    def close(self, *, failed: bool) -> None:
        """Let go."""


class Tracking:
    """All trackers of one training; one that fails is said once through `warn`, and left out from then on."""

    def __init__(self, start: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._trackers: dict[str, Tracker] = {}
        for name, make in start.items():
            with self._going_on_without(name):
                self._trackers[name] = make()

    def epoch(self, row: Row) -> None:
        """Note a finished epoch."""
        self._each(lambda tracker: tracker.epoch(row))

    def finish(self, row: Row) -> None:
        """Note the epoch whose weights were kept."""
        self._each(lambda tracker: tracker.finish(row))

    def close(self, *, failed: bool) -> None:
        """Let go of all trackers."""
        self._each(lambda tracker: tracker.close(failed=failed))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._going_on_without(name):
                action(tracker)

    @contextmanager
    def _going_on_without(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            said = str(error).partition("\n")[0] or type(error).__name__
            with suppress(Exception):  # the driver may be gone
                self._warn(f"train: goes on without {name}: {said}")


@contextmanager
def tracking(
    out: Storage, config: Mapping[str, Any], *, rank: int, warn: Callable[[str], object]
) -> Iterator[Tracking]:
    """Yields what rank 0 tracks its training with, and other ranks nothing; `config` becomes the hyperparameters."""
    start: dict[str, Callable[[], Tracker]] = {}
    if rank == 0:
        start["TensorBoard"] = lambda: _TensorBoard(out, hyperparameters(config))
        if os.environ.get(SERVER):
            start["MLflow"] = lambda: _MLflow(out, hyperparameters(config))
    tracking = Tracking(start, warn)
    try:
        yield tracking
    except BaseException:
        tracking.close(failed=True)
        raise
    tracking.close(failed=False)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The options of a job by name, as on its command line, without those that were not given and have no value."""
    groups = [value for value in config.values() if isinstance(value, Mapping)]
    options = {name: value for name, value in config.items() if not isinstance(value, Mapping)}
    for group in groups:
        options |= group
    return {name: value for name, value in options.items() if value is not None}


def numbers(row: Row) -> dict[str, float]:
    """What of an epoch can be drawn as a curve."""
    return {name: value for name, value in row.items() if isinstance(value, int | float) and name != "epoch"}


class _TensorBoard:
    """Event files `events.out.tfevents.NUMBER.fruitray`, which TensorBoard reads in the order of their names."""

    def __init__(self, out: Storage, options: dict[str, Any]) -> None:
        self._out = out
        best = dict.fromkeys(_best({"accuracy": 0.0, "val_loss": 0.0}), 0.0)
        experiment, start, self._end = hparams(options, best)
        text = "\n".join(f"    {name}: {value}" for name, value in sorted(options.items()))
        self._write("0" * 10, lambda writer: _add(writer, 0, {}, text, experiment, start))

    def epoch(self, row: Row) -> None:
        self._write(f"{row['epoch']:010d}", lambda writer: _add(writer, row["epoch"], numbers(row)))

    def finish(self, row: Row) -> None:
        self._write("final", lambda writer: _add(writer, row["epoch"], _best(numbers(row)), "", self._end))

    def close(self, *, failed: bool) -> None:
        pass

    def _write(self, number: str, fill: Callable[[SummaryWriter], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="fruitray-") as folder:
            with SummaryWriter(folder) as writer:
                fill(writer)
            [path] = Path(folder).iterdir()
            self._out.write(f"{FOLDER}/events.out.tfevents.{number}.fruitray", path.read_bytes())


def _add(writer: SummaryWriter, step: int, scalars: Mapping[str, float], text: str = "", *summaries: Any) -> None:
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)
    if text:
        writer.add_text("config", text, step)
    for summary in summaries:
        writer.file_writer.add_summary(summary)


def _best(row: Mapping[str, float]) -> dict[str, float]:
    return {f"best_{name}": value for name, value in row.items()}


class _MLflow:
    """A run of the server, and in the experiment, that MLflow's own environment variables name."""

    def __init__(self, out: Storage, options: dict[str, Any]) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ImportError(f"{SERVER} is set, but the package is missing: pip install mlflow-skinny")
        for name, value in IMPATIENT.items():
            os.environ.setdefault(name, value)
        import mlflow

        self._mlflow = mlflow
        known = json.loads(out.read(MLFLOW_RUN))["run_id"] if out.exists(MLFLOW_RUN) else None
        run = mlflow.start_run(run_id=known)
        self._sent = int(run.data.metrics.get("epoch", 0))
        if known is None:
            mlflow.log_params(options)
            out.write(MLFLOW_RUN, json.dumps({"run_id": run.info.run_id}).encode())

    def epoch(self, row: Row) -> None:
        if row["epoch"] > self._sent:
            self._mlflow.log_metrics({**numbers(row), "epoch": row["epoch"]}, step=row["epoch"])

    def finish(self, row: Row) -> None:
        self._mlflow.log_metrics(_best(numbers(row)), step=row["epoch"])

    def close(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")
