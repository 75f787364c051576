"""What `score` wrote: how many rows of which kind, how sure, how fast, what failed, and how unlike the training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fruitray.commit import Part, is_finished, read_manifest, read_plan
from fruitray.errors import FruitrayError
from fruitray.report import charts
from fruitray.report.blocks import Block, Chart, Section, Table, Text
from fruitray.report.model import confusion_blocks
from fruitray.report.outputs import SIGNS, Output

PARTS = 64
"""Parts that confidences are taken from, where there are more: spread evenly over all."""
PART_ROWS = 4096
"""Rows of each, from its start."""
EXAMPLES = 3
"""Rows shown of each error code."""
ROWS = 30
_READ = ["uri", "label", "confidence", "status", "error_code", "error"]


def scoring(output: Output, model: Output | None) -> Section:
    """The section on the scores."""
    plan = read_plan(output.storage)
    if not is_finished(output.storage):
        return Section("scores", "Scores", f"Not finished: {plan.rows:,} photos in {plan.shards:,} shards are planned.")
    parts = read_manifest(output.storage)
    labels, errors = _counts(part.labels for part in parts), _counts(part.errors for part in parts)
    rows = sum(part.rows for part in parts)
    sample = _sample(output, parts)
    by_status = _by_status(labels, errors, rows)
    commonest = f", the {ROWS} commonest" if len(labels) > ROWS else ""
    blocks: list[Block] = [
        Chart(f"rows by label{commonest}", _by_label(labels)),
        Table("rows by status", by_status[: 2 * ROWS], len(by_status)),
    ]
    confidences = sample["confidence"].drop_null().to_pylist()
    if confidences:
        said = f"Steps: confidences of {len(confidences):,} rows"
        drawn = charts.histogram({"rows": confidences}, x="confidence", y="share of the rows", says=said)
        blocks.append(Chart("confidences", drawn))
    blocks += _right(output.json("metrics.json"))
    blocks += _drift(labels, sample, model, plan.settings["model_id"])
    if errors:
        blocks.append(Table("examples of errors", _examples(sample)))
    blocks.append(Table("how the last command went", _speed(output, plan.settings, parts)))
    if sample.num_rows < rows:
        of = f"{min(PARTS, len(parts))} of {len(parts):,} parts"
        blocks.append(Text(f"Confidences and examples are those of {sample.num_rows:,} rows, {of}."))
    lead = f"{rows:,} rows, one for each planned photo; {sum(errors.values()):,} of them are errors with a code."
    return Section("scores", "Scores", lead, blocks)


def _counts(parts: Any) -> Counter[str]:
    total = Counter[str]()
    for part in parts:
        total.update(part)
    return total


def _sample(output: Output, parts: Sequence[Part]) -> pa.Table:
    count = min(PARTS, len(parts))
    chosen = [parts[place * len(parts) // count] for place in range(count)]
    return pa.concat_tables(output.table(part.key, _READ).slice(0, PART_ROWS) for part in chosen)


def _by_label(labels: Counter[str]) -> Any:
    shown = {name: {"rows": count} for name, count in labels.most_common(ROWS)}
    said = ", ".join(f"{name} {row['rows']:,}" for name, row in shown.items())
    return charts.stacked(shown or {"none": {"rows": 0}}, x="rows", says=f"Bars of rows by label: {said}")


def _by_status(labels: Counter[str], errors: Counter[str], rows: int) -> list[dict[str, Any]]:
    counts = [("error", code, count) for code, count in errors.most_common()]
    counts += [("ok", name, count) for name, count in labels.most_common()]
    return [
        {"status": status, "label or code": name, "rows": count, "share": count / max(1, rows)}
        for status, name, count in counts
    ]


def _right(metrics: Any) -> list[Block]:
    """How right the rows are, where the photos were labelled."""
    if not metrics:
        return []
    said = (
        f"{metrics['photos']:,} photos lie in folders with a class's name, or are labelled in a list: accuracy "
        f"{metrics['accuracy']:.4f} (95% interval {metrics['accuracy_low']:.4f}-{metrics['accuracy_high']:.4f})."
    )
    return [Text(said), *confusion_blocks(metrics["classes"], metrics["confusion"])]


def _drift(labels: Counter[str], sample: pa.Table, model: Output | None, model_id: str) -> list[Block]:
    """Shares of the classes, and confidences, beside those of training and validation."""
    described = model.json(SIGNS["train"]) if model else {}
    if model is None or "index" not in described or not sample["confidence"].drop_null():
        return []
    if model.sha256 != model_id:
        return []  # it was trained anew since
    trained = described["index"]["train"]
    try:
        validated = model.table("predictions.parquet")
    except FruitrayError:
        return []
    rows = [
        {
            "class": name,
            "share of the training photos": count / max(1, sum(trained.values())),
            "share of the rows": labels.get(name, 0) / max(1, sum(labels.values())),
            "mean confidence, validation": _mean(validated, "predicted", name),
            "mean confidence, rows": _mean(sample, "label", name),
        }
        for name, count in trained.items()
    ]
    apart = sum(abs(row["share of the training photos"] - row["share of the rows"]) for row in rows) / 2
    before, now = (pc.mean(table["confidence"]).as_py() for table in (validated, sample))
    said = (
        f"Against the training: {apart:.1%} of the rows would have to change their label for the classes to be as "
        f"common as there. The mean confidence is {now:.4f}; on the validation photos it was {before:.4f}."
    )
    return [Table("drift, by predicted class", rows[:ROWS], len(rows)), Text(said)]


def _mean(table: pa.Table, column: str, name: str) -> float | None:
    mean: float | None = pc.mean(table.filter(pc.equal(table[column], name))["confidence"]).as_py()
    return mean


def _examples(sample: pa.Table) -> list[dict[str, Any]]:
    rows = sample.filter(pc.equal(sample["status"], "error")).select(["error_code", "uri", "error"]).to_pylist()
    seen = Counter[str]()
    found = []
    for row in rows:
        seen[row["error_code"]] += 1
        if seen[row["error_code"]] <= EXAMPLES:
            found.append(row)
    return found


def _speed(output: Output, settings: Mapping[str, Any], parts: Sequence[Part]) -> list[dict[str, Any]]:
    run: Mapping[str, Any] = output.status.get("run", {})
    said = {"engine": settings.get("engine"), "model": settings["model_id"][:12], "files": len(parts), **run}
    return [{"what": name, "value": value} for name, value in said.items()]
