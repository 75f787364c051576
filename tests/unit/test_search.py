"""Which trials a search runs."""

from collections import Counter
from dataclasses import replace

import pytest

from fruitray.cli import parse
from fruitray.config import FitConfig, TuneConfig
from fruitray.errors import UsageError
from fruitray.search import Network, Trial, Walk, draw_trials, networks, settings


def _config(**changes: object) -> TuneConfig:
    return TuneConfig(**{"index": "i", "out": "o", "trials": 9, **changes})  # type: ignore[arg-type]


def _preset(name: str, *options: str) -> TuneConfig:
    config: TuneConfig = parse("tune", ["--index", "i", "--out", "o", "--preset", name, *options])
    return config


def _point(trial: Trial) -> tuple[object, ...]:
    model, fit = trial.model, trial.fit
    return model.backbone, model.frozen, fit.learning_rate, fit.batch_size, model.dropout


def test_equal_configs_draw_equal_trials_and_another_seed_others() -> None:
    assert draw_trials(_config()) == draw_trials(_config())
    assert draw_trials(_config()) != draw_trials(_config(fit=FitConfig(seed=1)))


def test_each_network_gets_its_share() -> None:
    config = _config(backbones=("cnn", "vgg16", "timm/x"), frozen_choices=(True, False), trials=10)
    drawn = Counter((trial.model.backbone, trial.model.frozen) for trial in draw_trials(config))
    whole = {("cnn", False): 2, ("vgg16", False): 2, ("timm/x", False): 2}
    assert drawn == whole | {("vgg16", True): 2, ("timm/x", True): 2}


def test_only_pretrained_backbones_are_frozen() -> None:
    space = {"backbones": ("mlp", "cnn", "cnn_bn", "resnet50"), "frozen_choices": (True,)}
    assert [network.backbone for network in networks(_config(**space)) if network.frozen] == ["resnet50"]
    assert not any(network.frozen for network in networks(_config(weights="none", **space)))


def test_no_trial_is_drawn_twice() -> None:
    config = _config(backbones=("cnn", "vgg16"), fit=FitConfig(learning_rate=0.1), dropouts=(0.0, 0.5), trials=50)
    points = Counter(map(_point, draw_trials(config)))
    assert len(points) == 4
    assert set(points.values()) == {1}


def test_draws_stay_within_the_space() -> None:
    space = {"learning_rates": (1e-3, 2e-3), "batch_sizes": (8, 64), "dropouts": (0.1,), "trials": 50}
    trials = draw_trials(_config(**space))
    assert all(1e-3 <= trial.fit.learning_rate <= 2e-3 for trial in trials)
    assert {trial.fit.batch_size for trial in trials} == {8, 64}
    assert {trial.model.dropout for trial in trials} == {0.1}


def test_a_single_learning_rate_is_taken_as_it_is() -> None:
    assert {trial.fit.learning_rate for trial in draw_trials(_config(learning_rates=(0.0012345,)))} == {0.0012345}


def test_every_network_has_learning_rates_that_suit_it_unless_some_are_given() -> None:
    config = _config(backbones=("cnn", "cnn_bn", "vgg16"), frozen_choices=(True, False), trials=40)
    rates: dict[tuple[str, bool], list[float]] = {}
    for trial in draw_trials(config):
        rates.setdefault((trial.model.backbone, trial.model.frozen), []).append(trial.fit.learning_rate or 0)
    assert all(max(found) <= 9.01 * min(found) for found in rates.values())
    assert max(rates["cnn", False]) < max(rates["cnn_bn", False])
    given = replace(config, fit=FitConfig(learning_rate=0.02))
    assert {trial.fit.learning_rate for trial in draw_trials(given)} == {0.02}


def test_only_a_pretrained_whole_network_trains_its_head_first() -> None:
    config = _config(
        backbones=("cnn_bn", "vgg16"), frozen_choices=(True, False), fit=FitConfig(head_epochs=2), trials=6
    )
    found = {(trial.model.backbone, trial.model.frozen): trial.fit.head_epochs for trial in draw_trials(config)}
    assert found == {("cnn_bn", False): 0, ("vgg16", True): 0, ("vgg16", False): 2}


