"""The final model on the validation photos: logits and labels -> what is known of it, and a row per photo.

scikit-learn measures what it can; calibration, which it has only for two classes, and the threshold are done here.
Everything is told of the calibrated scores that the predictor gives, see `inference.py`.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar
from torch import nn

from fruitray.batches import Batches
from fruitray.index import Index
from fruitray.inference import TEMPERATURES, UNCALIBRATED, Inference
from fruitray.memory import in_halves
from fruitray.metrics import accuracy, confusion, wilson_interval
from fruitray.recipe import Recipe, validation_photos
from fruitray.tables import field

FILE = "metrics.json"

BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""
MISTAKES = 20
"""The worst ones that are listed."""

PREDICTIONS = pa.schema(
    column.with_nullable(False)
    for column in [
        field("uri", pa.string(), "the photo"),
        field("label", pa.string(), "the class it is filed under"),
        field("predicted", pa.string(), "the class with the greatest score"),
        field("confidence", pa.float32(), "its score, calibrated on these same photos"),
        field("right", pa.bool_(), "whether predicted is label"),
        field("scores", pa.list_(pa.float32()), "of each class, in the order of their names; together 1"),
    ]
)
"""`predictions.parquet`: a row per validation photo, in the order of the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMetrics:
    """One class against all others. What nothing was predicted to be, or no photo shows, counts as 0."""

    label: str
    photos: int
    precision: float
    recall: float
    f1: float
    roc_auc: float | None
    """None where no validation photo, or every one, is of this class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A photo that the model files elsewhere: the model is wrong, or the label is."""

    uri: str
    label: str
    predicted: str
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TtaMetrics:
    """What the mirror images of test-time augmentation bring, and cost."""

    accuracy_without: float
    seconds_ratio: float
    """Seconds of the forward passes over the validation photos, with it to without it, as measured in the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What is known of a model from the validation photos, the same that chose its best epoch; `metrics.json`."""

    photos: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95%, Wilson's."""
    macro_f1: float
    """Mean over the classes."""
    macro_roc_auc: float | None
    """Mean over the classes that have one."""
    classes: tuple[ClassMetrics, ...]
    """In the order of their names."""
    confusion: list[list[int]]
    """Counts: true classes down, predicted across."""
    confusion_shares: list[list[float]]
    """The same as shares of each row; zeros where a class has no photo."""
    temperature: float
    ece_uncalibrated: float
    """Expected calibration error of the model's own confidences."""
    ece: float
    """After temperature scaling. The temperature was fitted to these same photos: one number, so it flatters little,
    but it does."""
    coverage_asked: float
    threshold: float
    """The calibrated confidence that so large a share of the photos reaches."""
    coverage: float
    """The share that does reach it; greater than asked where confidences are equal."""
    accuracy_covered: float
    """Of those that do."""
    tta: TtaMetrics | None
    mistakes: tuple[Mistake, ...]
    """The most confident first."""

    @property
    def inference(self) -> Inference:
        """What the predictor needs of it."""
        return Inference(tta=self.tta is not None, temperature=self.temperature, threshold=self.threshold)

    @property
    def summary(self) -> dict[str, Any]:
        """What `package.json` tells of it."""
        names = ("photos", "accuracy", "accuracy_interval", "macro_f1", "macro_roc_auc", "ece")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> bytes:
        """`metrics.json`."""
        return json.dumps(asdict(self), indent=2).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """What `to_json` wrote."""
        said: dict[str, Any] = json.loads(data)
        said["classes"] = tuple(ClassMetrics(**row) for row in said["classes"])
        said["mistakes"] = tuple(Mistake(**row) for row in said["mistakes"])
        said["accuracy_interval"] = tuple(said["accuracy_interval"])
        return cls(**said | {"tta": TtaMetrics(**said["tta"]) if said["tta"] else None})


def evaluate_recipe(
    recipe: Recipe, index: Index, *, tta: bool, coverage: float, device: torch.device
) -> tuple[Evaluation, pa.Table]:
    """Evaluate the model of `recipe`, on `device`, on all validation photos of `index`; the table is `PREDICTIONS`.

    Embeddings that are there are used, but cannot be mirrored: with `tta` the photos are decoded and the whole model
    runs.
    """
    val, mirrored = replace(recipe.val, rank=0, world=1), None
    if tta:
        photos = val if recipe.module is recipe.model else validation_photos(index, recipe.model, device)
        logits, mirrored = _mirrored_logits(recipe.model, photos, device)
    else:
        logits, _ = compute_logits(recipe.module, val, device, UNCALIBRATED)
    uris = [f"{index.images}/{entry.key}" for entry in index.rows("val")[0]]
    return evaluate_logits(logits, val.labels[val.rows], index.classes, uris, coverage=coverage, tta=mirrored)


def compute_logits(
    module: nn.Module, batches: Batches, device: torch.device, inference: Inference
) -> tuple[torch.Tensor, float]:
    """(M, C) float32 logits of all examples, in order, and the seconds that the forward passes took."""
    module.eval()
    logits, seconds = torch.empty(batches.examples, batches.classes), 0.0
    with torch.inference_mode():
        for batch in batches.epoch(0):
            inputs = batch.inputs.to(device)
            start = time.perf_counter()
            logits[batch.examples] = inference.logits(partial(in_halves, module, join=torch.cat), inputs).cpu()
            seconds += time.perf_counter() - start
    return logits, seconds


