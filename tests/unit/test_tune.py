"""What is told of trials that Ray Tune ran."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train._internal.storage import StorageContext
from ray.tune.execution.experiment_state import _find_newest_experiment_checkpoint
from ray.tune.experiment import Trial

from fruitray.cluster import tune
from fruitray.cluster.tune import _embed, _groups, _initial_models, _optuna
from fruitray.cluster.watch import copy_state, end_of, mend_state
from fruitray.config import FitConfig, TuneConfig
from fruitray.errors import FruitrayError, GpuFullError, TryAgainError, UsageError, WeightsError
from fruitray.index import read_index, write_index
from fruitray.storage import open_storage
from fruitray.trials import verdict
from tests.unit.runs import TRAIN, VAL, write_photos_and_index


@pytest.mark.parametrize("folds", [0, 2])
def test_the_verdict_counts_the_duplicates_of_an_index_once(tmp_path: Path, folds: int) -> None:
    uri = write_photos_and_index(tmp_path)
    table = read_index(uri).table
    bursts = table.set_column(table.column_names.index("group"), "group", table["split"])
    write_index(open_storage(uri), bursts, "/p")
    groups = _groups(read_index(uri), TuneConfig(index="i", out="o", folds=folds))
    assert len(groups) == (TRAIN + VAL if folds else VAL)
    names = dict.fromkeys(("error", "backbone", "part"), "") | {"accuracy": 0.5, "groups": groups}
    rows = [names | {"trial": number, "right": [number == 0] * len(groups)} for number in range(2)]
    assert verdict(rows).endswith(f"p = {0.5 if folds else 1}, duplicates counted once")


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A trial that failed, as Tune keeps it here and, in a whole copy, in its storage."""
    monkeypatch.setattr("ray.train._internal.storage._get_ray_train_session_dir", lambda: str(tmp_path / "session"))
    storage = StorageContext(str(tmp_path / "storage"), "tune")
    trial = Trial("run_trial", stub=True, storage=storage, trial_id="1")
    trial.init_local_path()
    trial.handle_error(RayActorError(error_msg="its node was short of memory"))
    copy = Path(trial.storage.trial_fs_path)
    copy.mkdir(parents=True)
    for name in (trial.pickled_error_file, trial.error_file):
        (copy / Path(name).name).write_bytes(Path(name).read_bytes())
    return trial


def _copy(trial: Trial) -> Path:
    return Path(trial.storage.trial_fs_path, Path(trial.pickled_error_file).name)


def test_why_a_trial_failed_is_known_though_the_copy_in_the_storage_is_cut(failed: Trial) -> None:
    _copy(failed).write_bytes(b"")
    assert end_of(failed) == "its node was short of memory"


@pytest.mark.parametrize("cut", [False, True])
def test_why_a_trial_failed_is_known_where_another_machine_ran_the_search(failed: Trial, cut: bool) -> None:
    Path(failed.pickled_error_file).unlink()
    if cut:
        _copy(failed).write_bytes(_copy(failed).read_bytes()[:20])
    assert end_of(failed) == "its node was short of memory"


def test_what_tune_knows_of_its_trials_is_found_again_where_a_kill_cut_it(tmp_path: Path) -> None:
    out, begun = open_storage(str(tmp_path)), "2026-11-28_08-00-00"
    assert not mend_state(out)
    out.write("_ray/tune/experiment_state-2026-11-27_09-00-00.json", b'{"trials": "of an earlier driver"}')
    whole, drawn = b'{"trials": 1}', pickle.dumps("what draws them")
    for state, draws in ((whole, drawn), (whole[:-1], drawn), (b"", drawn), (whole, drawn[:-1]), (whole, b"")):
        out.write(f"_ray/tune/experiment_state-{begun}.json", state)
        out.write(f"_ray/tune/basic-variant-state-{begun}.json", draws)
        copy_state(out)
        assert mend_state(out)
        assert _kept(tmp_path) == {"experiment_state-0.json": whole, "basic-variant-state-0.json": drawn}


def test_the_last_of_what_tune_knows_of_its_trials_is_gone_on_from_whatever_the_clock_said(tmp_path: Path) -> None:
    out = open_storage(str(tmp_path))
    for hour, state in (("02-30", b'{"trials": 1}'), ("02-10", b'{"trials": 2}'), ("02-20", b'{"trials": 3}')):
        out.write(f"_ray/tune/experiment_state-2026-10-25_{hour}-00.json", state)
        copy_state(out)
        assert mend_state(out)
        newest = _find_newest_experiment_checkpoint(str(tmp_path / "_ray/tune"))
        assert newest is not None
        assert Path(newest).read_bytes() == state


def _kept(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "_ray/tune").iterdir()}


@pytest.mark.parametrize("others", [("mobilenet_v2",), ("cnn",)])
def test_a_backbone_that_cannot_be_embedded_leaves_the_others_to_go_on(
    others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(index_uri: str, index: Any, package: str, *_: Any, **__: Any) -> None:
        if package == "large":
            raise RayTaskError("embed", "its stack, in many lines", GpuFullError()).as_instanceof_cause()

    monkeypatch.setattr(tune, "ensure_features", embed)
    initial: Any = {"resnet50": "large", "mobilenet_v2": "small"}
    had = {name: initial[name] for name in ("resnet50", *others) if name in initial}
    config = TuneConfig(index="index", out="out", backbones=("resnet50", *others))
    index: Any = None
    assert _embed(config, index, had) == {"resnet50": str(GpuFullError())}
    with pytest.raises(GpuFullError):
        _embed(TuneConfig(index="index", out="out", backbones=("resnet50",)), index, {"resnet50": initial["resnet50"]})


@pytest.mark.parametrize("error", [TryAgainError("s3://bucket", "is slow"), UsageError("--backbone vgg61: no such")])
def test_a_search_is_not_begun_without_a_backbone_for_what_passes_or_is_a_slip(
    error: FruitrayError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(out: Any, config: Any, *_: Any) -> Any:
        raise error if config.backbone == "vgg61" else WeightsError(config.backbone, "are not to be had")

    monkeypatch.setattr(tune, "initial_model", build)
    index: Any = SimpleNamespace(classes=["a", "b"])
    config = TuneConfig(index="index", out="out", backbones=("resnet50", "vgg61"))
    with pytest.raises(type(error)):
        _initial_models(config, open_storage(str(tmp_path)), index)


def test_all_that_optuna_may_try_is_looked_at_before_it_tries_it(tmp_path: Path) -> None:
    fit = FitConfig(accumulate=8, batch_size=16, seed=-1)
    config = TuneConfig(index="i", out="o", search="optuna", backbones=("cnn",), batch_sizes=(16, 4), fit=fit)
    index: Any = SimpleNamespace(classes=["a", "b"])
    with pytest.raises(UsageError, match="--accumulate 8"):
        _initial_models(config, open_storage(str(tmp_path)), index)
    assert _optuna(config)  # with such a seed, too
