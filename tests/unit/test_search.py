"""Which trials a search draws."""

from collections import Counter

from fruitray.config import TuneConfig
from fruitray.search import draw_trials


def _config(**changes: object) -> TuneConfig:
    return TuneConfig(**{"index": "i", "out": "o", "trials": 9, **changes})  # type: ignore[arg-type]


def test_equal_configs_draw_equal_trials_and_another_seed_others() -> None:
    assert draw_trials(_config()) == draw_trials(_config())
    assert draw_trials(_config()) != draw_trials(_config(seed=1))


def test_each_backbone_gets_its_share() -> None:
    trials = draw_trials(_config(backbones=("cnn", "vgg16", "timm/x")))
    assert Counter(model.backbone for model, _ in trials) == {"cnn": 3, "vgg16": 3, "timm/x": 3}


def test_only_pretrained_backbones_are_frozen() -> None:
    space = {"backbones": ("mlp", "cnn", "resnet50"), "frozen_choices": (True,)}
    frozen = {model.backbone for model, _ in draw_trials(_config(**space)) if model.frozen}
    assert frozen == {"resnet50"}
    assert not any(model.frozen for model, _ in draw_trials(_config(weights="none", **space)))


def test_draws_stay_within_the_space() -> None:
    space = {"learning_rates": (1e-3, 2e-3), "batch_sizes": (8, 64), "dropouts": (0.1,), "trials": 50}
    trials = draw_trials(_config(**space))
    assert all(1e-3 <= fit.learning_rate <= 2e-3 for _, fit in trials)
    assert {fit.batch_size for _, fit in trials} == {8, 64}
    assert {model.dropout for model, _ in trials} == {0.1}
