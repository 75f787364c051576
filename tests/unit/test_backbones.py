"""Behaviour of the networks: how big they are, where their weights come from, and what is refused."""

import contextlib
import hashlib
import json
import pickle
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from fruitray import backbones
from fruitray.backbones import (
    Classifier,
    build,
    freeze,
    layer_summary,
    parameter_counts,
    parameter_groups,
    pick_device,
    rebuilt,
    reserved_device,
    skeleton,
    trained_part,
    unfreeze,
)
from fruitray.config import ModelConfig
from fruitray.errors import ModelRejectedError, UsageError, WeightsError
from fruitray.package import load_package, save_package
from fruitray.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from fruitray.storage import open_storage
from fruitray.synthetic import LABELS, draw
from fruitray.weights import state_hash

TIMM = "timm/tf_efficientnetv2_b0"
FAMILIES = {  # one of each, with a size at which it is quick
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 80,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
    "vit_b_32": 224,
    "wide_resnet50_2": 64,
}


def new(backbone: str, seed: int = 0, **settings: Any) -> Classifier:
    """A network of random weights with three classes."""
    return build(ModelConfig(**{"backbone": backbone, "weights": "none", **settings}), 3, seed)[0]


def photos(size: int, count: int = 4) -> torch.Tensor:
    """(count, 3, size, size) uint8, each drawn anew."""
    images = [draw(LABELS[number % 3], number, (size, size)) for number in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def logits(model: Classifier, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(batch)


def save_mobilenet(path: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda state: None) -> str:
    """A file of torchvision's own MobileNetV2 state, after `change`."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = torchvision.models.mobilenet_v2().state_dict()
    change(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


def from_file(path: str, **settings: Any) -> Classifier:
    return new("mobilenet_v2", weights=path, image_size=64, **settings)


def widths(head: nn.Module) -> list[tuple[int, int]]:
    """(in, out) of the linear layers."""
    return [(layer.in_features, layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear)]


def step(model: Classifier) -> None:
    """One forward and backward pass in training mode, over two photos."""
    model.train()
    torch.nn.functional.cross_entropy(model(photos(model.preprocessing.size, 2)), torch.tensor([0, 1])).backward()


def first_layer(model: Classifier) -> list[Any]:
    return next(model.trunk.parameters()).tolist()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No name can be resolved, and no download is cached."""

    def refuse(*args: Any, **settings: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_the_perceptron_is_the_reports() -> None:
    assert parameter_counts(new("mlp")) == (68_851_023, 68_851_023)


@pytest.mark.parametrize("dropout", [None, 0.0, 0.7])
def test_the_small_convolutional_network_is_the_reports(dropout: float | None) -> None:
    assert parameter_counts(new("cnn", dropout=dropout))[0] == 9_966_691


@pytest.mark.parametrize(("backbone", "embedding"), [("resnet50", 2048), ("vgg16", 4096)])
def test_the_reports_head_has_two_layers_256_wide(backbone: str, embedding: int) -> None:
    model = new(backbone)
    assert widths(model.head) == [(embedding, 256), (256, 3)]
    head = embedding * 256 + 256 + 256 * 3 + 3
    freeze(model)
    assert parameter_counts(model)[1] == head


@pytest.mark.parametrize("backbone", FAMILIES)
def test_any_torchvision_classifier_gets_a_head_that_fits_and_trains(backbone: str) -> None:
    model = new(backbone, image_size=FAMILIES[backbone])
    step(model)
    assert all(parameter.grad is not None for parameter in model.parameters())
    first, last = widths(model.head)
    assert first[1] == last[0] == 256
    with torch.inference_mode():
        embeddings = model.eval().embed(photos(FAMILIES[backbone], 2))
    assert embeddings.shape == (2, first[0])
    assert embeddings.isfinite().all()


@pytest.mark.parametrize("backbone", ["googlenet", "squeezenet1_1", "mnasnet0_5"])
def test_the_dropout_that_our_heads_bring_replaces_the_networks_own(backbone: str) -> None:
    assert not any(isinstance(module, nn.Dropout) for module in new(backbone).trunk.modules())


@pytest.mark.parametrize(("hidden", "layers"), [(None, 2), (0, 1), (48, 2)])
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", TIMM])
def test_the_head_is_as_deep_as_was_asked_for(backbone: str, hidden: int | None, layers: int) -> None:
    model = new(backbone, hidden=hidden)
    width = widths(model.head)[0][0]
    assert widths(model.head) == ([(width, hidden or 256), (hidden or 256, 3)] if layers == 2 else [(width, 3)])
    assert isinstance(model.head[0], nn.LayerNorm)


def test_the_reports_efficientnet_has_a_linear_head_unless_told_otherwise() -> None:
    assert widths(new("efficientnet_b2").head) == widths(new("efficientnet_b2", hidden=0).head) == [(1408, 3)]
    assert widths(new("efficientnet_b2", hidden=32).head) == [(1408, 32), (32, 3)]


@pytest.mark.parametrize(
    ("backbone", "hidden"), [("cnn_bn", None), ("mnasnet0_5", None), ("resnet18", 0), ("resnet18", 48), (TIMM, 48)]
)
def test_a_package_holds_the_head_it_was_given(tmp_path: Path, backbone: str, hidden: int | None) -> None:
    config = ModelConfig(backbone=backbone, weights="none", hidden=hidden, image_size=64)
    model, _ = build(config, 3, seed=1)
    save_package(open_storage(str(tmp_path)), model, config, ("a", "b", "c"), {})
    batch = photos(64)
    assert torch.equal(logits(load_package(str(tmp_path)).model, batch), logits(model, batch))


@pytest.mark.parametrize("dropout", [0.0, 0.35])
@pytest.mark.parametrize("backbone", ["mlp", "cnn", "cnn_bn", "mobilenet_v2", "vgg11_bn", TIMM])
def test_dropout_is_what_was_asked_for(backbone: str, dropout: float) -> None:
    model = new(backbone, dropout=dropout, image_size=64)
    assert {layer.p for layer in model.head if isinstance(layer, nn.Dropout)} == {dropout}


@pytest.mark.parametrize("backbone", ["mlp", "cnn", "cnn_bn", "mobilenet_v2", TIMM])
def test_the_seed_fixes_every_bit(backbone: str) -> None:
    first, again, other = (state_hash(new(backbone, seed, image_size=64).state_dict()) for seed in (1, 1, 2))
    assert first == again != other


def test_building_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4).tolist()
    torch.manual_seed(3)
    new("cnn", image_size=64)
    assert torch.rand(4).tolist() == expected


@pytest.mark.parametrize("backbone", ["mlp", "cnn", "cnn_bn", "mobilenet_v2", "resnet50", "efficientnet_b2", TIMM])
def test_a_skeleton_holds_the_weights_of_what_was_built(backbone: str) -> None:
    built = new(backbone, seed=1, image_size=64)
    model = Classifier(built.trunk, built.head, replace(built.preprocessing, crop=0.5, mean=(0.4, 0.5, 0.6)))
    bones = skeleton(ModelConfig(backbone=backbone), 3, model.preprocessing)
    bones.load_state_dict(model.state_dict())
    batch = photos(64)
    assert bones.preprocessing == model.preprocessing
    assert torch.equal(logits(bones, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientvit_b0", "vit_tiny_patch16_224", "ghostnet_100"])
def test_any_timm_network_gets_a_head_that_fits(name: str) -> None:
    model = new(f"timm/{name}")
    assert logits(model, photos(model.preprocessing.size, 2)).shape == (2, 3)


def test_a_network_that_torch_cannot_train_with_channels_last_is_not_laid_out_so() -> None:
    """It would end this process."""
    config = ModelConfig(backbone="timm/repvgg_a0", weights="none", image_size=64)
    model = rebuilt(build(config, 3)[0], config, 3)
    for _ in range(3):
        step(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert new(TIMM).layout is torch.channels_last


def test_a_network_normalises_the_photos_itself() -> None:
    model, batch = new("cnn", image_size=64).eval(), photos(64)
    with torch.inference_mode():
        expected = model.trunk(batch / 127.5 - 1)
        torch.testing.assert_close(model.embed(batch), expected, rtol=0.02, atol=0.02)


def test_embeddings_and_logits_are_float32() -> None:
    model, batch = new("mobilenet_v2", image_size=64).eval(), photos(64)
    with torch.inference_mode():
        assert model.embed(batch).dtype == model(batch).dtype == torch.float32


def test_freezing_leaves_the_head_to_train() -> None:
    model = new("mobilenet_v2")
    freeze(model)
    assert parameter_counts(model) == (parameter_counts(new("mobilenet_v2"))[0], parameter_counts(model.head)[0])


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "vgg11_bn"])
def test_training_the_head_leaves_a_frozen_trunk_as_it_was(backbone: str) -> None:
    model = new(backbone, image_size=64)
    freeze(model)
    before, embeddings = state_hash(model.trunk.state_dict()), model.embed(photos(64))
    step(model)
    assert not any(module.training for module in model.trunk.modules())
    assert all(module.training for module in model.head.modules())
    assert state_hash(model.trunk.state_dict()) == before
    assert torch.equal(model.embed(photos(64)), embeddings)
    assert embeddings.grad_fn is None
    assert all(parameter.grad is None for parameter in model.trunk.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_a_trunk_that_was_frozen_can_be_trained_after_all() -> None:
    model = new("mobilenet_v2", image_size=64).train()
    freeze(model)
    unfreeze(model)
    assert all(module.training for module in model.modules())
    before = model.trunk.features[0][1].running_mean.clone()
    step(model)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.equal(model.trunk.features[0][1].running_mean, before)


@pytest.mark.parametrize("change", [freeze, unfreeze])
def test_freezing_does_not_start_training(change: Callable[[Classifier], None]) -> None:
    model = new("cnn_bn", image_size=64).eval()
    change(model)
    assert not any(module.training for module in model.modules())


def test_a_compiled_model_can_be_frozen_and_unfrozen() -> None:
    model = new("cnn_bn", image_size=64)
    compiled = torch.compile(model, backend="eager")
    for change, trained in ((freeze, False), (unfreeze, True), (freeze, False)):
        change(model)
        model.zero_grad()
        compiled(photos(64)).sum().backward()
        assert model.head[1].weight.grad is not None
        assert {parameter.grad is not None for parameter in model.trunk.parameters()} == {trained}


def test_the_trained_part_is_told_in_words() -> None:
    models = [new("mobilenet_v2", hidden=hidden) for hidden in (None, 0)]
    assert {trained_part(model) for model in models} == {"whole network"}
    for model in models:
        freeze(model)
    assert [trained_part(model) for model in models] == ["last two layers", "last layer"]


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.head, lambda model: model.trunk])
def test_parameter_groups_hold_every_parameter_once(part: Callable[[Classifier], nn.Module]) -> None:
    model = new("resnet18")
    freeze(model)
    module = part(model)
    groups = parameter_groups(module, learning_rate=0.1, trunk_rate=0.5, weight_decay=0.01)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, module.parameters()))
    trunk = set(model.trunk.parameters()) if module is model else set()
    for group in groups:
        assert group["lr"] == 0.1 * group["rate"]
        for parameter in group["params"]:
            assert group["rate"] == (0.5 if parameter in trunk else 1)
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0)
    torch.optim.AdamW(groups)


