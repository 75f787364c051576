"""Behaviour of the engines: they say what plain PyTorch says, or are replaced by it."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

from fruitray.backbones import Classifier, build, fast_in_bfloat16
from fruitray.config import ModelConfig
from fruitray.engines import TOLERANCE, Engine, _padded, fold_batch_norm, make_engine, pick_engine
from fruitray.errors import GpuFullError, UsageError
from fruitray.machine import has_compiler
from fruitray.preprocess import Preprocessing
from tests.unit.runs import CONFIG, network, spread

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
ENGINES = ["eager", pytest.param("compile", marks=needs_compiler), "openvino"]


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(11, 3, 6, 6, generator=generator)
    return (255 * nn.functional.interpolate(coarse, (64, 64), mode="bilinear")).to(torch.uint8)


@pytest.mark.parametrize("full_precision", [True, False])
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_says_what_the_network_says(photos: torch.Tensor, name: str, full_precision: bool) -> None:
    model = build(CONFIG, 3)[0].eval()
    spread(model, photos, 1)  # scores that differ by more than a half, and are not too touchy for bfloat16
    engine = make_engine(name, model, CPU, full_precision=full_precision)
    assert engine.name in (f"{name} in float32", f"{name} in bfloat16"), "plain PyTorch took its place"
    logits, embeddings = engine(photos)  # eleven: two full passes and a part of one
    model.full_precision = True
    with torch.inference_mode():
        expected, seen = model(photos), model.embed(photos)
    scores, plain = logits.softmax(dim=1), expected.softmax(dim=1)
    torch.testing.assert_close(scores, plain, rtol=0, atol=1e-5 if full_precision else TOLERANCE)
    assert torch.equal(scores.argmax(dim=1), plain.argmax(dim=1))
    assert len(set(plain.argmax(dim=1).tolist())) == 3
    if full_precision:
        torch.testing.assert_close(embeddings, seen, rtol=1e-3, atol=1e-3)


def test_making_an_engine_leaves_the_network_as_it_was(photos: torch.Tensor) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    make_engine("eager", model, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_into_the_memory_of_a_gpu_is_computed_in_halves() -> None:
    """There is no GPU to fill: what is tried is an engine whose network ends as PyTorch says it would."""
    taken = []

    def compute(photos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(photos) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken.append(len(photos))
        return photos + 1, photos

    photos, room = torch.arange(19.0)[:, None], 3
    logits, embeddings = Engine("full", 8, compute)(photos)
    assert torch.equal(logits, photos + 1)
    assert torch.equal(embeddings, photos)
    assert max(taken) <= room
    room = 0
    with pytest.raises(GpuFullError, match="nvidia-smi"):
        Engine("full", 8, compute)(photos)


def test_what_is_compiled_for_a_batch_that_does_not_fit_is_compiled_for_a_smaller_one() -> None:
    taken = []

    def compute(photos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(len(photos))
        if len(photos) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return photos.flatten(1) + 1, photos.flatten(1)

    photos = torch.arange(27.0).view(9, 3, 1, 1)
    engine = Engine("compile", 8, _padded(compute, 8))
    for count in (2, 9, 1):
        logits, embeddings = engine(photos[:count])
        assert torch.equal(logits, photos[:count].flatten(1) + 1)
        assert torch.equal(embeddings, photos[:count].flatten(1))
    assert taken[:3] == [8, 4, 2]
    assert set(taken[3:]) == {2}, "each number of photos is compiled anew"


class Narrow(nn.Module):
    """Tells its photos apart in bits that bfloat16 does not have."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        means = inputs.mean(dim=(2, 3)) / 1000 + 1
        return (means - 1) * 1e5


def test_an_engine_that_says_something_else_is_replaced_by_plain_pytorch(photos: torch.Tensor) -> None:
    model = network()
    model.trunk, model.head = Narrow(), nn.Identity()
    engine = make_engine("eager", model, CPU)
    model.full_precision = True
    with torch.inference_mode():
        torch.testing.assert_close(engine(photos)[0], model(photos))
    assert "float32" in engine.name


class Untraceable(nn.Module):
    """Goes another way where it is traced."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            raise RuntimeError("not like this")
        return inputs.mean(dim=(2, 3))


def test_a_network_that_an_engine_cannot_take_is_computed_by_plain_pytorch(photos: torch.Tensor) -> None:
    model = Classifier(Untraceable(), nn.Linear(3, 3), Preprocessing(size=64)).eval()
    engine = make_engine("openvino", model, CPU)
    assert engine.name == "eager in float32, for openvino cannot compute this network"
    model.full_precision = True
    with torch.inference_mode():
        torch.testing.assert_close(engine(photos)[0], model(photos))


@pytest.mark.skipif(not fast_in_bfloat16(CPU), reason="needs a CPU with bfloat16, which rounds")
def test_scores_are_compared_as_they_are_calibrated() -> None:
    model = network()
    assert make_engine("eager", model, CPU, temperature=50).name == "eager in bfloat16"
    assert make_engine("eager", model, CPU, temperature=1).name.startswith("eager in float32")


@pytest.mark.parametrize(
    "backbone", ["cnn_bn", "efficientnet_b2", "resnet50", "timm/tf_efficientnetv2_b0", "densenet121"]
)
def test_batch_norm_is_folded_into_convolutions_without_a_difference(backbone: str) -> None:
    model, _ = build(ModelConfig(backbone=backbone, weights="none", image_size=64), classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    trunk = model.eval().trunk
    inputs = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = trunk(inputs)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    folded = fold_batch_norm(trunk)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules()) == norms - folded
    not_behind_one = {"cnn_bn": 5, "densenet121": 62}
    assert folded == norms - not_behind_one.get(backbone, 0)
    with torch.inference_mode():
        torch.testing.assert_close(trunk(inputs), before, rtol=1e-3, atol=1e-4)


class Shared(nn.Module):
    """Batch norms that must not be folded: one that is used twice, and one whose input somebody else needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.twice, self.once = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        between = self.second(self.twice(self.first(inputs)))
        return self.once(between) + self.twice(between)


def test_what_others_need_is_not_folded() -> None:
    assert fold_batch_norm(Shared().eval()) == 0


def test_a_network_that_cannot_be_traced_is_left_alone() -> None:
    class Choosy(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) if inputs.sum() > 0 else inputs

    assert fold_batch_norm(Choosy(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()) == 0


def test_photos_go_through_in_passes_of_the_wanted_size(photos: torch.Tensor) -> None:
    passes: list[int] = []

    def compute(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        passes.append(len(some))
        return some[:, 0, 0, :3].float(), some[:, 0, 0, :2].float()

    logits, embeddings = Engine("counting", 4, compute)(photos)
    assert passes == [4, 4, 3]
    assert torch.equal(logits, photos[:, 0, 0, :3].float())
    assert embeddings.shape == (11, 2)


def test_engines_that_cannot_be_had_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="CPUs only"):
        make_engine("openvino", network(), torch.device("meta"))
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(UsageError, match=r"fruitray\[openvino\]"):
        make_engine("openvino", network(), CPU)


def test_the_engine_is_picked_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_engine(10**9, gpu=True) == "eager"
    there: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    assert pick_engine(10**9, gpu=False) == "eager"
    there.add("g++")
    assert (pick_engine(100, gpu=False), pick_engine(10**9, gpu=False)) == ("eager", "compile")
    there.add("openvino")
    assert pick_engine(100, gpu=False) == "openvino"
