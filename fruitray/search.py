"""The search space: which trials `tune` runs. Plain and deterministic; scheduling them is `cluster/tune.py`'s.

There is one space, `settings`; the searches differ in who picks: `Draws` at random, `Walk` along a path of choices,
Optuna (in `cluster/tune.py`) from what it has learned.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fruitray.config import RECIPES, SCRATCH, FitConfig, ModelConfig, TuneConfig, suited, suited_learning_rate

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {},
    "full": {
        "trials": 48,
        "backbones": ("cnn_bn", "mobilenet_v2", "resnet50", "vgg16", "efficientnet_b2"),
        "frozen_choices": (True, False),
        "batch_sizes": (16, 32, 64),
        "dropouts": (0.0, 0.2, 0.5),
        "fit": FitConfig(epochs=30, warmup=0.1, head_epochs=1, ema=0.99, patience=6),
    },
    "report": {
        "search": "sweep",
        "scheduler": "none",
        "backbones": ("cnn", "mlp", "vgg16", "resnet50", "efficientnet_b2"),
        "frozen_choices": (True, False),
        "hidden": 256,
        "learning_rates": (1e-4, 1e-5, 1e-3, 1e-2),
        "batch_sizes": (8, 64, 256),
        "dropouts": (0.5, 0.0),
        "fit": RECIPES["report"],
    },
}
"""What `tune --preset` starts from, where that is not the default."""
DRAWN = 20
"""How often a trial is drawn at most, for one that is not among those before."""


@dataclass(frozen=True, slots=True)
class Network:
    """What a trial trains."""

    backbone: str
    frozen: bool

    def __str__(self) -> str:
        return f"{self.backbone}{' frozen' * self.frozen}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the space. `axis` is the list that a sweep varies in it, "" in its base and in other searches."""

    model: ModelConfig
    fit: FitConfig
    axis: str = ""


class Picker(Protocol):
    """Chooses; the name says what, and for which network."""

    def one_of(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`."""

    def between(self, name: str, values: Sequence[float]) -> float:
        """A number between the least and the greatest of `values`, drawn log-uniformly, or one of them."""


def within(values: Sequence[float], drawn: float) -> float:
    """`drawn` in three digits, which leads out of `values` nowhere: of a single one it is that one."""
    return min(max(float(f"{drawn:.3g}"), min(values)), max(values))


def networks(config: TuneConfig) -> list[Network]:
    """What is compared: each backbone, frozen or whole where it is pretrained."""
    found = []
    for backbone in config.backbones:
        pretrained = backbone not in SCRATCH and config.weights != "none"
        found += [Network(backbone, frozen) for frozen in (config.frozen_choices if pretrained else (False,))]
    return found


def settings(config: TuneConfig, network: Network, picker: Picker) -> tuple[ModelConfig, FitConfig]:
    """The space: what can be picked for `network`."""
    scratch = network.backbone in SCRATCH
    model = ModelConfig(
        backbone=network.backbone,
        weights="none" if scratch else config.weights,
        frozen=network.frozen,
        hidden=None if scratch else config.hidden,
        dropout=picker.one_of(f"{network}: dropout", config.dropouts) if config.dropouts else None,
        image_size=config.image_size,
        crop=config.crop,
    )
    rate = picker.between(f"{network}: learning rate", _rates(config, model))
    sizes = config.batch_sizes or (config.fit.batch_size,)
    size = picker.one_of(f"{network}: batch size", sizes)
    return model, suited(model, replace(config.fit, learning_rate=rate, batch_size=size))


def _rates(config: TuneConfig, model: ModelConfig) -> tuple[float, ...]:
    if config.learning_rates:
        return config.learning_rates
    if config.fit.learning_rate:
        return (config.fit.learning_rate,)
    middle = suited_learning_rate(model, config.fit.optimizer)
    return middle, middle / 3, middle * 3


def draw_trials(config: TuneConfig) -> list[Trial]:
    """The trials of `random`, `grid` or `sweep`, no two of them equal; equal configs draw equal trials."""
    if config.search == "random":
        draws, compared = Draws(config.fit.seed), networks(config)
        found: dict[Trial, None] = {}
        for number in range(DRAWN * config.trials):
            found[Trial(*settings(config, compared[number % len(compared)], draws))] = None
            if len(found) == config.trials:
                break
        return list(found)
    return list(dict.fromkeys((_grid if config.search == "grid" else _sweep)(config)))


def _grid(config: TuneConfig) -> Iterator[Trial]:
    for network in networks(config):
        path: list[int] | None = []
        while path is not None:
            walk = Walk(path)
            yield Trial(*settings(config, network, walk))
            path = walk.next_path()


def _sweep(config: TuneConfig) -> Iterator[Trial]:
    first, *others = networks(config)
    base = Walk([])
    yield Trial(*settings(config, first, base))
    for place, (name, count) in enumerate(base.met):
        for choice in range(1, count):
            axis = name.rpartition(": ")[2]
            yield Trial(*settings(config, first, Walk([0] * place + [choice])), axis)
    if config.preset == "report":
        config = replace(config, dropouts=())  # there each has its own
    for network in others:
        yield Trial(*settings(config, network, Walk([])), "network")


class Draws:
    """Picks at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one_of(self, name: str, choices: Sequence[Any]) -> Any:
        return self._random.choice(choices)

    def between(self, name: str, values: Sequence[float]) -> float:
        low, high = math.log10(min(values)), math.log10(max(values))
        return within(values, 10 ** self._random.uniform(low, high))


class Walk:
    """Picks the choices that a path numbers, then the first of each list; remembers which lists it met."""

    def __init__(self, path: Sequence[int]) -> None:
        self._path = path
        self.met: list[tuple[str, int]] = []
        """(name, how many choices)"""

    def one_of(self, name: str, choices: Sequence[Any]) -> Any:
        self.met.append((name, len(choices)))
        return choices[self._choice(len(self.met) - 1)]

    def between(self, name: str, values: Sequence[float]) -> float:
        picked: float = self.one_of(name, values)
        return picked

    def _choice(self, place: int) -> int:
        return self._path[place] if place < len(self._path) else 0

    def next_path(self) -> list[int] | None:
        """The path of the next combination, in the order of an odometer; None after the last."""
        taken = [self._choice(place) for place in range(len(self.met))]
        while taken and taken[-1] == self.met[len(taken) - 1][1] - 1:
            taken.pop()
        return [*taken[:-1], taken[-1] + 1] if taken else None
