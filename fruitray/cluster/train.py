"""train: the final model on 1..N workers, resumable by the same command, ending in an evaluated model package."""

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.util.queue import Queue

from fruitray import status
from fruitray.augment import VARIANTS
from fruitray.backbones import freeze, layer_summary, rebuilt
from fruitray.batch_norm import Synchronised
from fruitray.checkpoints import (
    Keeper,
    committed_checkpoints,
    delete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from fruitray.cluster.connection import connect
from fruitray.cluster.embed import ensure_features, initial_model
from fruitray.cluster.placement import cpus_per_gpu, say_who_waits, seek_room
from fruitray.cluster.preflight import decoded_size, preflight
from fruitray.cluster.runtime import (
    claim,
    lines_from_workers,
    open_output,
    place_for_ray,
    require_ours,
    workers_died,
)
from fruitray.config import FitConfig, ModelConfig, TrainConfig
from fruitray.console import progress, reached, say, tell
from fruitray.errors import GpuFullError, OutputConflictError, TryAgainError, find, find_ours, one_line
from fruitray.final import best_row, history_row, show_final, write_final
from fruitray.fit import Epoch, fit_with_pauses
from fruitray.index import index_place, read_index
from fruitray.package import DESCRIPTION, is_whole, load_package
from fruitray.recipe import Recipe, make_recipe
from fruitray.sheet import write_sheet
from fruitray.steps import use_threads
from fruitray.storage import Storage, open_storage, require_answer
from fruitray.tracking import Tracking, tracking

FAILURES = 3
"""How often the workers are started again after a failure, if nothing was reached in between."""
SHEET_PHOTOS, SHEET_SIDE = 3, 96
"""Photos that `augment.png` shows, and their pixels."""


def run(config: TrainConfig) -> str:
    """Train, or resume, and write the package; show its evaluation. A finished package is left as it is."""
    require_answer(index_place(config.index)[0])
    index = read_index(config.index)
    out = open_output(config.out, open_storage(index.images))
    require_ours(out, "train", config, index.sha256)
    if out.exists(DESCRIPTION) and not out.exists("train.json"):
        raise OutputConflictError(out.uri_of(DESCRIPTION), "was not trained here; choose another --out")
    place = place_for_ray(out)
    if config.dry_run:
        reads, size = [index.images, index_place(config.index)[0].uri], decoded_size(index, config.model.image_size)
        connect()
        return preflight("train", reads, config.out, workers=config.workers, **_share(config), disk=size)
    if out.exists(DESCRIPTION) and not _can_be_mended(out):
        status.mend(out)
    else:
        initial = initial_model(out, config.model, index.classes, config.fit.seed)
        if config.model.frozen:
            freeze(initial.model)
        claim(out, "train", config, index.sha256)
        out.write("layers.txt", layer_summary(initial.model).encode())
        connect()
        share = _share(config)
        seek_room("train", config.workers, **share)
        if config.model.frozen and config.fit.augment in VARIANTS:
            ensure_features(config.index, index, initial, config.fit, gpu=config.gpu)
        with progress("train", config.fit.epochs, "epochs", in_logs=False), lines_from_workers() as lines:
            given = {"place": place, "initial": initial.uri, "index_sha256": index.sha256}
            _train(config, out, {**given, "lines": lines, "cpus": share["cpus"]})
    load_package(out.uri)  # which is verified: only then the checkpoints may go
    delete_checkpoints(out)
    model_id = show_final(out)
    return f"train: {config.model.backbone} model package {model_id[:12]} in {out.uri}"


def _can_be_mended(out: Storage) -> bool:
    """Whether the package is broken, as where two wrote it at once, and checkpoints are left to write it from again."""
    broken = next(committed_checkpoints(out), None) is not None and not is_whole(out)
    if broken:
        say(f"train: the package in {out.uri} is not whole; writing it again")
    return broken


def _train(config: TrainConfig, out: Storage, given: dict[str, Any]) -> None:
    """Run the workers, which are `given` that, until the package stands, for as long as they get on between one failure
    and the next.

    What would fail again is not tried again, as Ray Train does it. Where memory was too small and a worker could not
    compute the step again by itself, as where several work, they are told here to do with less. Where there is no room
    for them, as after a node was lost, they wait, and every minute it is seen anew what each may have.
    """
    job = {"config": asdict(config), "out": out.uri, **given}
    parts, failures, waiting, share = config.fit.accumulate, 0, False, config.fit.batch_size // config.workers
    while True:
        before = next(committed_checkpoints(out), None)
        try:
            _trainer(config, job | {"parts": parts}).fit()
            return
        except (WorkerGroupError, ControllerError, RayActorError) as error:
            if find(error, WorkerGroupStartupTimeoutError):
                if not waiting:
                    say_who_waits("train", config.workers, **_share(config, job["cpus"]))
                waiting = True
                continue
            waiting = False
            if is_whole(out):
                return  # they had done all
            full, ours = find(error, torch.OutOfMemoryError), find_ours(error)
            died = find(error, RayActorError) or find(error, WorkerGroupStartupFailedError)
            if full and parts < share:
                parts = min(2 * parts, share)
                say(f"train: too little memory; computing each step in {parts} parts")
                continue
            if full:
                raise GpuFullError from error
            if ours and not isinstance(ours, TryAgainError):
                raise
            failures = 1 if next(committed_checkpoints(out), None) != before else failures + 1
            if failures > FAILURES:
                if died and not ours:
                    raise workers_died(error) from error
                raise
            cause = find(error, Exception) or error
            why = ours or ("a worker died" if died else f"{type(cause).__name__}: {one_line(cause)}")
            say(f"train: {why}; starting again")


class _Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C is `cli.py`'s; Ray's own way would have it end as if all were done, and be deaf afterwards."""


def _trainer(config: TrainConfig, job: dict[str, Any]) -> _Trainer:
    share = _share(config, job["cpus"])
    resources = {"CPU": share["cpus"], **({"GPU": share["gpus"]} if config.gpu else {})}
    return _Trainer(
        _work,
        train_loop_config={**job, "cpus": share["cpus"]},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=secrets.token_hex(4),  # not to go on from Ray's own state: ours tells all there is to know
            storage_path=job["place"],
            failure_config=ray.train.FailureConfig(controller_failure_limit=0),  # it would wait without a word
        ),
    )


def _share(config: TrainConfig, before: float = 1) -> dict[str, float]:
    """What each worker reserves: the CPUs of the smallest node, shared among the workers it gets; with a GPU, those
    that any node has for each of its GPUs. As `before` where no node is there, as when one that was lost is replaced:
    other numbers of threads sum in other orders."""
    if config.gpu:
        return {"cpus": cpus_per_gpu(), "gpus": 1}
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus >= 1]
    if not nodes:
        return {"cpus": before, "gpus": 0}
    return {"cpus": max(1, min(nodes) // -(-config.workers // len(nodes))), "gpus": 0}


def _work(job: dict[str, Any]) -> None:
    """One worker: its share of every batch; rank 0 keeps checkpoints and writes the package."""
    use_threads(int(job["cpus"]))  # Ray's number is another in a process that had a task before
    config, context = job["config"], ray.train.get_context()
    rank, device, out = context.get_world_rank(), ray.train.torch.get_device(), open_storage(job["out"])
    tell(_teller(job["lines"]))
    index, initial = read_index(config["index"], job["index_sha256"]), load_package(job["initial"])
    model = rebuilt(initial.model, ModelConfig(**config["model"]), len(index.classes))
    fit_config = FitConfig(**config["fit"])
    recipe = make_recipe(
        config["index"],
        index,
        model,
        fit_config,
        frozen=config["model"]["frozen"],
        rank=rank,
        world=context.get_world_size(),
        device=device,
    )
    recipe.model.to(device)
    if rank == 0 and fit_config.augment != "none":
        write_sheet(out, index, fit_config.augment, fit_config.seed, photos=SHEET_PHOTOS, side=SHEET_SIDE)
    with tracking(out, config, rank=rank, warn=say) as track:
        keeper = Keeper(out, 60 * config["checkpoint_minutes"])
        resume = _resume(out, rank)
        history = _fit(recipe, fit_config, job["parts"], keeper, resume, track)
        track.finish(best_row(history))
    if rank == 0:
        write_final(out, config, recipe, index, initial, history, device)


def _fit(
    recipe: Recipe,
    config: FitConfig,
    parts: int,
    keeper: Keeper,
    resume: dict[str, Any] | None,
    track: Tracking,
) -> list[dict[str, Any]]:
    """Train as `recipe` says, keeping checkpoints; answers a row for each epoch."""
    rank, alone = recipe.train.rank, recipe.train.world == 1
    history: list[dict[str, Any]] = resume["history"] if resume else []
    for moment in fit_with_pauses(
        recipe.module,
        recipe.train,
        recipe.val,
        config,
        device=recipe.train.device,
        reduce=_itself if alone else _sum_over_workers,
        wrap=_itself if alone else Synchronised,
        due=keeper.due if rank == 0 else lambda: False,
        parts=parts,
        resume=resume,
    ):
        if isinstance(moment, Epoch):
            history.append(history_row(moment))
            track.epoch(history[-1])
        if rank == 0:
            keeper.keep({**moment.state, "history": history}, now=not isinstance(moment, Epoch))
        if rank == 0 and isinstance(moment, Epoch):
            say(_line(moment, config))
            reached(moment.number)
    return history


def _resume(out: Storage, rank: int) -> dict[str, Any] | None:
    """The newest whole state, the same for all workers: the first one looks, the others are told its name."""
    name = newest_checkpoint(out, say) if rank == 0 else None
    name = ray.train.collective.broadcast_from_rank_zero(name)
    if name is None:
        return None
    state = load_checkpoint(out, name)
    if rank == 0:
        say(f"train: going on from a checkpoint, epochs done: {state['number']}, steps of the next: {state['step']}")
        reached(state["number"])
    return state


def _teller(lines: Queue) -> Callable[[str | int], None]:
    """Hands on to the driver's console."""

    def hear(told: str | int) -> None:
        with suppress(RayError):  # nobody listens any more: no reason to stop
            lines.put(told)

    return hear


def _itself(it: Any) -> Any:
    return it


def _sum_over_workers(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.to(ray.train.torch.get_device(), copy=True)
    torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def _line(epoch: Epoch, config: FitConfig) -> str:
    losses = f"loss {epoch.train_loss:.4f} train, {epoch.val_loss:.4f} validation"
    speed = f"{epoch.images_per_s:,.0f} images/s"
    halved = "" if epoch.parts == config.accumulate else f", too little memory: each step in {epoch.parts} parts"
    return f"train: epoch {epoch.number} of {config.epochs}, {losses}, accuracy {epoch.accuracy:.4f}, {speed}{halved}"