def test_there_are_no_empty_parameter_groups() -> None:
    groups = parameter_groups(nn.Linear(2, 2, bias=False), learning_rate=1.0, trunk_rate=1.0, weight_decay=0.0)
    assert len(groups) == 1


@pytest.mark.parametrize("backbone", ["mlp", "cnn", "cnn_bn", "efficientnet_b2", "inception_v3", "vit_b_32", TIMM])
def test_the_table_of_layers_adds_up(backbone: str) -> None:
    model = new(backbone)
    if backbone not in ("mlp", "cnn"):
        freeze(model)
    table = layer_summary(model)
    totals = tuple(
        int(re.search(rf"^{kind} params: ([\d,]+)$", table, re.M)[1].replace(",", ""))
        for kind in ("Total", "Trainable")
    )
    assert totals == parameter_counts(model)
    assert len(table.splitlines()) <= 60


def test_the_table_of_layers_shows_the_reports_networks() -> None:
    perceptron, small = layer_summary(new("mlp")), layer_summary(new("cnn"))
    assert re.search(r"Linear.*\[1, 255\] +68,850,255", perceptron)
    assert "Total params: 68,851,023" in perceptron
    assert re.search(r"Conv2d.*\[1, 16, 144, 144\] +2,416", small)
    assert "Total params: 9,966,691" in small


