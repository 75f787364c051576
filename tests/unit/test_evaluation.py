"""Behaviour of the evaluation, of its calibration, and of the model card that tells it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn import metrics as reference

import fruitray
from fruitray.backbones import Classifier, freeze
from fruitray.batches import CPU
from fruitray.card import model_card, show_evaluation
from fruitray.config import FitConfig, TrainConfig
from fruitray.confusions import confusion_table
from fruitray.evaluation import (
    Evaluation,
    calibration_error,
    coverage_threshold,
    evaluate_logits,
    evaluate_recipe,
    fit_temperature,
)
from fruitray.final import HISTORY, write_final
from fruitray.images import decode
from fruitray.index import Index, read_index
from fruitray.inference import Inference
from fruitray.package import Package, load_package, save_package
from fruitray.recipe import make_recipe
from fruitray.storage import LocalStorage, open_storage
from fruitray.synthetic import LABELS
from fruitray.tables import parquet
from tests.unit.runs import CONFIG, VAL, keep_features, network, write_photos_and_index

NAMES = ("cherry", "plum", "strawberry", "tomato")


def calibrated(examples: int = 4000, classes: int = 4, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, C) logits and (M,) labels that are drawn with the logits' own probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(examples, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def evaluated(
    logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str] = NAMES, coverage: float = 0.95
) -> tuple[Evaluation, pa.Table]:
    uris = [f"photos/{number}.jpg" for number in range(len(labels))]
    return evaluate_logits(logits, labels, names, uris, coverage=coverage)


def test_the_temperature_undoes_what_was_multiplied() -> None:
    logits, labels = calibrated()
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.05)
    for factor in (3, 0.2):
        assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)


def test_scaling_by_the_temperature_mends_confidence_and_leaves_the_labels() -> None:
    logits, labels = calibrated()
    honest, boastful = evaluated(logits, labels)[0], evaluated(4 * logits, labels)[0]
    assert honest.ece_uncalibrated < 0.03
    assert boastful.ece_uncalibrated > 0.1
    assert boastful.ece == pytest.approx(honest.ece, abs=0.01)
    assert boastful.confusion == honest.confusion
    assert boastful.threshold == pytest.approx(honest.threshold, abs=0.01)


@pytest.mark.parametrize("factor", [2, 10])
def test_where_every_photo_is_right_confidences_are_high_but_not_boundless(factor: float) -> None:
    logits = factor * calibrated(400)[0]
    found, _ = evaluated(logits, logits.argmax(dim=1))
    assert found.ece == pytest.approx(1 / 401, rel=0.1)


@pytest.mark.parametrize("margin", [6, 15, 30, 100])
@pytest.mark.parametrize("classes", [2, 200])
def test_so_they_are_however_far_apart_the_logits_are(classes: int, margin: float) -> None:
    labels = torch.arange(400) % classes
    logits = 0.7 * torch.randn(400, classes, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(400), labels] += margin
    confidences = Inference(temperature=fit_temperature(logits, labels)).scores(logits).amax(dim=1)
    assert confidences.mean().item() == pytest.approx(400 / 401, abs=1e-4)


def test_a_hopeless_model_gets_a_temperature_all_the_same() -> None:
    logits, _ = calibrated(50)
    Inference(temperature=fit_temperature(logits, logits.argmin(dim=1)))


def test_the_calibration_error_is_the_gap_of_each_bin_by_its_share() -> None:
    confidences = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.61, 0.61])
    right = torch.tensor([True, True, True, False, True, True])
    assert calibration_error(confidences, right) == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.39)
    assert calibration_error(torch.ones(9), torch.ones(9, dtype=torch.bool)) == 0
    assert calibration_error(torch.tensor([0.0]), torch.tensor([True])) == 1


def test_the_figures_are_those_of_scikit_learn() -> None:
    logits, labels = calibrated(500)
    found, table = evaluated(logits, labels)
    predicted, scores = logits.argmax(dim=1), torch.tensor(table["scores"].to_pylist())
    assert found.accuracy == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found.accuracy_interval[0] < found.accuracy < found.accuracy_interval[1]
    assert found.macro_f1 == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert found.macro_roc_auc == pytest.approx(reference.roc_auc_score(labels, scores, multi_class="ovr"), abs=1e-6)
    assert found.confusion == reference.confusion_matrix(labels, predicted).tolist()
    shares = reference.confusion_matrix(labels, predicted, normalize="true")
    assert torch.allclose(torch.tensor(found.confusion_shares), torch.tensor(shares, dtype=torch.float32))
    assert [each.label for each in found.classes] == list(NAMES)
    assert sum(each.photos for each in found.classes) == found.photos == 500


def test_a_class_without_photos_has_no_auc_and_breaks_nothing() -> None:
    logits, labels = calibrated(200)
    some = labels != 2
    found, _ = evaluated(logits[some], labels[some])
    absent = found.classes[2]
    assert (absent.label, absent.photos, absent.recall, absent.roc_auc) == ("strawberry", 0, 0, None)
    assert found.confusion_shares[2] == [0, 0, 0, 0]
    others = [each.roc_auc for each in found.classes if each.roc_auc is not None]
    assert found.macro_roc_auc == pytest.approx(sum(others) / 3)


def test_one_photo_is_enough() -> None:
    found, table = evaluated(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([1]))
    assert (found.accuracy, found.macro_roc_auc, found.coverage, len(table)) == (0, None, 1, 1)
    assert Evaluation.from_json(found.to_json()) == found


@pytest.mark.parametrize("coverage", [0.01, 0.5, 0.55, 0.95, 1.0])
def test_the_threshold_lets_as_many_photos_pass_as_asked(coverage: float) -> None:
    found, table = evaluated(*calibrated(100), coverage=coverage)
    passed = [row for row in table.to_pylist() if row["confidence"] >= found.threshold]
    assert len(passed) == round(100 * coverage)
    assert found.coverage == pytest.approx(coverage)
    assert found.accuracy_covered == pytest.approx(sum(row["right"] for row in passed) / len(passed))


def test_equal_confidences_pass_together() -> None:
    assert coverage_threshold(torch.tensor([0.5, 0.5, 0.5, 0.9]), 0.5) == 0.5


def test_the_mistakes_are_the_most_confident_wrong_ones() -> None:
    found, table = evaluated(*calibrated(300))
    wrong = [row for row in table.to_pylist() if not row["right"]]
    assert all(row["label"] != row["predicted"] for row in wrong)
    assert [each.confidence for each in found.mistakes] == sorted((row["confidence"] for row in wrong), reverse=True)[
        :20
    ]
    assert {each.uri for each in found.mistakes} <= {row["uri"] for row in wrong}
    assert evaluated(logits := calibrated(9)[0], logits.argmax(dim=1))[0].mistakes == ()


def test_predictions_have_a_row_per_photo_in_order(tmp_path: Path) -> None:
    logits, labels = calibrated(30)
    found, table = evaluated(logits, labels)
    (tmp_path / "predictions.parquet").write_bytes(parquet(table))
    read = pq.read_table(tmp_path / "predictions.parquet")
    rows = read.to_pylist()
    assert [row["uri"] for row in rows] == [f"photos/{number}.jpg" for number in range(30)]
    assert [row["label"] for row in rows] == [NAMES[number] for number in labels.tolist()]
    for row, scores in zip(rows, (logits / found.temperature).softmax(dim=1).tolist(), strict=True):
        assert row["scores"] == pytest.approx(scores)
        assert row["confidence"] == max(row["scores"])
        assert row["predicted"] == NAMES[row["scores"].index(row["confidence"])]
    assert all(read.schema.field(name).metadata[b"description"] for name in read.column_names)


def test_an_evaluation_survives_json() -> None:
    found, _ = evaluated(*calibrated(100))
    assert Evaluation.from_json(found.to_json()) == found
    assert "NaN" not in found.to_json().decode()


@pytest.fixture
def index_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FRUITRAY_CACHE", str(tmp_path / "cache"))
    return write_photos_and_index(tmp_path)


FACTS = {
    "initial_weights": {"source": "none", "sha256": None},
    "index": {"uri": "runs/index", "sha256": "0" * 64, "train": {"cherry": 4}, "val": {"cherry": 2}},
    "fit": {"epochs": 3, "augment": "mirror+jitter"},
    "epochs": 3,
    "best_epoch": 2,
}


def as_it_says(index: Index, model: Classifier) -> Index:
    """`index` with each validation photo in the class that `model` says, but one: so some temperature is best."""
    rows = index.table.to_pylist()
    held_out = [row for row in rows if row["split"] == "val"]
    for row in held_out:
        photo = model.preprocessing.resize(decode(Path(row["uri"]).read_bytes()).pixels)
        with torch.inference_mode():
            row["label"] = LABELS[model.eval()(photo[None]).argmax()]
    held_out[0]["label"] = next(label for label in LABELS if label != held_out[0]["label"])
    return replace(index, table=pa.Table.from_pylist(rows, index.table.schema))


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["photos", "embeddings"])
def test_the_predictor_says_what_was_evaluated(index_uri: str, tmp_path: Path, frozen: bool, tta: bool) -> None:
    """Whatever the recipe trained on; and one of several workers evaluates everything."""
    model = network(CONFIG)
    index = as_it_says(read_index(index_uri), model)
    if frozen:
        freeze(model)
        keep_features(index_uri, model)
    settings = FitConfig(batch_size=4, augment="none", learning_rate=0.1)
    recipe = make_recipe(index_uri, index, model, settings, frozen=frozen, rank=1, world=2)
    found, table = evaluate_recipe(recipe, index, tta=tta, coverage=0.9, device=CPU)
    save_package(LocalStorage(str(tmp_path / "m")), model, CONFIG, index.classes, {}, inference=found.inference)
    rows, photos = table.to_pylist(), open_storage(index.images)
    assert [row["uri"] for row in rows] == [photos.uri_of(entry.key) for entry in index.rows("val")[0]]
    assert len(rows) == found.photos == VAL
    assert max(row["confidence"] for row in rows) > min(row["confidence"] for row in rows) + 0.1, "or nothing is shown"
    assert abs(found.temperature - 1) > 0.1, "or nothing is shown"
    predictions = fruitray.load(str(tmp_path / "m")).predict([Path(row["uri"]).read_bytes() for row in rows])
    for row, said in zip(rows, predictions, strict=True):
        assert said.confidence == pytest.approx(row["confidence"], abs=0.02), "bfloat16 depends on the batch"
        assert said.top_scores == pytest.approx(sorted(row["scores"], reverse=True), abs=0.02)
    assert found.inference.tta == tta
    if found.tta:
        assert found.tta.seconds_ratio > 0


def test_mirror_images_are_averaged() -> None:
    """So a photo and its mirror image have one answer, which neither has without."""
    model, photos = network(CONFIG), torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        both = [Inference(tta=True).logits(model, batch) for batch in (photos, photos.flip(3))]
        alone = [model(batch) for batch in (photos, photos.flip(3))]
    torch.testing.assert_close(both[0], both[1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(both[0], (alone[0] + alone[1]) / 2, rtol=0.02, atol=0.02)


def test_the_card_and_the_console_tell_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = evaluated(*calibrated(100))
    card = model_card(network(CONFIG), CONFIG, FACTS, found, "s3://fruit/it's mine")
    show_evaluation(found)
    printed = capsys.readouterr().out
    for text in (card, printed):
        for number in (found.accuracy, found.ece, found.threshold, found.macro_f1):
            assert f"{number:.4f}" in text
        assert all(name in text for name in NAMES)
    assert printed.strip().splitlines()[-1].startswith(f"validation accuracy {found.accuracy:.4f}")
    assert "mirror+jitter" in card
    assert 'fr.load("s3://fruit/it\'s mine")' in card
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    assert json.loads(found.to_json())["accuracy"] == found.accuracy


def test_a_name_cannot_break_the_card() -> None:
    found, _ = evaluated(*calibrated(50), names=("a|b", "two\nlines", "<b>c</b>", "__init__"))
    card = model_card(network(CONFIG), CONFIG, FACTS, found, "m")
    assert "a\\|b" in card
    assert "| two lines |" in card
    assert "<b>" not in card.replace("\\<", "")
    assert card.splitlines()[0].endswith("a\\|b, two lines, \\<b>c\\</b>, \\_\\_init\\_\\_")


def test_a_confusion_table_has_each_count_whatever_the_classes_are_called() -> None:
    title, rows = confusion_table(["recall", "b"], [[5, 1], [2, 7]], [5 / 6, 7 / 9])
    assert "true classes down" in title
    assert [list(row.values()) for row in rows] == [["recall", 5, 1, 5 / 6], ["b", 2, 7, 7 / 9]]


def test_of_many_classes_the_commonest_confusions_are_told() -> None:
    counts = torch.eye(1000, dtype=torch.int64) * 9
    counts[3, 7], counts[500, 2] = 4, 6
    names = [f"class {number}" for number in range(1000)]
    _, rows = confusion_table(names, counts.tolist(), [1.0] * 1000)
    assert [list(row.values()) for row in rows] == [["class 500", "class 2", 6, 15], ["class 3", "class 7", 4, 13]]


def test_a_package_that_stands_is_not_written_again(index_uri: str, tmp_path: Path) -> None:
    """By a second driver, or a worker that was thought lost: the checkpoints may be gone by then."""
    index, out = read_index(index_uri), LocalStorage(str(tmp_path / "model"))
    config = TrainConfig(index=index_uri, out=out.uri, model=CONFIG)
    initial = cast(Package, SimpleNamespace(description={"initial_weights": {}, "state_hash": "0"} | FACTS))
    history = [dict.fromkeys(HISTORY.names, 1) | {"recalls": [0.5] * 3}]
    standing, other = [], network(CONFIG)
    with torch.no_grad():
        other.head[-1].bias[0] += 1
    for model in (network(CONFIG), other):
        recipe = make_recipe(index_uri, index, model, config.fit, frozen=False)
        write_final(out, asdict(config), recipe, index, initial, history, CPU)
        standing.append(load_package(out.uri).model_id)
    assert standing[0] == standing[1]
