"""train: the final model on 1..N workers, resumable by the same command, ending in an evaluated model package."""

import os
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.util.queue import Queue
from torch.nn.parallel import DistributedDataParallel

from fruitray.augment import VARIANTS
from fruitray.backbones import layer_summary
from fruitray.card import FILE as CARD
from fruitray.card import model_card, show_evaluation
from fruitray.cluster.embed import ensure_features, initial_model
from fruitray.cluster.runtime import claim, connect, lines_from_workers, open_output, require_ours, worker_count
from fruitray.config import FitConfig, ModelConfig, TrainConfig
from fruitray.evaluation import FILE as METRICS
from fruitray.evaluation import Evaluation, evaluate_recipe
from fruitray.fit import Epoch, fit
from fruitray.index import Index, read_index
from fruitray.metrics import recalls, wilson_interval
from fruitray.package import DESCRIPTION, Package, load_package, read_description, read_file, save_package
from fruitray.recipe import Recipe, make_recipe
from fruitray.storage import Storage, open_storage
from fruitray.tables import field, parquet

KEPT_CHECKPOINTS = 2

HISTORY = pa.schema(
    column.with_nullable(False)
    for column in [
        field("epoch", pa.int32(), "from 1"),
        field("train_loss", pa.float64(), "mean over the training examples, as it is minimised"),
        field("val_loss", pa.float64(), "mean cross-entropy over the validation photos"),
        field("accuracy", pa.float64(), "share of the validation photos that was right"),
        field("accuracy_low", pa.float64(), "95% Wilson interval of the accuracy"),
        field("accuracy_high", pa.float64(), "95% Wilson interval of the accuracy"),
        field("recalls", pa.list_(pa.float64()), "per class, in the order of their names"),
        field("seconds", pa.float64(), "of the epoch, validation included"),
        field("images_per_s", pa.float64(), "training examples per second, validation left out"),
    ]
)
"""`history.parquet`: a row per epoch."""


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
    model_id = show_metrics(out)
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
        _write_package(job, recipe, index, initial, history, device)


def _write_package(
    job: dict[str, Any], recipe: Recipe, index: Index, initial: Package, history: list[dict[str, Any]], device: Any
) -> None:
    """Evaluate the final model, which `recipe` holds, on all validation photos, and write its package."""
    config, out = job["config"], open_storage(job["out"])
    model_config = ModelConfig(**config["model"])
    evaluation, predictions = evaluate_recipe(
        recipe, index, tta=config["tta"], coverage=config["coverage"], device=device
    )
    facts = {
        "initial_weights": initial.description["initial_weights"],
        "initial_state_hash": initial.description["state_hash"],
        "index": {"uri": config["index"], "sha256": index.sha256, **_photos(index)},
        "fit": config["fit"],
        "epochs": len(history),
        "best_epoch": max(history, key=lambda row: (row["accuracy"], -row["val_loss"]))["epoch"],
        "metrics": evaluation.summary,
    }
    files = {
        METRICS: evaluation.to_json(),
        "history.parquet": parquet(pa.Table.from_pylist(history, HISTORY)),
        "predictions.parquet": parquet(predictions),
        CARD: model_card(recipe.model, model_config, facts, evaluation, out.uri).encode(),
    }
    save_package(out, recipe.model, model_config, index.classes, facts, inference=evaluation.inference, files=files)


def _photos(index: Index) -> dict[str, dict[str, int]]:
    """How many photos of each class train, and validate."""
    counts = {split: Counter(index.rows(split)[1]) for split in ("train", "val")}
    return {split: {name: its[number] for number, name in enumerate(index.classes)} for split, its in counts.items()}


def _sum_over_workers(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.to(ray.train.torch.get_device(), copy=True)
    torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def _measured(epoch: Epoch) -> dict[str, Any]:
    """The row of `HISTORY`."""
    low, high = wilson_interval(epoch.counts)
    return {
        "epoch": epoch.number,
        "train_loss": epoch.train_loss,
        "val_loss": epoch.val_loss,
        "accuracy": epoch.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "recalls": recalls(epoch.counts),
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


def show_metrics(out: Storage) -> str:
    """Show the evaluation that the package in `out` keeps; answers its model id.

    Raises:
        ModelRejectedError: there is none, or it is not the one that was written.
    """
    description, model_id = read_description(out)
    show_evaluation(Evaluation.from_json(read_file(out, description, METRICS)))
    return model_id