@pytest.mark.parametrize("backbones", [("cnn_bn", "mlp"), ("cnn",), ("vgg16",)])
def test_one_size_networks_have_no_smaller_training_photos(backbones: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="train-size 64: "):
        draw_trials(_config(backbones=backbones, fit=FitConfig(train_size=64)))


def test_a_grid_is_every_combination_once() -> None:
    config = _config(
        search="grid",
        backbones=("cnn", "resnet50"),
        learning_rates=(1e-3, 1e-4),
        batch_sizes=(8, 16, 32),
        dropouts=(0, 1e-1),
    )
    points = [_point(trial) for trial in draw_trials(config)]
    assert len(points) == len(set(points)) == 2 * 2 * 3 * 2


def test_a_sweep_varies_one_list_at_a_time_from_the_first_of_each() -> None:
    config = _config(
        search="sweep",
        backbones=("cnn", "resnet50"),
        learning_rates=(1e-3, 1e-4),
        batch_sizes=(8, 16, 32),
        dropouts=(0, 0.5),
    )
    base, *others = draw_trials(config)
    assert _point(base) == ("cnn", False, 1e-3, 8, 0)
    assert [(trial.axis, *_point(trial)) for trial in others] == [
        ("dropout", "cnn", False, 1e-3, 8, 0.5),
        ("learning rate", "cnn", False, 1e-4, 8, 0),
        ("batch size", "cnn", False, 1e-3, 16, 0),
        ("batch size", "cnn", False, 1e-3, 32, 0),
        ("network", "resnet50", True, 1e-3, 8, 0),
    ]


def test_the_reports_preset_is_its_sweeps_and_its_comparison() -> None:
    """Batch sizes 8, 64 and 256; learning rates 1e-5 to 1e-2; dropout on and off; five backbones, frozen and whole."""
    trials = draw_trials(_preset("report"))
    swept = [trial for trial in trials if trial.axis != "network"]
    assert {trial.model.backbone for trial in swept} == {"cnn"}
    assert {trial.fit.batch_size for trial in swept} == {8, 64, 256}
    assert {trial.fit.learning_rate for trial in swept} == {1e-5, 1e-4, 1e-3, 1e-2}
    assert {bool(trial.model.dropout) for trial in swept} == {True, False}
    assert {trial.model.dropout for trial in trials if trial.axis == "network"} == {None}, "the backbone's own"
    compared = [(trial.model.backbone, trial.model.frozen) for trial in trials if trial.axis == "network"]
    assert compared[0] == ("mlp", False)
    assert sorted(compared[1:]) == sorted(
        (name, frozen) for name in ("vgg16", "resnet50", "efficientnet_b2") for frozen in (True, False)
    )
    assert {(trial.fit.optimizer, trial.fit.schedule, trial.fit.augment) for trial in trials} == {
        ("adam", "constant", "eightfold")
    }


def test_options_win_over_the_preset() -> None:
    config = _preset("report", "--epochs", "2", "--backbones", "cnn", "mlp", "--batch-sizes", "4", "6")
    assert (config.fit.epochs, config.fit.optimizer, config.backbones) == (2, "adam", ("cnn", "mlp"))
    assert {trial.fit.batch_size for trial in draw_trials(config)} == {4, 6}


@pytest.mark.parametrize("name", ["quick", "full", "report"])
def test_every_preset_has_trials(name: str) -> None:
    assert len(draw_trials(_preset(name))) >= 8


def test_what_is_picked_is_named_for_its_network() -> None:
    """So that a search that learns does not mix up what suits one network with what suits another."""
    config = _config(batch_sizes=(8, 16), dropouts=(0.0,))
    met = []
    for network in (Network("vgg16", True), Network("vgg16", False)):
        walk = Walk([])
        settings(config, network, walk)
        met += [name for name, _ in walk.met]
    assert len(met) == len(set(met)) == 6
