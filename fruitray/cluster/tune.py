"""tune: trials of several backbones, scheduled by Ray Tune; every trial of a backbone starts from the same weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial as Tried
from ray.tune.schedulers import ASHAScheduler

from fruitray.augment import VARIANTS
from fruitray.backbones import freeze, layer_summary, unfreeze
from fruitray.cluster.connection import connect
from fruitray.cluster.embed import ensure_features, initial_model
from fruitray.cluster.placement import seek_room
from fruitray.cluster.preflight import decoded_size, preflight
from fruitray.cluster.runtime import claim, open_output, place_for_ray, require_ours
from fruitray.cluster.trial import held_out, run_trial
from fruitray.cluster.watch import RETRIES, Ends, Lines, end_of, mend_state
from fruitray.config import TuneConfig
from fruitray.console import progress, say
from fruitray.errors import (
    FruitrayError,
    GpuFullError,
    TrialsFailedError,
    TryAgainError,
    UsageError,
    find_ours,
)
from fruitray.index import Index, index_place, read_index
from fruitray.package import Package
from fruitray.search import Network, Trial, Walk, draw_trials, networks, settings, within
from fruitray.split import require_folds
from fruitray.storage import Storage, open_storage, require_answer
from fruitray.tables import parquet
from fruitray.trials import SCHEMA, announce, rank, show_sweeps, show_trials, table, unpack


def run(config: TuneConfig) -> str:
    """Run or resume the search; write `trials.parquet` and `best.json`; show the trials, best first."""
    require_answer(index_place(config.index)[0])
    index = read_index(config.index)
    out = open_output(config.out, open_storage(index.images))
    require_ours(out, "tune", config, index.sha256)
    place = place_for_ray(out)
    if config.folds:
        require_folds(index, config.folds)
    if config.dry_run:
        reads, size = [index.images, index_place(config.index)[0].uri], decoded_size(index, config.image_size)
        return preflight("tune", reads, config.out, cpus=config.cpus_per_trial, gpus=config.gpus_per_trial, disk=size)
    optuna = _optuna(config) if config.search == "optuna" else None
    initial = _initial_models(config, out, index)
    claim(out, "tune", config, index.sha256)
    connect()
    seek_room("tune", 1, cpus=config.cpus_per_trial, gpus=config.gpus_per_trial)
    without = _embed(config, index, initial) if config.fit.augment in VARIANTS else {}
    tried = _search(config, out, index.sha256, place, optuna)
    found = sorted((_row(trial, without) for trial in tried), key=lambda pair: rank(pair[0]))
    groups = _groups(index, config)
    rows = [row | {"groups": groups if row["right"] else None} for row, _ in found]
    out.write("trials.parquet", parquet(table(rows)))
    show_trials(rows)
    if config.search == "sweep":
        show_sweeps(rows, config.fit.epochs)
    best, chosen = found[0]
    if best["error"]:
        raise TrialsFailedError(out.uri, best["error"])
    out.write("best.json", json.dumps(chosen, indent=2).encode())
    announce(rows, index.classes)
    return f"tune: {len(rows)} trials in {out.uri_of('trials.parquet')}, the best one in {out.uri_of('best.json')}"


def _groups(index: Index, config: TuneConfig) -> list[int]:
    """Of each photo that a trial validates, in its order, a number that its duplicates have, too."""
    pool = index.pool()
    numbers = np.unique(pool.groups, return_inverse=True)[1]
    found = np.concatenate([numbers[part.numpy()] for part in held_out(pool, config.folds, config.fit.seed)])
    return [int(number) for number in found]


def _initial_models(config: TuneConfig, out: Storage, index: Index) -> dict[str, Package]:
    """What the trials of each frozen backbone start from, with the layers of all as text beside the results.

    A backbone whose weights cannot be had is said; its trials will fail, and the others go on.

    Raises:
        UsageError: a trial that may be tried makes no sense.
    """
    anything = replace(config, search="grid") if config.search == "optuna" else config  # which may try all there is
    compared = [Network(trial.model.backbone, trial.model.frozen) for trial in draw_trials(anything)]
    found: dict[str, Package] = {}
    errors = []
    for network in {network.backbone: network for network in compared}.values():
        start, fit = settings(config, network, Walk([]))
        try:
            found[network.backbone] = initial_model(out, start, index.classes, fit.seed)
        except (UsageError, TryAgainError):
            raise
        except FruitrayError as error:
            errors.append(error)
            say(f"tune: without {network}: {error}")
    if not found:
        raise errors[0]
    had = [network for network in dict.fromkeys(compared) if network.backbone in found]
    for network in had:
        model = found[network.backbone].model
        (freeze if network.frozen else unfreeze)(model)
        out.write(f"layers/{network}.txt", layer_summary(model).encode())
    return {network.backbone: found[network.backbone] for network in had if network.frozen}


def _embed(config: TuneConfig, index: Index, initial: dict[str, Package]) -> dict[str, str]:
    """Have the embeddings of the frozen backbones; answers why those that could not be embedded could not.

    Their trials will fail, and the others go on.
    """
    errors: dict[str, FruitrayError] = {}
    for backbone, package in initial.items():
        gpu = config.gpus_per_trial > 0
        try:
            ensure_features(config.index, index, package, config.fit, folds=config.folds > 0, gpu=gpu)
        except (GpuFullError, TryAgainError) as error:  # Ray's, which say much more, or ours
            errors[backbone] = find_ours(error) or error
            say(f"tune: without {Network(backbone, True)}: {errors[backbone]}")
    lost = [network.frozen and network.backbone not in initial.keys() - errors.keys() for network in networks(config)]
    if errors and all(lost):
        raise next(iter(errors.values()))
    return {backbone: str(error) for backbone, error in errors.items()}


def _search(config: TuneConfig, out: Storage, index_sha256: str, place: str, optuna: Any) -> list[Tried]:
    """All trials, ended; those that an earlier, broken run finished are not run again."""
    shared = {"index": config.index, "out": out.uri, "folds": config.folds, "cpus": config.cpus_per_trial}
    space: dict[str, Any] = {**shared, "index_sha256": index_sha256, "gpu": config.gpus_per_trial > 0}
    total = config.trials
    if config.search != "optuna":
        drawn = draw_trials(config)
        space["trial"], total = tune.grid_search([plain(n, trial) for n, trial in enumerate(drawn)]), len(drawn)
        if config.search == "random" and total < config.trials:
            say(f"tune: {total} trials, as no other can be drawn from what there is to choose from")
    trainable = tune.with_resources(run_trial, {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial})
    path, again = f"{place}/tune", config.search != "optuna"  # which knows no trial that is run again
    if tune.Tuner.can_restore(path) and mend_state(out):
        tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=again, param_space=space)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                scheduler=_asha(config) if config.scheduler == "asha" and not config.folds else None,
                search_alg=optuna,
                num_samples=config.trials if config.search == "optuna" else 1,
                reuse_actors=True,  # a new one takes seconds to load PyTorch and Ray
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=place,
                verbose=0,
                callbacks=[Ends(out.uri), Lines()],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2),  # Tune's stored state may know the older only
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
    with progress("tune", total, "trials", in_logs=False):
        return list(tuner.fit()._experiment_analysis.trials)  # its results do not know which trial never reported


def _asha(config: TuneConfig) -> ASHAScheduler:
    epochs = config.fit.epochs
    return ASHAScheduler(time_attr="epochs", max_t=epochs, grace_period=max(1, epochs // 4), reduction_factor=2)


def _optuna(config: TuneConfig) -> Any:
    try:
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(partial(_suggested, config), metric="accuracy", mode="max", seed=config.fit.seed % 2**32)
    except (ImportError, AssertionError) as error:
        raise UsageError("--search optuna: needs Optuna: pip install fruitray[optuna]") from error


def _suggested(config: TuneConfig, asked: Any) -> dict[str, Any]:
    """What Optuna suggests, `asked` for one trial."""
    compared = {str(network): network for network in networks(config)}
    network = compared[asked.suggest_categorical("network", list(compared))]
    return {"trial": plain(asked.number, Trial(*settings(config, network, _Suggestions(asked))))}


class _Suggestions:
    """Picks what Optuna suggests."""

    def __init__(self, asked: Any) -> None:
        self._asked = asked

    def one_of(self, name: str, choices: Sequence[Any]) -> Any:
        return self._asked.suggest_categorical(name, choices)

    def between(self, name: str, values: Sequence[float]) -> float:
        return within(values, self._asked.suggest_float(name, min(values), max(values), log=True))


def plain(number: int, trial: Trial) -> dict[str, Any]:
    """A trial as Tune carries it, and as `best.json` keeps it."""
    return {"number": number, "axis": trial.axis, "model": asdict(trial.model), "fit": asdict(trial.fit)}


def _row(tried: Tried, without: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of `SCHEMA`, and what of the trial `best.json` keeps; `without` is `_embed`'s."""
    chosen, measured = tried.config["trial"], tried.last_result or {}
    known = {**chosen["fit"], **chosen["model"], "axis": chosen["axis"], **measured, "trial": chosen["number"]}
    row = {name: known.get(name) for name in SCHEMA.names}
    if measured.get("epochs"):
        row["right"] = unpack(measured["right"], measured["photos"])
    else:
        row |= {"accuracy": None, "epochs": 0}
    if not row["error"] and (tried.status == Tried.ERROR or not row["epochs"]):
        row["error"] = end_of(tried)
    if row["error"] and chosen["model"]["frozen"]:
        row["error"] = without.get(chosen["model"]["backbone"], row["error"])
    return row, {"model": chosen["model"], "fit": chosen["fit"]}
