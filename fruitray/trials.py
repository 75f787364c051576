"""What a search found: a row per trial, the best one, and whether it can be told from the next."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fruitray.console import say, show_table
from fruitray.metrics import distinguishable
from fruitray.tables import field

SCHEMA = pa.schema(
    [
        field("trial", pa.int32(), "number, in the order of the search"),
        field("axis", pa.string(), "what a sweep varied in it"),
        field("backbone", pa.string(), "the network"),
        field("part", pa.string(), "what of it was trained: whole network, last two layers, last layer"),
        field("frozen", pa.bool_(), "whether only its head was trained"),
        field("weights", pa.string(), "where they came from; none: random"),
        field("optimizer", pa.string(), "adamw, adam or sgd"),
        field("learning_rate", pa.float64(), "at its peak"),
        field("batch_size", pa.int32(), "photos per step"),
        field("dropout", pa.float64(), "in the head; null: the backbone's own"),
        field("augment", pa.string(), "the augmentation policy"),
        field("accuracy", pa.float64(), "share of the validation photos that was right, in the best epoch"),
        field("accuracy_low", pa.float64(), "95% Wilson interval of the accuracy"),
        field("accuracy_high", pa.float64(), "95% Wilson interval of the accuracy"),
        field("fold_accuracies", pa.list_(pa.float64()), "of each fold of a cross-validation, else one"),
        field("recalls", pa.list_(pa.float64()), "per class, in the order of their names"),
        field("right", pa.list_(pa.bool_()), "whether each validation photo was, in the same order in every row"),
        field("groups", pa.list_(pa.int32()), "of `right`: one number for duplicates, which the verdict counts once"),
        field("curve", pa.list_(pa.float64()), "validation accuracy after each epoch, fold by fold"),
        field("best_epoch", pa.int32(), "of the last fold, from 1"),
        field("epochs", pa.int32(), "trained, over all folds"),
        field("seconds", pa.float64(), "of the trial, its loading included; what a lost worker had done since is not"),
        field("images_per_s", pa.float64(), "training examples, in the last epoch"),
        field("parameters", pa.int64(), "of the whole network"),
        field("trained_parameters", pa.int64(), "of the part that was trained"),
        field("peak_memory", pa.int64(), "bytes: of the GPU where there is one, else of the process"),
        field("parts", pa.int32(), "that each step was computed in: --accumulate, or more where memory was short"),
        field("initial_state_hash", pa.string(), "SHA-256 of the tensors that the trial started from"),
        field("error", pa.string(), "why it failed"),
    ]
)
LISTED = 6
"""Classes whose recall a screen shows one by one."""
CLEAR = 0.05
"""Below this p-value two trials are told apart."""


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """The rows as `SCHEMA`."""
    return pa.Table.from_pylist(list(rows), SCHEMA)


def rank(row: dict[str, Any]) -> tuple[bool, float, int]:
    """Sorts the best first; failed trials last, whatever they had reached: training would fail in the same way."""
    return row["error"] is not None, -(row["accuracy"] or 0.0), row["trial"]


def pack(right: torch.Tensor) -> str:
    """(N,) bool as hex, a bit for each; see `unpack`."""
    return np.packbits(right.numpy()).tobytes().hex()


def unpack(packed: str, count: int) -> list[bool]:
    """The `count` truths that `pack` packed."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=count)
    found: list[bool] = bits.astype(bool).tolist()
    return found


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Which of the ranked `rows` is best, and whether the photos tell it from the runner-up."""
    best, *others = [row for row in rows if not row["error"]]
    said = f"best: trial {best['trial']}, {_name(best)}, validation accuracy {best['accuracy']:.4f}"
    if not others:
        return f"{said}; there is no other to compare it with"
    second = others[0]
    first_right, second_right = torch.tensor(best["right"]), torch.tensor(second["right"])
    groups = torch.tensor(best.get("groups") or range(len(first_right)))
    chance = distinguishable(first_right, second_right, groups)
    wins, losses = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    told = "distinguishable" if chance < CLEAR else "not distinguishable"
    told += f": of {len(first_right):,} photos {wins} only by the first, {losses} only by the second, p = {chance:.2g}"
    told += ", duplicates counted once" if len(torch.unique(groups)) < len(groups) else ""
    return f"{said}; the runner-up, trial {second['trial']}, {_name(second)}, {second['accuracy']:.4f}, is {told}"


def _name(row: dict[str, Any]) -> str:
    return f"{row['backbone']} ({row['part']})"


def show_trials(rows: Sequence[dict[str, Any]]) -> None:
    """A table of trials (rows of `SCHEMA`), in the order given."""
    show_table("trials, best first", [_shown(row) for row in rows])
    for row in rows:
        if row["error"]:
            say(f"trial {row['trial']} failed: {row['error']}")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """What a screen shows of a trial, what counts most first: a narrow one leaves out the last."""
    had = row["accuracy"] is not None
    return {
        "trial": row["trial"],
        "backbone": row["backbone"],
        "part": row["part"],
        "accuracy": row["accuracy"],
        "95% interval": f"{row['accuracy_low']:.3f}-{row['accuracy_high']:.3f}" if had else "",
        "rate": row["learning_rate"],
        "batch": f"{row['batch_size']} in {row['parts']} parts" if (row["parts"] or 1) > 1 else row["batch_size"],
        "dropout": row["dropout"],
        "recalls": _recalls(row["recalls"] or ()),
        "best epoch": _best_epoch(row) if had else "",
        "seconds": row["seconds"],
        "images/s": row["images_per_s"],
        "trained of all": f"{row['trained_parameters']:,} of {row['parameters']:,}" if had else "",
        "MiB": row["peak_memory"] and row["peak_memory"] >> 20,
        "start": (row["initial_state_hash"] or "")[:6],
    }


def _recalls(recalls: Sequence[float]) -> str:
    """Each class's, or where they are many the range, as other columns want room, too."""
    if len(recalls) > LISTED:
        return f"{min(recalls):.2f} to {max(recalls):.2f}"
    return " ".join(f"{recall:.2f}" for recall in recalls)


def _best_epoch(row: dict[str, Any]) -> str:
    folds = len(row["fold_accuracies"])
    return f"{row['best_epoch']} of {row['epochs']}" if folds == 1 else f"{row['epochs']} in {folds} folds"


def show_sweeps(rows: Sequence[dict[str, Any]], epochs: int) -> None:
    """The report's tables: a sweep each, its base first."""
    rows = sorted(rows, key=lambda row: row["trial"])
    for axis in dict.fromkeys(row["axis"] for row in rows if row["axis"]):
        swept = [row for row in rows if row["axis"] in ("", axis)]
        show_table(f"{axis}, up to epoch {epochs} each", [_reported(row) for row in swept])


def _reported(row: dict[str, Any]) -> dict[str, Any]:
    had = row["accuracy"] is not None
    return {
        "model": row["backbone"],
        "trained": row["part"],
        "weights": "none" if row["weights"] == "none" else "pretrained",
        "batch size": row["batch_size"],
        "learning rate": row["learning_rate"],
        "dropout": row["dropout"],
        "epochs": row["epochs"],
        "minutes": row["seconds"] / 60 if had else None,
        "accuracy, %": f"{100 * row['accuracy']:.2f}" if had else "",
        "parameters": row["parameters"],
    }


def announce(rows: Sequence[dict[str, Any]], classes: Sequence[str]) -> None:
    """Say the verdict and the best trial's recall of each class."""
    say(verdict(rows))
    found = ", ".join(f"{name} {share:.3f}" for name, share in zip(classes, rows[0]["recalls"], strict=True))
    say(f"its recall: {found}")