def test_a_table_of_layers_leaves_the_model_alone() -> None:
    model = new("mobilenet_v2", image_size=64)
    step(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    before = state_hash(model.state_dict())
    layer_summary(model)
    assert state_hash(model.state_dict()) == before
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), gradients, strict=True))


def test_preprocessing_comes_with_the_backbone_and_the_size_can_be_asked_for() -> None:
    given = new("efficientnet_b2").preprocessing
    assert (given.size, given.crop, given.interpolation) == (288, 1.0, "bicubic")
    assert new("resnet50", image_size=96).preprocessing == Preprocessing(size=96, crop=224 / 232)
    assert new("cnn_bn").preprocessing == Preprocessing(size=128, crop=0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert new("cnn").preprocessing.size == new("mlp").preprocessing.size == 300
    timms = new(TIMM).preprocessing
    assert (timms.size, timms.crop, timms.interpolation) == (224, 0.875, "bicubic")
    assert new("timm/convnext_tiny.fb_in22k_ft_in1k_384").preprocessing.crop == 0, "made for the whole photo, squashed"


def test_state_hash_tells_names_types_shapes_and_values_apart() -> None:
    tensor = torch.arange(16.0).reshape(1, 4, 2, 2)
    hashes = [
        state_hash(state)
        for state in (
            {"a": tensor},
            {"b": tensor},
            {"a": tensor.reshape(1, 2, 4, 2)},
            {"a": tensor.to(torch.int32).view(torch.float32)},
            {"a": tensor.view(torch.int32)},
            {"a": -tensor},
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert state_hash({"a": tensor.to(memory_format=torch.channels_last)}) == hashes[0]


@pytest.mark.parametrize(
    "backbone",
    [
        *("resnet5", "timm/no_such_net", "timm/resnet18.no_such_tag", ""),
        *("fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "quantized_resnet50", "r3d_18", "raft_small"),
    ],
)
def test_an_unknown_backbone_is_refused_by_name(backbone: str) -> None:
    with pytest.raises(UsageError, match=f"--backbone {backbone}"):
        new(backbone)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("resnet5", "resnet50"), ("ResNet18", "resnet18"), ("cnnbn", "cnn_bn"), ("timm/resnet_18", "timm/resnet18")],
)
def test_names_near_an_unknown_one_are_told(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=rf"did you mean .*\b{right}\b"):
        new(wrong)


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("timm/vit_tiny_patch16_224", 64), ("vit_b_32", 256), ("maxvit_t", 448), ("inception_v3", 64), ("alexnet", 32)],
)
def test_a_network_takes_only_sizes_it_can_compute(backbone: str, size: int) -> None:
    with pytest.raises(UsageError, match=f"image-size {size}: {backbone} takes"):
        new(backbone, image_size=size)


