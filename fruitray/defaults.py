"""What a job's options start from, before those that are given: a file, a preset of `tune`, a recipe of `train`."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tyro

from fruitray import config as configs
from fruitray.errors import UsageError

KEPT = ("config", "index_sha256")
"""What a job keeps among its options that is none to start another from."""


def from_file(kind: type[Any], argv: Sequence[str]) -> list[str]:
    """The options in the JSON or YAML file that `--config` names, as arguments that later ones win over.

    Raises:
        UsageError: it holds no options.
        StorageError: it is not to be had.
    """
    path = given(argv, "--config")
    if path is None or "config" not in {field.name for field in dataclasses.fields(kind)}:
        return []
    import yaml  # on use, as storage: `--help` needs neither

    from fruitray.storage import open_file, require_answer

    storage, key = open_file(path)
    require_answer(storage)
    data = storage.read(key)
    try:
        try:
            said = json.loads(data)  # not each JSON is YAML: tabs, letters beyond 16 bits
        except ValueError:
            said = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeError) as error:
        raise UsageError(f"--config {path}: holds no options ({type(error).__name__})") from error
    if not isinstance(said, dict):
        raise UsageError(f"--config {path}: holds no options, each a name and a value")
    return list(itertools.chain.from_iterable(_arguments(said)))


def _arguments(options: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, value in options.items():
        option = str(name).replace("_", "-")
        if name in KEPT:
            continue
        if isinstance(value, dict):  # a group, as `fit`
            yield from _arguments(value)
        elif isinstance(value, bool):
            yield [f"--{option}" if value else f"--no-{option}"]
        elif isinstance(value, list):
            yield [f"--{option}", *map(str, value)]
        else:
            yield [f"--{option}={value}"]


def default_of(job: str, argv: Sequence[str]) -> Any:
    """The config that `tyro` fills in from the arguments; None: the usual one."""
    return {"train": _of_recipe, "tune": _of_preset}.get(job, lambda _: None)(argv)


def _of_preset(argv: Sequence[str]) -> Any:
    """What `tune --preset NAME` starts from, None where it is not to be had."""
    from fruitray.search import PRESETS

    name = given(argv, "--preset")
    if name not in PRESETS:
        return None
    options: dict[str, Any] = {"preset": name, **PRESETS[name]}
    for one, several in (("--batch-size", "batch_sizes"), ("--learning-rate", "learning_rates")):
        if given(argv, one) is not None:  # which would else have no say
            options.pop(several, None)
    return configs.TuneConfig(index=tyro.MISSING, out=tyro.MISSING, **options)


def _of_recipe(argv: Sequence[str]) -> Any:
    """What `train` starts from, named or suited to what is trained."""
    asked = next((name for name in configs.RECIPES if name == given(argv, "--recipe")), None)
    frozen = next((word for word in reversed(argv) if word in ("--frozen", "--no-frozen")), "") == "--frozen"
    fit = configs.RECIPES[asked or ("head" if frozen else "whole")]
    return configs.TrainConfig(index=tyro.MISSING, out=tyro.MISSING, recipe=asked or "suited", fit=fit)


def given(argv: Sequence[str], option: str) -> str | None:
    """The value of `option` among the arguments, the last one's where there are several."""
    value = None
    for word, following in itertools.zip_longest(argv, argv[1:]):
        name, separator, joined = word.partition("=")
        if name.replace("_", "-") == option:
            value = joined if separator else following
    return value
