"""The search space: which trials `tune` runs. Plain and deterministic; scheduling them is `cluster/tune.py`'s."""

import math
import random

from fruitray.config import SCRATCH, FitConfig, ModelConfig, TuneConfig


def draw_trials(config: TuneConfig) -> list[tuple[ModelConfig, FitConfig]]:
    """`config.trials` draws, the backbones in turn so that each gets its share; equal configs draw equal trials."""
    random_ = random.Random(config.seed)
    return [_draw(config, config.backbones[number % len(config.backbones)], random_) for number in range(config.trials)]


def _draw(config: TuneConfig, backbone: str, random_: random.Random) -> tuple[ModelConfig, FitConfig]:
    low, high = (math.log10(rate) for rate in config.learning_rates)
    learning_rate = float(f"{10 ** random_.uniform(low, high):.3g}")
    batch_size, dropout = random_.choice(config.batch_sizes), random_.choice(config.dropouts)
    frozen = random_.choice(config.frozen_choices)
    pretrained = backbone not in SCRATCH and config.weights != "none"
    model = ModelConfig(
        backbone=backbone,
        weights=config.weights if pretrained else "none",
        frozen=frozen and pretrained,
        dropout=dropout,
        image_size=config.image_size,
    )
    fit = FitConfig(
        epochs=config.epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=config.patience,
        augment=config.augment,
        seed=config.seed,
    )
    return model, fit