@pytest.mark.parametrize("file", ["m.pth", "m.safetensors"])
@pytest.mark.parametrize(
    ("backbone", "place"),
    [
        ("googlenet", "fc"),
        ("inception_v3", "fc"),
        ("mnasnet0_5", "classifier.1"),
        ("densenet121", "classifier"),
        ("squeezenet1_1", "classifier.1"),
    ],
)
def test_official_files_make_the_official_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, place: str, file: str
) -> None:
    """With auxiliary heads, with names of old, without versions."""
    auxiliary = backbone in ("googlenet", "inception_v3")
    settings = {"aux_logits": True, "transform_input": True, "init_weights": False} if auxiliary else {}
    official = torchvision.models.get_model(backbone, **settings).eval()
    state = official.state_dict()
    if backbone == "densenet121":
        for name in list(state):
            state[re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name)] = state.pop(name)
    save_file(dict(state), tmp_path / file) if file.endswith("safetensors") else torch.save(state, tmp_path / file)
    model = new(backbone, weights=str(tmp_path / file), image_size=96)
    official.set_submodule(place, nn.Identity())
    monkeypatch.setattr(backbones, "autocast", lambda device: contextlib.nullcontext())
    batch = photos(96)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = official((batch / 255 - mean) / std)
        assert expected.std() > 0
        torch.testing.assert_close(model.eval().embed(batch), expected, rtol=1e-3, atol=1e-4 * float(expected.std()))


