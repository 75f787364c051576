"""What is told of trials that Ray Tune ran."""

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial

from fruitray.cluster import tune
from fruitray.cluster.tune import _embed
from fruitray.cluster.watch import copy_state, end_of, mend_state
from fruitray.config import TuneConfig
from fruitray.errors import GpuFullError
from fruitray.storage import open_storage


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
    out, newest = open_storage(str(tmp_path)), "_ray/tune/experiment_state-2026-11-28_08-00-00.json"
    assert not mend_state(out)
    out.write("_ray/tune/experiment_state-2026-11-27_09-00-00.json", b'{"trials": "of an earlier driver"}')
    for state in (b'{"trials": 1}', b'{"trials": 1', b""):
        out.write(newest, state)
        copy_state(out)
        assert mend_state(out)
        assert out.read(newest) == b'{"trials": 1}'


@pytest.mark.parametrize("others", [("mobilenet_v2",), ("cnn",)])
def test_a_backbone_that_cannot_be_embedded_leaves_the_others_to_go_on(
    others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(index_uri: str, index: Any, package: str, *_: Any, **__: Any) -> None:
        if package == "large":
            raise GpuFullError

    monkeypatch.setattr(tune, "ensure_features", embed)
    initial: Any = {"resnet50": "large", "mobilenet_v2": "small"}
    had = {name: initial[name] for name in ("resnet50", *others) if name in initial}
    config = TuneConfig(index="index", out="out", backbones=("resnet50", *others))
    index: Any = None
    assert _embed(config, index, had) == {"resnet50": str(GpuFullError())}
    with pytest.raises(GpuFullError):
        _embed(TuneConfig(index="index", out="out", backbones=("resnet50",)), index, {"resnet50": initial["resnet50"]})
