"""A finished training run -> its evaluated model package, as files and on the console."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from fruitray.card import FILE as CARD
from fruitray.card import model_card, show_evaluation
from fruitray.config import ModelConfig
from fruitray.evaluation import FILE as METRICS
from fruitray.evaluation import Evaluation, evaluate_recipe
from fruitray.fit import Epoch
from fruitray.index import Index
from fruitray.metrics import summary
from fruitray.package import Package, is_whole, read_description, read_file, save_package
from fruitray.recipe import Recipe
from fruitray.storage import Storage
from fruitray.tables import field, parquet

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
        field("seconds", pa.float64(), "of the epoch, validation included; where it was resumed, since then"),
        field("learning_rate", pa.float64(), "of the head, in the last step"),
        field("images_per_s", pa.float64(), "training examples per second, validation and pauses left out"),
        field("parts", pa.int32(), "that each step was computed in: --accumulate, or more where memory was short"),
    ]
)
"""`history.parquet`: a row per epoch."""


def history_row(epoch: Epoch) -> dict[str, Any]:
    """The row of `HISTORY`."""
    return {
        "epoch": epoch.number,
        "train_loss": epoch.train_loss,
        "val_loss": epoch.val_loss,
        **summary(epoch.counts),
        "seconds": epoch.seconds,
        "learning_rate": epoch.learning_rate,
        "images_per_s": epoch.images_per_s,
        "parts": epoch.parts,
    }


def best_row(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That of the epoch whose weights are kept."""
    return max(history, key=lambda row: (row["accuracy"], -row["val_loss"]))


def write_final(
    out: Storage,
    config: dict[str, Any],
    recipe: Recipe,
    index: Index,
    initial: Package,
    history: Sequence[dict[str, Any]],
    device: torch.device,
) -> None:
    """Evaluate the final model, which `recipe` holds on `device`, on all validation photos, and write its package into
    `out`, unless there is one by then; `config` is a `TrainConfig` as plain data."""
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
        "best_epoch": best_row(history)["epoch"],
        "metrics": evaluation.summary,
    }
    files = {
        METRICS: evaluation.to_json(),
        "history.parquet": parquet(pa.Table.from_pylist(list(history), HISTORY)),
        "predictions.parquet": parquet(predictions),
        CARD: model_card(recipe.model, model_config, facts, evaluation, out.uri).encode(),
    }
    if is_whole(out):  # by a worker that was thought lost, or another driver's: whoever was first
        return
    save_package(out, recipe.model, model_config, index.classes, facts, inference=evaluation.inference, files=files)


def _photos(index: Index) -> dict[str, dict[str, int]]:
    """How many photos of each class train, and validate."""
    counts = {split: Counter(index.rows(split)[1]) for split in ("train", "val")}
    return {split: {name: its[number] for number, name in enumerate(index.classes)} for split, its in counts.items()}


def show_final(out: Storage) -> str:
    """Show the evaluation that the package in `out` keeps; answers its model id.

    Raises:
        ModelRejectedError: there is none, or it is not the one that was written.
    """
    description, model_id = read_description(out)
    show_evaluation(Evaluation.from_json(read_file(out, description, METRICS)))
    return model_id
