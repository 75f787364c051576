"""Behaviour of the export: it answers as the package does, on any batch, and nothing is kept that does not."""

import hashlib
import io
import json
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fruitray import export
from fruitray.cli import run_job
from fruitray.config import ModelConfig
from fruitray.images import decode
from fruitray.package import load_package, save_package
from fruitray.predictor import Predictor
from fruitray.storage import LocalStorage
from fruitray.synthetic import LABELS, draw
from tests.unit.runs import jpeg, lively
from tests.unit.test_package import describe

each_format = pytest.mark.parametrize("kind", ["onnx", "torch"])
CNN = ModelConfig(backbone="cnn", image_size=64)
NETWORKS = [
    CNN,
    ModelConfig(backbone="mlp", image_size=32),
    ModelConfig(backbone="cnn_bn", image_size=64),
    ModelConfig(backbone="mobilenet_v2", weights="none", image_size=64),
    ModelConfig(backbone="timm/mobilenetv3_small_050", weights="none", image_size=64),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return save(tmp_path / "package", CNN)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of nine photos, one that is none, and a hidden file."""
    folder = tmp_path / "photos"
    for number in range(9):
        place = folder / LABELS[number % 3] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(jpeg(draw(LABELS[number % 3], number, (90, 70))))
    (folder / "notes.txt").write_text("no photo")
    (folder / ".hidden").write_bytes(b"")
    return folder


def save(place: Path, config: ModelConfig) -> Path:
    save_package(LocalStorage(str(place)), lively(config), config, LABELS, {})
    return place


def run(package: Path, out: Path, *options: str) -> int:
    return run_job("export", ["--package", str(package), "--out", str(out), *options])


def said(out: Path) -> dict[str, Any]:
    description: dict[str, Any] = json.loads((out / "export.json").read_text())
    return description


def answers(out: Path, batch: torch.Tensor) -> torch.Tensor:
    """(B, C) shares by the exported model, as a user has them who knows nothing but `export.json`."""
    description = said(out)
    path = out / description["file"]
    if description["format"] == "torch":
        return torch.export.load(path).module()(batch)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {description["input"]["name"]: batch.numpy()})[0])


@each_format
@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.backbone)
def test_an_export_answers_as_the_package_on_batches_of_any_size(
    tmp_path: Path, config: ModelConfig, kind: str
) -> None:
    out = tmp_path / "out"
    assert run(save(tmp_path / "package", config), out, "--format", kind) == 0
    model, size = load_package(str(tmp_path / "package")).model, config.image_size
    model.full_precision = True
    batch = torch.from_numpy(np.stack([draw(LABELS[n % 3], n, (size, size)) for n in range(5)])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert len(set(model(batch).argmax(dim=1).tolist())) > 1, "a model that says one thing shows nothing"
        for part in (batch, batch[:1], batch[1:3]):
            shares = model(part).softmax(dim=1)
            torch.testing.assert_close(answers(out, part.contiguous()), shares, rtol=0, atol=1e-4)
    assert said(out)["parity"]["greatest_difference"] <= said(out)["parity"]["tolerance"]


@each_format
def test_the_description_says_what_goes_in_and_what_comes_out(
    package: Path, photos: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(package, out, "--format", kind, "--images", str(photos)) == 0
    printed, found, loaded = capsys.readouterr().out, said(out), load_package(str(package))
    assert found["sha256"] == hashlib.sha256((out / found["file"]).read_bytes()).hexdigest()
    assert (found["classes"], found["model_id"]) == (list(LABELS), loaded.model_id)
    assert found["input"] == {
        "name": "photos",
        "shape": ["batch", 3, 64, 64],
        "layout": "NCHW, RGB",
        "dtype": "uint8",
    }
    assert found["output"]["shape"] == ["batch", 3]
    assert (found["parity"]["photos"], found["parity"]["images"]) == (9, str(photos)), "those that can be read"
    assert {"torch", "fruitray"} < found["versions"].keys()
    assert "on 9 photos" in printed
    assert loaded.model_id[:12] in printed.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == sorted(["export.json", found["file"]])


def test_pillow_and_onnx_runtime_alone_give_what_score_gives(package: Path, photos: Path, tmp_path: Path) -> None:
    assert run(package, tmp_path / "out") == 0
    files = sorted(photos.rglob("*.jpg"))
    squares = [np.asarray(Image.open(file).resize((64, 64), Image.Resampling.BILINEAR)) for file in files]
    shares = answers(tmp_path / "out", torch.from_numpy(np.stack(squares).transpose(0, 3, 1, 2).copy()))
    predictions = Predictor(load_package(str(package)), gpu=False).predict([file.read_bytes() for file in files])
    assert [LABELS[number] for number in shares.argmax(dim=1)] == [one.label for one in predictions]
    assert shares.amax(dim=1).tolist() == pytest.approx([one.confidence for one in predictions], abs=0.03)


@each_format
def test_the_temperature_of_a_package_is_in_its_export(package: Path, tmp_path: Path, kind: str) -> None:
    describe(package, temperature=2.5)
    assert run(package, tmp_path / "out", "--format", kind) == 0
    model = load_package(str(package)).model
    model.full_precision = True
    batch = model.preprocessing.resize(decode(jpeg(draw("cherry", 3))).pixels)[None]
    with torch.inference_mode():
        found, logits = answers(tmp_path / "out", batch.contiguous()), model(batch)
    torch.testing.assert_close(found, (logits / 2.5).softmax(dim=1), rtol=0, atol=1e-4)
    assert (found - logits.softmax(dim=1)).abs().max() > 1e-3
    assert said(tmp_path / "out")["temperature"] == 2.5


@each_format
def test_an_export_that_answers_otherwise_is_not_kept(
    package: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = (lambda shares: shares + 2e-4, lambda shares: shares * float("nan"), lambda shares: shares[:, [1, 0, 2]])
    right = export._OPENERS[kind]
    for fault in faults:
        opener = partial(lambda fault, path: lambda photos: fault(right(path)(photos)), fault)
        monkeypatch.setitem(export._OPENERS, kind, opener)
        assert run(package, tmp_path / "out", "--format", kind) == 7
        printed = capsys.readouterr().err
        assert "exported, it answers otherwise" in printed
        assert str(package) in printed
    assert not (tmp_path / "out").exists()


@each_format
def test_a_network_that_cannot_be_traced_ends_in_one_sentence(
    package: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(self: export.Exported, photos: torch.Tensor) -> torch.Tensor:
        return photos.float() if photos.sum() > 0 else photos  # what it does depends on what it sees

    monkeypatch.setattr(export.Exported, "forward", forward)
    assert run(package, tmp_path / "out", "--format", kind) == 7
    last = capsys.readouterr().err.strip().splitlines()[-1]  # torch's own warnings stand before it
    assert f"{package}: cannot be exported as {export.FILES[kind]}: " in last
    assert not (tmp_path / "out").exists()


def test_a_pt2_holds_no_pickle(package: Path, tmp_path: Path) -> None:
    assert run(package, tmp_path / "out", "--format", "torch") == 0
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert contents
    for name, data in contents.items():
        assert not zipfile.is_zipfile(io.BytesIO(data)), f"{name} is what torch.save writes"
        assert not data.startswith(b"\x80"), f"{name} is a pickle"
        assert b'"use_pickle": true' not in data, name


def test_the_same_command_again_is_fine_and_another_model_or_format_is_refused(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [run(package, out, "--format", "torch") for _ in range(2)] == [0, 0]
    before = (out / "export.json").read_bytes()
    assert run(package, out, "--format", "onnx") == 5
    describe(package, note="another")
    assert run(package, out, "--format", "torch") == 5
    assert (out / "export.json").read_bytes() == before
    (out / "export.json").write_text("[]")
    assert run(package, out, "--format", "torch") == 5


def test_no_readable_photo_is_no_input(package: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no photo")
    assert run(package, tmp_path / "out", "--format", "torch", "--images", str(tmp_path / "photos")) == 3


def test_a_missing_package_is_named_with_what_brings_it(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(export, "NEEDED", {"onnx": ("onnxscript",), "torch": ()})
    assert run(package, tmp_path / "out") == 2
    assert "needs onnxscript: pip install fruitray[export]" in capsys.readouterr().err
    assert run(package, tmp_path / "out", "--format", "torch") == 0