def test_a_size_that_comes_with_the_weights_must_fit_too(tmp_path: Path) -> None:
    state = torchvision.models.googlenet(aux_logits=False, init_weights=False).state_dict()
    save_file(state, tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_text('{"size": 8}')
    with pytest.raises(UsageError, match="image-size 8: googlenet takes 15 at least"):
        new("googlenet", weights=str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    "settings", [{"dropout": 1.0}, {"image_size": 8}, {"hidden": -1}, {"frozen": True, "backbone": "cnn"}]
)
def test_a_config_refuses_nonsense_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(settings)).replace('_', '-')}"):
        ModelConfig(**settings)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "m.pt", "m.bin"])
def test_a_weights_file_is_loaded_and_its_hash_kept(tmp_path: Path, name: str) -> None:
    path = save_mobilenet(tmp_path / name)
    model, weights = build(ModelConfig(backbone="mobilenet_v2", weights=path), 3, seed=1)
    expected = new("mobilenet_v2", seed=7)
    assert first_layer(model) == first_layer(expected)
    assert weights.source == path
    assert weights.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_folder_of_weights_serves_each_backbone_by_name(tmp_path: Path) -> None:
    save_mobilenet(tmp_path / "mobilenet_v2.safetensors")
    network = timm.create_model("mobilenetv3_small_050")
    save_file(network.state_dict(), tmp_path / "mobilenetv3_small_050.safetensors")
    assert first_layer(from_file(str(tmp_path))) == first_layer(new("mobilenet_v2", seed=7))
    found = new("timm/mobilenetv3_small_050", weights=f"{tmp_path}/", image_size=64)
    assert first_layer(found) == next(network.parameters()).tolist()


def test_a_head_in_the_file_is_not_needed_and_not_used(tmp_path: Path) -> None:
    def drop_head(state: dict[str, torch.Tensor]) -> None:
        del state["classifier.1.weight"], state["classifier.1.bias"]

    def narrow_head(state: dict[str, torch.Tensor]) -> None:
        state |= {"classifier.1.weight": torch.zeros(7, 1280), "classifier.1.bias": torch.zeros(7)}

    whole, *others = (
        from_file(save_mobilenet(tmp_path / f"{change.__name__}.safetensors", change))
        for change in (dict, drop_head, narrow_head)
    )
    for other in others:
        assert state_hash(whole.state_dict()) == state_hash(other.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("features.1.conv.1.weight"),
        lambda state: state.update(extra=torch.zeros(1)),
        lambda state: state.update({"features.0.0.weight": torch.zeros(8, 3, 3, 3)}),
        lambda state: state.clear(),
    ],
    ids=["one missing", "one too many", "another shape", "nothing"],
)
def test_weights_of_another_network_are_rejected(tmp_path: Path, change: Any) -> None:
    path = save_mobilenet(tmp_path / "m.safetensors", change)
    with pytest.raises(ModelRejectedError, match=r"m\.safetensors.*another network"):
        from_file(path)


