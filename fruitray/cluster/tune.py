"""tune: trials of several backbones under ASHA; every trial of a backbone starts from the same stored weights."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from fruitray.backbones import parameter_counts, pick_device, skeleton
from fruitray.cluster.embed import ensure_features, initial_model
from fruitray.cluster.runtime import claim, connect, open_output, require_ours, require_resources
from fruitray.config import FitConfig, ModelConfig, TuneConfig
from fruitray.console import LOG_INTERVAL_S, say, show_table
from fruitray.errors import TrialsFailedError, find_ours
from fruitray.fit import Epoch, fit
from fruitray.index import read_index
from fruitray.metrics import recalls, wilson_interval
from fruitray.package import Package, load_package
from fruitray.recipe import make_recipe
from fruitray.search import draw_trials
from fruitray.storage import Storage
from fruitray.weights import state_hash

SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("backbone", pa.string()),
        ("frozen", pa.bool_()),
        ("weights", pa.string()),
        ("learning_rate", pa.float64()),
        ("batch_size", pa.int32()),
        ("dropout", pa.float64()),
        ("accuracy", pa.float64()),  # on the validation photos, of the best epoch
        ("accuracy_low", pa.float64()),  # 95% Wilson interval
        ("accuracy_high", pa.float64()),
        ("recalls", pa.list_(pa.float64())),  # per class, classes sorted
        ("best_epoch", pa.int32()),
        ("epochs", pa.int32()),
        ("seconds", pa.float64()),
        ("images_per_s", pa.float64()),  # training examples, in the last epoch
        ("parameters", pa.int64()),
        ("trained_parameters", pa.int64()),
        ("initial_state_hash", pa.string()),  # SHA-256 of the tensors the trial started from
        ("error", pa.string()),
    ]
)


def run(config: TuneConfig) -> str:
    """Run or resume the search; write `trials.parquet` and `best.json`; show the trials, best first."""
    index = read_index(config.index)
    out = open_output(config.out)
    require_ours(out, "tune", config, index.sha256)
    trials = draw_trials(config)
    initial = _initial_models(config, out, index.classes, trials)
    claim(out, "tune", config, index.sha256)
    connect()
    require_resources(config.cpus_per_trial, config.gpus_per_trial)
    for backbone in {model.backbone for model, _ in trials if model.frozen}:
        ensure_features(config.index, index, initial[backbone], config.augment, gpu=config.gpus_per_trial > 0)
    rows = sorted(_search(config, out, trials, initial), key=_rank)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink)
    out.write("trials.parquet", sink.getvalue().to_pybytes())
    show_trials(rows)
    best = rows[0]
    if best["error"]:
        raise TrialsFailedError(out.uri, best["error"])
    model, fit_config = trials[best["trial"]]
    out.write("best.json", json.dumps({"model": asdict(model), "fit": asdict(fit_config)}, indent=2).encode())
    found = ", ".join(f"{name} {share:.3f}" for name, share in zip(index.classes, best["recalls"], strict=True))
    said = f"validation accuracy {best['accuracy']:.4f}; recall: {found}"
    say(f"best: trial {best['trial']}, {best['backbone']}, {said}")
    return f"tune: {len(rows)} trials in {out.uri_of('trials.parquet')}, the best one in {out.uri_of('best.json')}"


def _rank(row: dict[str, Any]) -> tuple[bool, float, int]:
    """The best first; failed trials last, whatever they had reached: training would fail in the same way."""
    return row["error"] is not None, -(row["accuracy"] or 0.0), row["trial"]


def _initial_models(
    config: TuneConfig, out: Storage, classes: tuple[str, ...], trials: list[tuple[ModelConfig, FitConfig]]
) -> dict[str, Package]:
    """What the trials of each backbone start from."""
    models = {model.backbone: model for model, _ in trials}
    return {backbone: initial_model(out, model, classes, config.seed) for backbone, model in models.items()}


def _search(
    config: TuneConfig, out: Storage, trials: list[tuple[ModelConfig, FitConfig]], initial: dict[str, Package]
) -> list[dict[str, Any]]:
    """A row of `SCHEMA` per trial; trials that an earlier, broken run finished are not run again."""
    space = {
        "index": config.index,
        "initial": {backbone: package.uri for backbone, package in initial.items()},
        "cpus": config.cpus_per_trial,
        "gpu": config.gpus_per_trial > 0,
        "trial": tune.grid_search(
            [
                {"number": number, "model": asdict(model), "fit": asdict(fit_config)}
                for number, (model, fit_config) in enumerate(trials)
            ]
        ),
    }
    trainable = tune.with_resources(_trial, {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial})
    path = f"{out.uri}/_ray/tune"
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True, param_space=space)
    else:
        scheduler = ASHAScheduler(max_t=config.epochs, grace_period=max(1, config.epochs // 4), reduction_factor=2)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(metric="accuracy", mode="max", scheduler=scheduler),
            run_config=tune.RunConfig(
                name="tune", storage_path=f"{out.uri}/_ray", verbose=0, callbacks=[_Lines(len(trials))]
            ),
        )
    return [_row(trials, result) for result in tuner.fit()]


def _trial(space: dict[str, Any]) -> None:
    """One trial, in a worker of its own: report after every epoch."""
    start = time.perf_counter()
    torch.set_num_threads(max(1, int(space["cpus"])))
    chosen = space["trial"]
    config, fit_config = ModelConfig(**chosen["model"]), FitConfig(**chosen["fit"])
    index = read_index(space["index"])
    initial = load_package(space["initial"][config.backbone]).model
    model = skeleton(config, len(index.classes), initial.preprocessing)
    model.load_state_dict(initial.state_dict())
    device = pick_device(gpu=space["gpu"])
    recipe = make_recipe(space["index"], index, model, fit_config, frozen=config.frozen, device=device)
    total, trained = parameter_counts(model)
    facts = {
        "parameters": total,
        "trained_parameters": trained,
        "initial_state_hash": state_hash(model.state_dict()),
    }
    for epoch in fit(recipe.module.to(device), recipe.train, recipe.val, fit_config, device=device):
        tune.report({**facts, **_measured(epoch), "seconds": time.perf_counter() - start})


def _measured(epoch: Epoch) -> dict[str, Any]:
    low, high = wilson_interval(epoch.best_counts)
    return {
        "accuracy": epoch.best_accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "recalls": recalls(epoch.best_counts),
        "best_epoch": epoch.best_number,
        "epochs": epoch.number,
        "images_per_s": epoch.images_per_s,
    }


def _row(trials: list[tuple[ModelConfig, FitConfig]], result: tune.Result) -> dict[str, Any]:
    number = result.config["trial"]["number"]
    model, fit_config = trials[number]
    settings = {**asdict(fit_config), **asdict(model)}
    row = {name: (result.metrics or {}).get(name, settings.get(name)) for name in SCHEMA.names}
    return row | {"trial": number, "epochs": row["epochs"] if result.metrics else 0, "error": _reason(result.error)}


def _reason(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(find_ours(error) or str(error).strip().splitlines()[-1])


def show_trials(rows: Sequence[dict[str, Any]]) -> None:
    """A table of trials (rows of `SCHEMA`), in the order given."""
    show_table("trials, best first", [_shown(row) for row in rows])


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a trial that fit on a screen."""
    interval = "" if row["accuracy"] is None else f"{row['accuracy_low']:.3f}-{row['accuracy_high']:.3f}"
    return {
        "trial": row["trial"],
        "backbone": row["backbone"],
        "frozen": row["frozen"],
        "rate": row["learning_rate"],
        "batch": row["batch_size"],
        "dropout": row["dropout"],
        "accuracy": row["accuracy"],
        "95% interval": interval,
        "best epoch": f"{row['best_epoch']} of {row['epochs']}",
        "seconds": row["seconds"],
        "trained": row["trained_parameters"],
        "started from": (row["initial_state_hash"] or "")[:8],
        "error": row["error"],
    }


class _Lines(tune.Callback):  # type: ignore[misc]
    """A line on the console for every trial that ends, and now and then for one that goes on."""

    def __init__(self, trials: int) -> None:
        self._trials, self._ended, self._last = trials, 0, time.monotonic()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if time.monotonic() - self._last >= LOG_INTERVAL_S:
            self._line(trial, f"epoch {result['epochs']}, validation accuracy {result['accuracy']:.4f} so far")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended += 1
        result = trial.last_result
        self._line(trial, f"ended with validation accuracy {result['accuracy']:.4f} after {result['epochs']} epochs")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._ended += 1
        self._line(trial, "failed")

    def _line(self, trial: Any, text: str) -> None:
        self._last = time.monotonic()
        number, model, fit_config = (trial.config["trial"][part] for part in ("number", "model", "fit"))
        settings = f"learning rate {fit_config['learning_rate']}, batch {fit_config['batch_size']}"
        said = f"{model['backbone']}{' frozen' if model['frozen'] else ''}, {settings}, dropout {model['dropout']}"
        say(f"tune: {self._ended} of {self._trials} trials ended; number {number} ({said}): {text}")
