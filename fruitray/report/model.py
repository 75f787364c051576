"""What `train` made: how the model learned, how right it is, how sure it should be, where it fails."""

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image

from fruitray.confusions import LARGEST_MATRIX, commonest
from fruitray.errors import FruitrayError
from fruitray.index import read_index
from fruitray.report import charts
from fruitray.report.blocks import Block, Chart, Details, Gallery, Matrix, Picture, Section, Table, Text
from fruitray.report.outputs import SIGNS, Output
from fruitray.report.thumbnails import captioned, data_uri, thumbnails

BINS = 10
"""Of the reliability diagram."""
MISTAKES = 12


def model(output: Output, index: Output | None) -> Section:
    """The section on the final model."""
    described, metrics = output.json(SIGNS["train"]), output.json("metrics.json")
    if not metrics:
        return Section("model", "Model", f"{described['model']['backbone']}, without an evaluation.")
    names = [row["label"] for row in metrics["classes"]]
    blocks: list[Block] = [*_learning(output, described["best_epoch"])]
    blocks.append(Table("by class, on the validation photos", metrics["classes"]))
    blocks += confusion_blocks(names, metrics["confusion"])
    blocks += _sureness(output, metrics)
    blocks += _mistakes(metrics["mistakes"], index)
    if sheet := _augmentation(output):
        blocks.append(sheet)
    options = {**described["model"], **described["fit"]}
    blocks.append(Details("options", "\n".join(f"{name:<16}{value}" for name, value in options.items())))
    with suppress(FruitrayError):
        blocks.append(Details("layers", output.storage.read("layers.txt").decode()))
    low, high = metrics["accuracy_interval"]
    lead = (
        f"{described['model']['backbone']}: validation accuracy {metrics['accuracy']:.4f} (95% interval {low:.4f}-"
        f"{high:.4f}) over {metrics['photos']:,} photos, macro F1 {metrics['macro_f1']:.4f}. Training "
        f"ended after epoch {described['epochs']}; the weights are those of epoch {described['best_epoch']}."
    )
    return Section("model", "Model", lead, blocks)


def _learning(output: Output, best: int) -> list[Block]:
    history = output.table("history.parquet").to_pydict()
    epochs: Sequence[float] = history["epoch"]
    losses = {"training": (epochs, history["train_loss"]), "validation": (epochs, history["val_loss"])}
    marks = {"validation": best}
    said = f"all epochs; a mark at epoch {best}, whose weights were kept"
    accuracy = {"validation": (epochs, history["accuracy"])}
    return [
        Chart("loss by epoch", charts.lines(losses, x="epoch", y="loss", says=f"Lines: loss over {said}", marks=marks)),
        Chart(
            "accuracy by epoch",
            charts.lines(
                accuracy, x="epoch", y="validation accuracy", says=f"Line: validation accuracy over {said}", marks=marks
            ),
        ),
    ]


def confusion_blocks(names: Sequence[str], counts: Sequence[Sequence[int]]) -> list[Block]:
    """The matrix, in counts and in shares; of more classes than can be read so, the commonest confusions."""
    if len(names) > LARGEST_MATRIX:
        return [Table("the commonest confusions", commonest(names, counts))]
    return [
        Matrix("confusion: true classes down, predicted across", names, counts),
        Matrix("the same as shares of each row", names, counts, normalised=True),
    ]


def _sureness(output: Output, metrics: dict[str, Any]) -> list[Block]:
    """How often the model is right where it is so and so sure."""
    table = output.table("predictions.parquet", ["confidence", "right"])
    confidences, right = table["confidence"].to_numpy(), table["right"].to_numpy()
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    filled = [number for number in range(BINS) if (bins == number).any()]
    sure = [float(confidences[bins == number].mean()) for number in filled]
    shares = [float(right[bins == number].mean()) for number in filled]
    groups = {"right": confidences[right].tolist(), "wrong": confidences[~right].tolist()}
    groups = {name: values for name, values in groups.items() if values}
    said = (
        f"Calibration error {metrics['ece']:.4f} with temperature {metrics['temperature']:.3f}, "
        f"{metrics['ece_uncalibrated']:.4f} without, on the same photos that the temperature comes from. "
        f"{metrics['coverage']:.1%} of the photos have a confidence of {metrics['threshold']:.4f} or more, the "
        f"threshold, and {metrics['accuracy_covered']:.2%} of those are right."
    )
    pairs = ", ".join(f"{a:.2f}: {b:.2f}" for a, b in zip(sure, shares, strict=True))
    return [
        Chart("reliability", charts.reliability(sure, shares, says=f"Share that is right by confidence, {pairs}")),
        Chart(
            "confidences",
            charts.histogram(
                groups,
                x="confidence",
                y="share of the right, of the wrong",
                says="Steps: confidences of right and of wrong answers",
            ),
        ),
        Text(said),
    ]


def _mistakes(mistakes: Sequence[dict[str, Any]], index: Output | None) -> list[Block]:
    if not mistakes:
        return [Text("Every validation photo was right.")]
    shown = mistakes[:MISTAKES]
    uris = [row["uri"] for row in shown]
    roots = {uri.rpartition("/")[0] for uri in uris}
    if index:
        with suppress(FruitrayError):
            roots = {read_index(index.storage.uri_of(SIGNS["prepare"])).images}
    small: dict[str, str] = {}
    for root in roots:
        small |= thumbnails(root, uris)
    pictures = [
        captioned(
            row["uri"],
            small,
            [f"filed as {row['label']}", f"taken for {row['predicted']} ({row['confidence']:.1%})"],
        )
        for row in shown
    ]
    return [Gallery("the most confident mistakes", pictures)]


def _augmentation(output: Output) -> Gallery | None:
    """What the training photos were made into."""
    with suppress(FruitrayError):
        sheet = data_uri(Image.open(io.BytesIO(output.storage.read("augment.png"))))
        policy = (output.options.get("fit") or {}).get("augment")
        alt = f"training photos, a row each: first as it is, then as the augmentation {policy} makes it"
        return Gallery(f"augmentation: {policy}", [Picture(sheet, alt)], wide=True)
    return None
