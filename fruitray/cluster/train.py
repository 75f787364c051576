"""train: the final model on 1..N workers, resumable by the same command, ending in a model package."""

import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue
from torch.nn.parallel import DistributedDataParallel

from fruitray.augment import VARIANTS
from fruitray.backbones import layer_summary
from fruitray.cluster.embed import ensure_features, initial_model
from fruitray.cluster.runtime import claim, connect, lines_from_workers, open_output, require_ours, worker_count
from fruitray.config import FitConfig, ModelConfig, TrainConfig
from fruitray.console import say, show_table
from fruitray.fit import Epoch, fit
from fruitray.index import read_index
from fruitray.metrics import precisions, recalls, wilson_interval
from fruitray.package import DESCRIPTION, load_package, read_description, save_package
from fruitray.recipe import make_recipe
from fruitray.storage import Storage, open_storage

KEPT_CHECKPOINTS = 2


def run(config: TrainConfig) -> str:
    """Train, or resume, and write the package; show its metrics. A finished package is left as it is."""
    index = read_index(config.index)
    out = open_output(config.out)
    require_ours(out, "train", config, index.sha256)
    if not out.exists(DESCRIPTION):
        initial = initial_model(out, config.model, index.classes, config.fit.seed)
        claim(out, "train", config, index.sha256)
        out.write("layers.txt", layer_summary(initial.model).encode())
        connect()
        worker_count(config.workers, gpu=config.gpu)
        if config.model.frozen and config.fit.augment in VARIANTS:
            ensure_features(config.index, index, initial, config.fit.augment, gpu=config.gpu)
        with lines_from_workers() as lines:
            _train(config, out, initial.uri, lines)
    description, model_id = read_description(out)
    show_metrics(description)
    return f"train: {config.model.backbone} model package {model_id[:12]} in {out.uri}"


def _train(config: TrainConfig, out: Storage, initial_uri: str, lines: Queue) -> None:
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"config": asdict(config), "out": out.uri, "initial": initial_uri, "lines": lines},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpu, resources_per_worker=_share(config)
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=f"{out.uri}/_ray",
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()


def _share(config: TrainConfig) -> dict[str, float]:
    """What each worker reserves: the CPUs of the smallest node, shared among the workers it gets."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus >= 1]
    share = min(nodes) // -(-config.workers // len(nodes))
    return {"CPU": max(1, share), **({"GPU": 1} if config.gpu else {})}


def _work(job: dict[str, Any]) -> None:
    """One worker: its share of every batch; rank 0 keeps checkpoints and writes the package."""
    config, context = job["config"], ray.train.get_context()
    model_config, fit_config = ModelConfig(**config["model"]), FitConfig(**config["fit"])
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    index, initial = read_index(config["index"]), load_package(job["initial"])
    recipe = make_recipe(
        config["index"],
        index,
        initial.model,
        fit_config,
        frozen=model_config.frozen,
        rank=rank,
        world=world,
        device=device,
    )
    recipe.model.to(device)
    resume = _read_checkpoint()
    history = resume["history"] if resume else []
    for epoch in fit(
        recipe.module,
        recipe.train,
        recipe.val,
        fit_config,
        device=device,
        reduce=_sum_over_workers if world > 1 else lambda tensor: tensor,
        wrap=DistributedDataParallel if world > 1 else lambda module: module,
        resume=resume["fit"] if resume else None,
    ):
        history.append(_measured(epoch))
        _report(history, epoch, rank)
        if rank == 0:
            with suppress(ray.exceptions.RayError):  # nobody listens any more: no reason to stop
                job["lines"].put(_line(epoch, fit_config))
    if rank == 0:
        facts = {
            "initial_weights": initial.description["initial_weights"],
            "initial_state_hash": initial.description["state_hash"],
            "index": {"uri": config["index"], "sha256": index.sha256},
            "fit": config["fit"],
            "metrics": max(history, key=lambda row: (row["accuracy"], -row["val_loss"])),
            "history": history,
        }
        save_package(open_storage(job["out"]), recipe.model, model_config, index.classes, facts)


def _sum_over_workers(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.to(ray.train.torch.get_device(), copy=True)
    torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def _measured(epoch: Epoch) -> dict[str, Any]:
    """What is kept of an epoch in package.json."""
    return {
        "epoch": epoch.number,
        "train_loss": epoch.train_loss,
        "val_loss": epoch.val_loss,
        "accuracy": epoch.accuracy,
        "accuracy_interval": list(wilson_interval(epoch.counts)),
        "recalls": recalls(epoch.counts),
        "precisions": precisions(epoch.counts),
        "confusion": epoch.counts.tolist(),
        "seconds": epoch.seconds,
        "images_per_s": epoch.images_per_s,
    }


def _line(epoch: Epoch, config: FitConfig) -> str:
    losses = f"loss {epoch.train_loss:.4f} train, {epoch.val_loss:.4f} validation"
    speed = f"{epoch.images_per_s:,.0f} images/s"
    return f"train: epoch {epoch.number} of {config.epochs}, {losses}, accuracy {epoch.accuracy:.4f}, {speed}"


def _report(history: list[dict[str, Any]], epoch: Epoch, rank: int) -> None:
    """Report the epoch, with a checkpoint from rank 0, to go on from."""
    last = history[-1]
    if rank:
        ray.train.report(last)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"fit": epoch.state, "history": history}, os.path.join(folder, "checkpoint.pt"))
        ray.train.report(last, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _read_checkpoint() -> dict[str, Any] | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(os.path.join(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)
    return state


def show_metrics(description: dict[str, Any]) -> None:
    """The confusion table and the accuracy that a package's description keeps."""
    metrics, classes = description["metrics"], description["classes"]
    show_table(
        "confusion on the validation photos: true classes down, predicted across",
        [
            {"": name, **dict(zip(classes, counts, strict=True)), "recall": recall}
            for name, counts, recall in zip(classes, metrics["confusion"], metrics["recalls"], strict=True)
        ],
    )
    low, high = metrics["accuracy_interval"]
    say(f"validation accuracy {metrics['accuracy']:.4f} (95% interval {low:.4f}-{high:.4f})")
