"""What `tune` found: a row per trial, how they learned, what each took, and which is best."""

from collections.abc import Sequence
from typing import Any

from fruitray.report import charts
from fruitray.report.blocks import Block, Chart, Section, Table
from fruitray.report.outputs import SIGNS, Output


def trials(output: Output) -> Section:
    """The section on the trials."""
    from fruitray.trials import rank, verdict  # on use: it needs torch

    rows = sorted(output.table(SIGNS["tune"]).to_pylist(), key=rank)
    trained = [row for row in rows if row["accuracy"] is not None]
    groups = {name: [row for row in trained if _group(row) == name] for name in dict.fromkeys(map(_group, trained))}
    blocks: list[Block] = []
    if trained:
        time = {name: ([r["seconds"] for r in its], [r["accuracy"] for r in its]) for name, its in groups.items()}
        says = f"Points: seconds and validation accuracy of {len(trained)} trials, by network"
        blocks.append(
            Chart("time against accuracy", charts.scatter(time, x="seconds", y="validation accuracy", says=says))
        )
    if any(row.get("curve") for row in trained):
        learned = {name: [(row["curve"] or [], _best(row)) for row in its] for name, its in groups.items()}
        how = "a mark at the best epoch" if any(best for its in learned.values() for _, best in its) else "fold by fold"
        says = f"Lines: validation accuracy by epoch of {len(trained)} trials, {how}"
        drawn = charts.curves(learned, x="epoch", y="validation accuracy", says=says)
        blocks.append(Chart(f"learning curves, {how}", drawn))
    blocks.append(Table("trials, best first", [_shown(row) for row in rows]))
    failed = [{"trial": row["trial"], "network": _group(row), "why": row["error"]} for row in rows if row["error"]]
    if failed:
        blocks.append(Table("trials that failed", failed))
    lead = verdict(rows) if trained and not rows[0]["error"] else "No trial has ended well"
    return Section("trials", "Trials", f"{len(rows):,} trials. {lead[0].upper()}{lead[1:]}.", blocks)


def _group(row: dict[str, Any]) -> str:
    return f"{row['backbone']} ({row['part']})" if row["part"] else str(row["backbone"])


def _best(row: dict[str, Any]) -> int:
    """Of one split, the epoch whose weights were kept; of folds, whose curves follow one another, none."""
    return int(row["best_epoch"] or 0) if len(row["fold_accuracies"] or ()) == 1 else 0


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    recalls: Sequence[float] = row["recalls"] or ()
    return {
        "trial": row["trial"],
        "network": row["backbone"],
        "trained": row["part"],
        "weights": "none" if row["weights"] == "none" else "pretrained",
        "rate": row["learning_rate"],
        "batch": row["batch_size"],
        "dropout": row["dropout"],
        "augment": row["augment"],
        "accuracy": row["accuracy"],
        "from": row["accuracy_low"],
        "to": row["accuracy_high"],
        "least recall": min(recalls, default=None),
        "epochs": row["epochs"],
        "seconds": row["seconds"],
        "images/s": row["images_per_s"],
        "parameters": row["parameters"],
        "of them trained": row["trained_parameters"],
        "MiB": row["peak_memory"] and row["peak_memory"] >> 20,
    }