class _Payload:
    """What a hostile pickle does: it leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_hostile_pickle_is_rejected_and_never_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"features.0.0.weight": _Payload(tmp_path / "mark")}, protocol=2))
    torch.save({"features.0.0.weight": _Payload(tmp_path / "mark")}, tmp_path / f"zipped-{name}")
    for path in (tmp_path / name, tmp_path / f"zipped-{name}"):
        with pytest.raises(ModelRejectedError, match="not a file of weights"):
            from_file(str(path))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\xff" * 64])
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_file_of_something_else_is_rejected(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelRejectedError, match="not a file of weights"):
        from_file(str(tmp_path / name))


@pytest.mark.parametrize("checkpoint", [{"epoch": 3}, {"state_dict": {}}, [1, 2], {4: "x"}])
def test_a_checkpoint_of_more_than_tensors_is_rejected(tmp_path: Path, checkpoint: Any) -> None:
    torch.save(checkpoint, tmp_path / "m.pth")
    with pytest.raises(ModelRejectedError, match="not a file of weights"):
        from_file(str(tmp_path / "m.pth"))


@pytest.mark.parametrize("path", ["no.safetensors", "no/such/folder"])
def test_missing_weights_name_the_three_choices(tmp_path: Path, path: str) -> None:
    with pytest.raises(WeightsError) as caught:
        from_file(str(tmp_path / path))
    assert "does not exist" in str(caught.value)
    for choice in ("--weights imagenet", "--weights none", "--weights PATH_OR_URI"):
        assert choice in str(caught.value)


def test_a_json_file_beside_the_weights_corrects_the_preprocessing(tmp_path: Path) -> None:
    path = save_mobilenet(tmp_path / "m.safetensors")
    before = new("mobilenet_v2", weights=path).preprocessing
    (tmp_path / "m.json").write_text(json.dumps({"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 192}))
    after = new("mobilenet_v2", weights=path).preprocessing
    half = (0.5, 0.5, 0.5)
    assert after == Preprocessing(size=192, crop=before.crop, interpolation=before.interpolation, mean=half, std=half)


@pytest.mark.parametrize("text", ["", "[1]", "3", '{"size": 0}', '{"size": "big"}', '{"colour": 1}', '{"std": [1]}'])
def test_a_json_file_that_is_no_preprocessing_is_rejected(tmp_path: Path, text: str) -> None:
    path = save_mobilenet(tmp_path / "m.safetensors")
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ModelRejectedError, match=r"m\.json"):
        from_file(path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("backbone", ["mobilenet_v2", TIMM])
def test_a_failed_download_ends_soon_and_names_the_three_choices(backbone: str) -> None:
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"the download failed.*imagenet.*none.*PATH_OR_URI"):
        new(backbone, weights="imagenet")
    assert time.monotonic() - start < 15


@pytest.mark.usefixtures("no_network")
def test_torchvisions_cached_download_needs_no_network(tmp_path: Path) -> None:
    url = torchvision.models.MobileNet_V2_Weights.DEFAULT.url
    save_mobilenet(tmp_path / "torch/hub/checkpoints" / url.rpartition("/")[2])
    model, weights = build(ModelConfig(backbone="mobilenet_v2"), 3)
    assert first_layer(model) == first_layer(new("mobilenet_v2", seed=7))
    assert weights.source == url
    assert weights.sha256


@pytest.mark.usefixtures("no_network")
def test_timms_cached_download_needs_no_network(tmp_path: Path) -> None:
    name = "mobilenetv3_small_050"
    repo = tmp_path / "hub" / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    (repo / "snapshots/abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    network = timm.create_model(name)
    save_file(network.state_dict(), repo / "snapshots/abc/model.safetensors")
    model, weights = build(ModelConfig(backbone=f"timm/{name}"), 3)
    assert first_layer(model) == next(network.parameters()).tolist()
    assert weights.sha256 == state_hash(network.state_dict())


@pytest.mark.parametrize("backbone", ["mobilenet_v2", TIMM])
def test_real_weights_load_and_tell_photos_apart(shared_weights: Path, backbone: str) -> None:
    model, weights = build(ModelConfig(backbone=backbone, weights=str(shared_weights), image_size=96), 3)
    file = shared_weights / f"{backbone.removeprefix('timm/')}.safetensors"
    assert weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    loaded, trunk = load_file(file), model.trunk.state_dict()
    for name, tensor in trunk.items():
        assert torch.equal(tensor, loaded[name].reshape(tensor.shape)), name
    with torch.inference_mode():
        embeddings = model.eval().embed(photos(96))
    assert embeddings.shape == (4, 1280)
    assert embeddings.isfinite().all()
    assert torch.nn.functional.cosine_similarity(embeddings[:1], embeddings[1:]).max() < 0.999


def test_a_worker_whose_gpu_cannot_be_used_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(gpu=True) == reserved_device(gpu=False) == torch.device("cpu")
    with pytest.raises(UsageError, match="sees no GPU"):
        reserved_device(gpu=True)


def test_a_network_of_timm_without_a_head_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.ResNet, "reset_classifier")
    with pytest.raises(UsageError, match="--backbone timm/resnet18: is no classifier"):
        new("timm/resnet18")
