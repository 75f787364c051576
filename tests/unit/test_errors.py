"""Behaviour of the errors: one sentence each, the documented exit code, and safe passage between processes."""

import copy
import pickle

import cloudpickle
import pytest

from fruitray import errors
from fruitray.errors import FruitrayError, ImageError

URI = "s3://fruit/run"

# error, exit code, what its sentence must name
ERRORS = [
    (errors.UsageError("--seed -1: must not be negative"), 2, ["--seed", "-1", "must not"]),
    (errors.NoInputError(URI), 3, [URI]),
    (errors.TooManyBadImagesError(URI, 7, 20, 0.005), 4, [URI, "7 of 20", "0.5%"]),
    (errors.OutputConflictError(URI, "belongs to another plan"), 5, [URI, "belongs to another plan"]),
    (errors.LeakError(URI, "2 duplicates stand in two splits"), 5, [URI, "2 duplicates stand in two splits"]),
    (errors.StorageError(URI, "the store answers Teapot"), 6, [URI, "Teapot"]),
    (errors.NotFoundError(URI, "there is no such bucket"), 6, [URI, "no such bucket"]),
    (errors.AccessDeniedError(URI, "access denied"), 6, [URI, "access denied"]),
    (errors.CredentialsError(URI, "the secret key is wrong"), 6, [URI, "secret key"]),
    (errors.ArchivedError(URI, "lies in an archive tier"), 6, [URI, "archive"]),
    (errors.ChangedError(URI, "changed since it was listed"), 6, [URI, "changed"]),
    (errors.EndpointError(URI, "no answer from http://127.0.0.1:1"), 6, [URI, "http://127.0.0.1:1"]),
    (errors.WeightsError("resnet50", "the network is down"), 6, ["resnet50", "the network is down", "--weights"]),
    (errors.DivergedError(3, float("nan")), 1, ["nan", "epoch 3"]),
    (errors.GpuFullError(), 1, ["memory", "--image-size"]),
    (errors.TrialsFailedError(URI, "the loss became nan"), 1, [URI, "the loss became nan"]),
    (errors.ModelRejectedError(URI, "its hash is wrong"), 7, [URI, "its hash is wrong"]),
    (errors.ExportError(URI, "its shares differ by 0.2"), 7, [URI, "differ by 0.2"]),
    (errors.TryAgainError(URI, "the store answers SlowDown"), 75, [URI, "SlowDown"]),
    (ImageError("E_EMPTY", "the file has no bytes"), 1, ["E_EMPTY", "the file has no bytes"]),
]
each_error = pytest.mark.parametrize(("error", "exit_code", "named"), ERRORS, ids=lambda value: type(value).__name__)


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__() if child.__module__ == errors.__name__))


def test_every_error_is_tested_here() -> None:
    assert {type(error) for error, _, _ in ERRORS} == subclasses(FruitrayError) - {FruitrayError}


@each_error
def test_an_error_is_one_sentence_that_names_its_fields(error: FruitrayError, exit_code: int, named: list[str]) -> None:
    sentence = str(error)
    assert [part for part in named if part not in sentence] == []
    assert "\n" not in sentence
    assert not sentence.endswith(".")
    assert error.exit_code == exit_code


@each_error
@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_an_error_crosses_processes_whole(pickler: object, error: FruitrayError, exit_code: int, named: object) -> None:
    error = copy.copy(error)
    error.args = ("words that a library on the way adds",)
    arrived = pickle.loads(pickler.dumps(error))  # type: ignore[attr-defined]
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.exit_code) == (str(error), exit_code)
    assert repr(vars(arrived)) == repr(vars(error))  # repr, for NaN differs from itself


@pytest.mark.parametrize(("rate", "said"), [(0.1, "10%"), (0.005, "0.5%"), (0.07, "7%"), (0.0, "0%")])
def test_the_allowed_share_of_errors_is_said_exactly(rate: float, said: str) -> None:
    assert str(errors.TooManyBadImagesError(URI, 1, 2, rate)).endswith(f"more than the {said} allowed")


def test_a_job_can_catch_all_refusals_of_storage_at_once() -> None:
    refusals = {type(error) for error, _, _ in ERRORS if isinstance(error, errors.StorageError)}
    assert refusals == {
        errors.StorageError,
        errors.NotFoundError,
        errors.AccessDeniedError,
        errors.CredentialsError,
        errors.ArchivedError,
        errors.ChangedError,
        errors.EndpointError,
    }  # and not TryAgainError, which asks for patience, not for a fix
    assert issubclass(errors.CredentialsError, errors.AccessDeniedError)


def test_an_error_in_the_making_of_a_ray_actor_is_found() -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed")
    ours = errors.TryAgainError(URI, "answers 503")
    died = exceptions.ActorDiedError.from_task_error(exceptions.RayTaskError("__init__", "Traceback", ours))
    assert str(errors.find_ours(died)) == str(ours)


def test_each_workers_failure_is_looked_into() -> None:
    failures = pytest.importorskip("ray.train", reason="Ray is not installed").WorkerGroupError(
        "lost", {0: ConnectionError("the other one is gone"), 1: errors.TryAgainError(URI, "answers 503")}
    )
    assert isinstance(errors.find_ours(failures), errors.TryAgainError)
    assert errors.find(failures, KeyError) is None


def test_the_death_of_a_worker_is_found() -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed")
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    dead = WorkerHealthCheckFailedError("does not answer", exceptions.ActorDiedError())
    assert errors.find(dead, exceptions.RayActorError)
