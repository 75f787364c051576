"""Behaviour of the model package, and of the predictor that opens it."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

import fruitray
from fruitray.config import ModelConfig
from fruitray.errors import ModelRejectedError
from fruitray.images import decode, image_error
from fruitray.inference import UNCALIBRATED, Inference
from fruitray.package import load_package, save_package
from fruitray.predictor import Prediction, Predictor
from fruitray.storage import LocalStorage
from fruitray.synthetic import LABELS, draw, photo_set
from tests.unit.runs import CONFIG, jpeg, network


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with two files beside the weights."""
    save(tmp_path / "package")
    return tmp_path / "package"


def save(folder: Path, inference: Inference = UNCALIBRATED) -> None:
    files = {"metrics.json": b'{"accuracy": 0.9}', "README.md": b"# a model"}
    facts = {"metrics": {"accuracy": 0.9}}
    save_package(LocalStorage(str(folder)), network(), CONFIG, LABELS, facts, inference=inference, files=files)


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Ten JPEG files of several sizes that decode."""
    return [jpeg(draw(LABELS[n % 3], n, size)) for n, size in zip(range(10), [(90, 64), (64, 64)] * 5, strict=True)]


def describe(package: Path, **changes: Any) -> None:
    """Overwrite fields of package.json."""
    description = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(json.dumps(description | changes))


def describe_within(package: Path, changes: dict[str, Any]) -> None:
    """Overwrite fields of package.json; where a change has fields, too, those alone."""
    stands = json.loads((package / "package.json").read_text())
    whole = {name: stands[name] | new if isinstance(new, dict) and new else new for name, new in changes.items()}
    describe(package, **whole)


def replace_weights(package: Path, data: bytes) -> None:
    """Put other bytes in the place of the weights, hash and all."""
    (package / "model.safetensors").write_bytes(data)
    files = json.loads((package / "package.json").read_text())["files"]
    describe(package, files=files | {"model.safetensors": hashlib.sha256(data).hexdigest()})


def edit_weights(package: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_safetensors((package / "model.safetensors").read_bytes())
    edit(state)
    replace_weights(package, save_safetensors(state))


def predict(package: Path, contents: list[Any], **settings: Any) -> list[Prediction]:
    return Predictor(load_package(str(package)), **settings).predict(contents)


def verdicts(predictions: list[Prediction]) -> list[tuple[str, str | None, str | None]]:
    return [(one.status, one.label, one.error_code) for one in predictions]


@pytest.mark.parametrize(
    "config",
    [CONFIG, ModelConfig(backbone="timm/mobilenetv3_small_050", weights="none", image_size=96, dropout=0.1)],
    ids=["cnn", "timm"],
)
def test_a_package_holds_all_there_is_to_know(tmp_path: Path, config: ModelConfig) -> None:
    model = network(config)
    save_package(LocalStorage(str(tmp_path)), model, config, LABELS, {"metrics": {"accuracy": 0.9}})
    found = load_package(str(tmp_path))
    batch = torch.randint(256, (4, 3, 96, 96) if config is not CONFIG else (4, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(found.model(batch), model(batch))
    assert found.classes == LABELS
    assert found.model.preprocessing == model.preprocessing
    assert found.description["metrics"] == {"accuracy": 0.9}
    assert found.model_id == hashlib.sha256((tmp_path / "package.json").read_bytes()).hexdigest()


def test_a_layer_that_stands_in_two_places_is_kept_in_both(tmp_path: Path) -> None:
    model = network()
    layer = next(module for module in model.trunk.modules() if isinstance(module, torch.nn.Conv2d))
    model.trunk.add_module("again", layer)
    save_package(LocalStorage(str(tmp_path)), model, CONFIG, LABELS, {})
    kept = load_safetensors((tmp_path / "model.safetensors").read_bytes())
    assert torch.equal(kept["trunk.again.weight"], layer.weight)
    assert sum(torch.equal(tensor, layer.weight) for tensor in kept.values()) == 2


def test_predictions_are_those_of_the_model(package: Path, files: list[bytes]) -> None:
    model, predictions = network(), predict(package, files, top_k=2, full_precision=True)
    model.full_precision = True
    for data, prediction in zip(files, predictions, strict=True):
        square = model.preprocessing.resize(decode(data).pixels)
        with torch.inference_mode():
            shares = model(square[None]).softmax(dim=1)[0]
        order = shares.argsort(descending=True)[:2]
        assert prediction.top_labels == [LABELS[number] for number in order]
        assert prediction.top_scores == pytest.approx(shares[order].tolist(), abs=1e-5)
        assert (prediction.label, prediction.confidence) == (prediction.top_labels[0], prediction.top_scores[0])
        assert (prediction.status, prediction.error_code, prediction.error) == ("ok", None, None)
    assert len({prediction.label for prediction in predictions}) > 1, "a model that says one thing shows nothing"
    assert [(one.width, one.height) for one in predictions[:2]] == [(90, 64), (64, 64)]


def test_a_temperature_changes_confidences_and_no_labels(tmp_path: Path, package: Path, files: list[bytes]) -> None:
    save(tmp_path / "cooler", Inference(temperature=2.0, threshold=0.5))
    plain, cooler = (predict(uri, files, full_precision=True) for uri in (package, tmp_path / "cooler"))
    assert verdicts(cooler) == verdicts(plain), "the threshold, too, changes none"
    for before, after in zip(plain, cooler, strict=True):
        roots = torch.tensor(before.top_scores).sqrt()  # softmax(logits / 2), before it is divided by its sum
        assert after.top_scores == pytest.approx((roots / roots.sum()).tolist(), abs=1e-4)


def test_two_lines_open_a_package_and_predict(package: Path, files: list[bytes]) -> None:
    assert fruitray.load(str(package)).predict(files) == predict(package, files)


def test_what_the_library_offers_is_listed() -> None:
    ours = {name for name, thing in vars(fruitray).items() if not isinstance(thing, ModuleType) and name[0] != "_"}
    assert fruitray.__all__ == sorted({"__version__", *ours} - {"TYPE_CHECKING"}) == ["__version__", "load"]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_the_batch_size_does_not_change_the_labels(package: Path, files: list[bytes], batch_size: int) -> None:
    whole, parts = (predict(package, files, batch_size=size) for size in (10, batch_size))
    assert verdicts(parts) == verdicts(whole)
    assert [one.confidence for one in parts] == pytest.approx([one.confidence for one in whole], abs=0.02)


def test_more_labels_than_classes_are_all_classes(package: Path, files: list[bytes]) -> None:
    [prediction] = predict(package, files[:1], top_k=10)
    assert sorted(prediction.top_labels) == sorted(LABELS)
    assert sum(prediction.top_scores) == pytest.approx(1)
    assert prediction.top_scores == sorted(prediction.top_scores, reverse=True)


def test_an_unreadable_file_becomes_an_error_and_disturbs_nobody(package: Path, files: list[bytes]) -> None:
    bad = {0: b"", 3: files[0][:300], 4: b"no image", 8: image_error("E_SRC_GONE"), 13: b"GIF89a..."}
    good = iter(files)
    mixed = [bad[position] if position in bad else next(good) for position in range(len(files) + len(bad))]
    predictions = predict(package, mixed, batch_size=4)
    readable = [one for position, one in enumerate(predictions) if position not in bad]
    assert readable == predict(package, files, batch_size=4), "same batches, so the same bits"
    assert len(predictions) == len(mixed)
    codes = {position: predictions[position].error_code for position in bad}
    assert codes == {0: "E_EMPTY", 3: "E_TRUNCATED", 4: "E_NOT_IMAGE", 8: "E_SRC_GONE", 13: "E_FORMAT"}
    for position in bad:
        assert predictions[position].status == "error"
        assert predictions[position].error
        assert predictions[position].label is predictions[position].top_scores is predictions[position].width is None


def test_nothing_but_errors_and_nothing_at_all_are_fine(package: Path) -> None:
    assert [one.error_code for one in predict(package, [b"", b""])] == ["E_EMPTY", "E_EMPTY"]
    assert predict(package, []) == []


def test_a_collection_with_faults_gets_one_prediction_per_file(package: Path) -> None:
    predictions = predict(package, list(photo_set(8).values()))
    assert sorted(one.status for one in predictions) == ["error"] * 2 + ["ok"] * 22


def test_two_saves_of_one_model_are_one_model(tmp_path: Path, package: Path) -> None:
    save(tmp_path / "again")
    assert load_package(str(package)).model_id == load_package(str(tmp_path / "again")).model_id


def test_facts_cannot_hide_what_the_package_says_of_itself(tmp_path: Path) -> None:
    save_package(LocalStorage(str(tmp_path)), network(), CONFIG, LABELS, {"classes": ["x"], "format": 9, "tta": 1})
    assert load_package(str(tmp_path)).classes == LABELS


@pytest.mark.parametrize("missing", ["package.json", "model.safetensors", "metrics.json", "README.md"])
def test_a_package_with_a_file_missing_is_rejected(package: Path, missing: str) -> None:
    (package / missing).unlink()
    rejected(package, missing)
    (package / missing).mkdir()
    rejected(package, missing)


def test_a_place_that_is_not_there_is_rejected(tmp_path: Path) -> None:
    rejected(tmp_path / "nowhere", "package.json")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"text"', "{}", '{"format": 2}', "\udcff", "[" * 100_000], ids=range(10)
)
def test_a_description_that_is_none_is_rejected(package: Path, text: str) -> None:
    (package / "package.json").write_text(text, errors="surrogateescape")
    rejected(package, "package.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 1}, "format 1"),
        ({"format": None}, "format None"),
        ({"model": None}, "NoneType"),
        ({"model": {"backbone": "unheard_of"}}, "--backbone unheard_of"),
        ({"model": {"backbone": 7}}, "'int'"),
        ({"model": {"colour": "red"}}, "'colour'"),
        ({"model": {"image_size": "64"}}, "'str'"),
        ({"classes": None}, "the classes"),
        ({"classes": []}, "the classes"),
        ({"classes": ["cherry", "cherry", "tomato"]}, "the classes"),
        ({"classes": "abc"}, "the classes"),
        ({"classes": [1, 2, 3]}, "the classes"),
        ({"preprocessing": {}}, "preprocessing lacks crop, interpolation, mean, size, std"),
        ({"preprocessing": {"size": -1}}, "--size -1"),
        ({"preprocessing": {"mean": ["a", "b", "c"]}}, "--mean ('a', 'b', 'c')"),
        ({"preprocessing": {"std": [0, 0, 0]}}, "--std (0, 0, 0)"),
        ({"preprocessing": {"mean": [float("nan"), 0.5, 0.5]}}, "--mean (nan, 0.5, 0.5)"),
        ({"files": None}, "NoneType"),
        ({"files": {}}, "the files"),
        ({"files": {"model.safetensors": None}}, "model.safetensors: does not have the SHA-256"),
        ({"files": ["model.safetensors"]}, "no model.safetensors"),
        ({"temperature": None}, "--temperature None"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"temperature": -1.5}, "--temperature -1.5"),
        ({"temperature": 1e-300}, "--temperature 1e-300"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"temperature": "1.0"}, "--temperature 1.0"),
        ({"temperature": True}, "--temperature True"),
        ({"threshold": 1.5}, "--threshold 1.5"),
        ({"threshold": float("nan")}, "--threshold nan"),
        ({"threshold": [0.5]}, "--threshold [0.5]"),
        ({"tta": 1}, "--tta 1"),
        ({"tta": None}, "--tta None"),
    ],
    ids=str,
)
def test_a_description_with_nonsense_in_it_is_rejected(package: Path, changes: dict[str, Any], named: str) -> None:
    describe_within(package, changes)
    rejected(package, named)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["cherry", "tomato"]},
        {"classes": ["cherry", "strawberry", "tomato", "plum"]},
        {"model": {"backbone": "mlp"}},
        {"model": {"backbone": "mobilenet_v2"}},
        {"preprocessing": {"size": 96}},
    ],
    ids=str,
)
def test_a_description_of_another_model_is_rejected(package: Path, changes: dict[str, Any]) -> None:
    describe_within(package, changes)
    rejected(package, "does not hold the weights of this model")


@pytest.mark.parametrize("field", ["temperature", "threshold", "tta", "files"])
def test_a_description_without_a_field_is_rejected(package: Path, field: str) -> None:
    description = json.loads((package / "package.json").read_text())
    del description[field]
    (package / "package.json").write_text(json.dumps(description))
    rejected(package, field)


@pytest.mark.parametrize(("part", "field"), [("preprocessing", "mean"), ("preprocessing", "crop"), ("model", "hidden")])
def test_a_description_leaves_nothing_to_defaults(package: Path, part: str, field: str) -> None:
    said = json.loads((package / "package.json").read_text())[part]
    del said[field]
    describe(package, **{part: said})
    rejected(package, f"{part} lacks {field}")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "", "a/b"])
def test_a_description_leads_nowhere_else(package: Path, name: str) -> None:
    (package.parent / "secret").write_text("")
    files = json.loads((package / "package.json").read_text())["files"]
    describe(package, files=files | {name: hashlib.sha256(b"").hexdigest()})
    rejected(package, "plain names")


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.json", "README.md"])
@pytest.mark.parametrize("position", [0, 5, -1])
def test_one_changed_byte_of_any_file_is_noticed(package: Path, name: str, position: int) -> None:
    data = bytearray((package / name).read_bytes())
    data[position] ^= 1
    (package / name).write_bytes(data)
    rejected(package, f"{name}: does not have the SHA-256")


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state.pop("head.4.bias"),
        lambda state: state.update(extra=torch.zeros(1)),
        lambda state: state.update({"head.4.bias": torch.zeros(4)}),
        lambda state: state.update({"head.4.bias": state["head.4.bias"].to(torch.int8)}),
        lambda state: state["head.4.bias"].fill_(float("nan")),
        lambda state: state["trunk.0.weight"].view(-1)[3:4].fill_(float("inf")),
    ],
    ids=["one missing", "one too many", "another shape", "another type", "nan", "inf"],
)
def test_weights_that_do_not_fit_are_rejected(package: Path, edit: Any) -> None:
    edit_weights(package, edit)
    rejected(package, "model.safetensors")


class _Payload:
    """What a hostile pickle does: it leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_in_the_place_of_the_weights_is_rejected_and_never_run(package: Path, tmp_path: Path) -> None:
    zipped = io.BytesIO()
    torch.save(_Payload(tmp_path / "mark"), zipped)
    for data in (pickle.dumps(_Payload(tmp_path / "mark")), zipped.getvalue(), b""):
        replace_weights(package, data)
        rejected(package, "model.safetensors")
    assert not (tmp_path / "mark").exists()


def rejected(package: Path, words: str = "") -> None:
    """Opening it says what is wrong, names the place, and nothing else escapes."""
    with pytest.raises(ModelRejectedError) as caught:
        load_package(str(package))
    assert caught.value.uri.startswith(str(package))
    assert caught.value.reason
    assert words in str(caught.value)
