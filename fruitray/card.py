"""What a person reads of a trained model: its evaluation on the console, and its model card."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fruitray.backbones import Classifier, parameter_counts, trained_part
from fruitray.config import ModelConfig
from fruitray.confusions import confusion_table
from fruitray.console import say, show_table
from fruitray.evaluation import Evaluation

FILE = "README.md"


def show_evaluation(evaluation: Evaluation) -> None:
    """Per class, confusion, the first of the worst mistakes, calibration, threshold; the accuracy last."""
    show_table("validation photos, by class", [asdict(each) for each in evaluation.classes])
    show_table(*_confusion(evaluation))
    show_table("the most confident mistakes", [asdict(each) for each in evaluation.mistakes], at_most=5)
    for line in reversed(_sentences(evaluation)):
        say(line)


def _confusion(evaluation: Evaluation) -> tuple[str, list[dict[str, Any]]]:
    names, found = [each.label for each in evaluation.classes], [each.recall for each in evaluation.classes]
    return confusion_table(names, evaluation.confusion, found)


def _sentences(evaluation: Evaluation) -> list[str]:
    """What there is to say beside the tables, the accuracy first."""
    low, high = evaluation.accuracy_interval
    auc = "" if evaluation.macro_roc_auc is None else f", mean ROC-AUC {evaluation.macro_roc_auc:.4f}"
    said = [
        f"validation accuracy {evaluation.accuracy:.4f} (95% interval {low:.4f}-{high:.4f})",
        f"macro F1 {evaluation.macro_f1:.4f}{auc}, over {evaluation.photos:,} validation photos",
        f"calibration error {evaluation.ece_uncalibrated:.4f}, and {evaluation.ece:.4f} with temperature "
        f"{evaluation.temperature:.3f}, which was fitted to these same photos",
        f"threshold {evaluation.threshold:.4f}: {evaluation.coverage:.1%} of these photos have at least this "
        f"confidence, and {evaluation.accuracy_covered:.2%} of those are right",
    ]
    if evaluation.tta:
        without, ratio = evaluation.tta.accuracy_without, evaluation.tta.seconds_ratio
        said.append(
            f"test-time augmentation: accuracy {without:.4f} without; forward passes take {ratio:.2f} times as long"
        )
    return said


def model_card(
    model: Classifier, config: ModelConfig, facts: Mapping[str, Any], evaluation: Evaluation, uri: str
) -> str:
    """The card as Markdown: Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019), as far as a run can know.

    `facts` are those of package.json; `uri` is where the package lies.
    """
    title, confusion = _confusion(evaluation)
    parts = [
        f"# {config.backbone}: {', '.join(_cell(each.label) for each in evaluation.classes)}",
        "Tells of a photo which of these classes it shows. Written by fruitray when the model was trained; all figures "
        "are that run's, on its validation photos.",
        "## Model",
        _table(_about(model, config, facts)),
        "## Training",
        _table(_photos(facts["index"])),
        f"It ended after epoch {facts['epochs']}; the weights are those of epoch {facts['best_epoch']}, and "
        "`history.parquet` has a row for each. The photos are those of "
        f"`{facts['index']['uri']}` (SHA-256 `{facts['index']['sha256']}`). With:",
        _table([{"option": name, "value": value} for name, value in facts["fit"].items()]),
        "## Evaluation",
        "\n".join(f"- {sentence}" for sentence in _sentences(evaluation)),
        _table([asdict(each) for each in evaluation.classes]),
        f"{title[0].upper()}{title[1:]}:",
        _table(confusion) if confusion else "None.",
        "`metrics.json` has these and more figures, and the most confident mistakes; `predictions.parquet` has every "
        "validation photo with its scores.",
        "## Use",
        _use(uri),
        "## Limits",
        _limits(evaluation),
    ]
    return "\n\n".join(parts) + "\n"


def _about(model: Classifier, config: ModelConfig, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    total, trained = parameter_counts(model)
    preprocessing, origin = model.preprocessing, facts["initial_weights"]
    shown = f"the middle {preprocessing.crop:g} of the shorter side" if preprocessing.crop else "the whole photo"
    return [
        {"": "network", "what": f"{config.backbone}, {total:,} parameters"},
        {
            "": "initial weights",
            "what": f"{origin['source']}" + (f", SHA-256 {origin['sha256']}" if origin["sha256"] else ""),
        },
        {"": "trained", "what": f"{trained_part(model)}, {trained:,} parameters"},
        {"": "sees", "what": f"{shown}, as {preprocessing.size} x {preprocessing.size} pixels"},
    ]


def _photos(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"class": name, "training photos": count, "validation photos": index["val"][name]}
        for name, count in index["train"].items()
    ]


def _use(uri: str) -> str:
    place = shlex.quote(uri)
    return f"""In Python, of files' bytes:

    import fruitray as fr
    predictions = fr.load({uri!r}).predict([open("photo.jpg", "rb").read()])

Of every photo below a place:

    fruitray score --package {place} --images PHOTOS --out SCORES"""


def _limits(evaluation: Evaluation) -> str:
    return f"""- It was made to tell these classes apart in photos like those it was trained on. It answers with one
  of them whatever a photo shows.
- A confidence below {evaluation.threshold:.4f} (`threshold` in `package.json`) is a reason to look: at most
  {1 - evaluation.coverage_asked:.1%} of the validation photos have one. How many photos of other things it would catch
  was not measured: the validation photos show none.
- The {evaluation.photos:,} validation photos chose the epoch, the temperature and the threshold, and perhaps, through a
  search, the settings. On new photos expect somewhat less."""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as a Markdown table: a column per key of the first one."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    said = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(re.sub(r"([\\`*_~\[\]<&|])", r"\\\1", said).split())