def _mirrored_logits(module: nn.Module, photos: Batches, device: torch.device) -> tuple[torch.Tensor, TtaMetrics]:
    """As `compute_logits`, with mirror images; and what they bring and cost.

    A first batch is not timed: it has memory to get.
    """
    compute_logits(module, replace(photos, rows=photos.rows[: photos.batch_size]), device, UNCALIBRATED)
    plain, seconds = compute_logits(module, photos, device, UNCALIBRATED)
    logits, longer = compute_logits(module, photos, device, Inference(tta=True))
    right = plain.argmax(dim=1) == photos.labels[photos.rows]
    return logits, TtaMetrics(accuracy_without=right.double().mean().item(), seconds_ratio=longer / seconds)


def evaluate_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    uris: Sequence[str],
    *,
    coverage: float,
    tta: TtaMetrics | None = None,
) -> tuple[Evaluation, pa.Table]:
    """Evaluate (M, C) float32 logits against (M,) int64 labels, the numbers of `classes`; the table is `PREDICTIONS`.

    `tta` is handed on: what is known of the mirror images that the logits were averaged over.
    """
    temperature = fit_temperature(logits, labels)
    scores = Inference(temperature=temperature).scores(logits)
    confidences, predicted = scores.max(dim=1)
    counts, right = confusion(predicted, labels, len(classes)), predicted == labels
    threshold = coverage_threshold(confidences, coverage)
    covered = confidences >= threshold
    table = _predictions(scores, labels, classes, uris)
    per_class = class_metrics(scores, labels, classes)
    evaluation = Evaluation(
        photos=len(labels),
        accuracy=accuracy(counts),
        accuracy_interval=wilson_interval(counts),
        macro_f1=sum(each.f1 for each in per_class) / len(per_class),
        macro_roc_auc=_mean([each.roc_auc for each in per_class if each.roc_auc is not None]),
        classes=per_class,
        confusion=counts.tolist(),
        confusion_shares=(counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).tolist(),
        temperature=temperature,
        ece_uncalibrated=calibration_error(UNCALIBRATED.scores(logits).amax(dim=1), right),
        ece=calibration_error(confidences, right),
        coverage_asked=coverage,
        threshold=threshold,
        coverage=covered.double().mean().item(),
        accuracy_covered=right[covered].double().mean().item(),
        tta=tta,
        mistakes=_worst_mistakes(table),
    )
    return evaluation, table


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """What to divide (M, C) logits by so that their softmax fits the (M,) labels best, by mean negative log-likelihood
    (Guo et al. 2017); within `TEMPERATURES`.

    Where every photo is right the best fit would be boundless: there the mean confidence becomes what the accuracy
    would be, had one more photo been seen, and that one wrong.
    """
    precise, (low, high) = logits.double(), map(math.log, TEMPERATURES)

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(precise / math.exp(log_temperature), labels).item()

    def excess(log_temperature: float) -> float:
        confidences = (precise / math.exp(log_temperature)).softmax(dim=1).amax(dim=1)
        return confidences.mean().item() - len(labels) / (len(labels) + 1)

    if (logits.argmax(dim=1) != labels).any():  # the loss is convex in 1 / temperature, so there is one valley
        best = minimize_scalar(loss, bounds=(low, high), method="bounded").x
    elif excess(low) > 0 > excess(high):  # which falls all the way
        best = brentq(excess, low, high)
    else:
        best = high if excess(high) >= 0 else low
    return min(TEMPERATURES[1], max(TEMPERATURES[0], math.exp(best)))


def calibration_error(confidences: torch.Tensor, right: torch.Tensor) -> float:
    """Expected calibration error of (M,) confidences, given (M,) bool: the mean gap between confidence and accuracy
    over `BINS` bins of equal width, (0, 1/15], (1/15, 2/15], ... (Guo et al. 2017)."""
    bins = ((confidences * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, right.double() - confidences.double())
    return gaps.abs().sum().item() / max(1, len(right))


def coverage_threshold(confidences: torch.Tensor, coverage: float) -> float:
    """The greatest number that a share `coverage` at least of the (M,) confidences reaches."""
    kept = max(1, math.ceil(round(coverage * len(confidences), 6)))  # 0.55 * 100 is a little more than 55
    return float(confidences.sort(descending=True).values[kept - 1])


def class_metrics(scores: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> tuple[ClassMetrics, ...]:
    """(M, C) scores and (M,) labels -> each class against the others."""
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(
        labels.numpy(), scores.argmax(dim=1).numpy(), labels=range(len(classes)), zero_division=0
    )
    return tuple(
        ClassMetrics(
            label=label,
            photos=int(photos),
            precision=float(precision),
            recall=float(recall),
            f1=float(f1),
            roc_auc=_roc_auc(scores[:, number], labels == number),
        )
        for number, (label, precision, recall, f1, photos) in enumerate(zip(classes, *found, strict=True))
    )


def _roc_auc(scores: torch.Tensor, true: torch.Tensor) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(true.numpy(), scores.numpy())) if true.any() and not true.all() else None


def _predictions(scores: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], uris: Sequence[str]) -> pa.Table:
    confidences, predicted = scores.max(dim=1)
    columns = {
        "uri": list(uris),
        "label": [classes[number] for number in labels.tolist()],
        "predicted": [classes[number] for number in predicted.tolist()],
        "confidence": confidences.tolist(),
        "right": (predicted == labels).tolist(),
        "scores": list(scores.numpy()),
    }
    return pa.Table.from_pydict(columns, PREDICTIONS)


def _worst_mistakes(table: pa.Table) -> tuple[Mistake, ...]:
    wrong = table.filter(pc.invert(table["right"])).select(["uri", "label", "predicted", "confidence"])
    return tuple(Mistake(**row) for row in wrong.sort_by([("confidence", "descending")])[:MISTAKES].to_pylist())
