"""Every error fruitray raises on purpose: one sentence each, with its fields, and able to cross processes.

FruitrayError                  exit code
├── UsageError                 2   the request makes no sense
├── NoInputError               3   nothing to work on
├── TooManyBadImagesError      4   rows are written, but too many are errors
├── OutputConflictError        5   the output belongs to something else, or is not what it claims to be
│   └── LeakError                  copies of one photo stand in two splits
├── StorageError               6   storage says no
│   ├── NotFoundError
│   ├── AccessDeniedError
│   │   └── CredentialsError       the keys are at fault, so every object is refused
│   ├── ArchivedError
│   ├── ChangedError               the object is not the one that was listed
│   └── EndpointError
├── WeightsError               6   pretrained weights cannot be had
├── DivergedError              1   training blew up
├── GpuFullError               1   a network wants more memory than a GPU has
├── TrialsFailedError          1   not one trial came to a result
├── ModelRejectedError         7   a model package or a weights file is broken or does not fit
│   └── ExportError                a model cannot be exported, or its export answers otherwise
├── TryAgainError              75  a passing fault; give the same command again
└── ImageError                 -   a photo that cannot be used: becomes a row, never ends a job
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, TypeVar


@dataclass(eq=False)
class FruitrayError(Exception):
    """Base of all. Subclasses are dataclasses whose fields make the sentence."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), self._values()  # not by `args`, to which Ray Data adds words of its own

    def __str__(self) -> str:
        return ": ".join(str(value) for value in self._values() if value)

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(eq=False)
class UsageError(FruitrayError):
    """The request makes no sense; `message` names field, value and rule."""

    message: str
    exit_code: ClassVar[int] = 2


@dataclass(eq=False)
class NoInputError(FruitrayError):
    """There is no photo below `uri`, or nothing else of what a job needs."""

    uri: str
    reason: str = "holds no files to read"
    exit_code: ClassVar[int] = 3

    def __str__(self) -> str:
        return f"{self.uri} {self.reason}"


@dataclass(eq=False)
class TooManyBadImagesError(FruitrayError):
    """The rows are written, but `errors` of `rows` are errors, more than `max_error_rate` allows."""

    uri: str
    errors: int
    rows: int
    max_error_rate: float
    exit_code: ClassVar[int] = 4

    def __str__(self) -> str:
        if self.errors == self.rows:
            return f"all {self.rows} rows in {self.uri} are errors"
        allowed = f"{100 * self.max_error_rate:g}%"
        return f"{self.errors} of {self.rows} rows in {self.uri} are errors, more than the {allowed} allowed"


@dataclass(eq=False)
class OutputConflictError(FruitrayError):
    """`uri` holds the output of something else, or is not what its manifest says."""

    uri: str
    reason: str
    exit_code: ClassVar[int] = 5


class LeakError(OutputConflictError):
    """The index at `uri` has copies, or near duplicates, of a photo in two splits; `reason` names some."""


@dataclass(eq=False)
class StorageError(FruitrayError):
    """Storage refused: `uri` and why."""

    uri: str
    reason: str
    exit_code: ClassVar[int] = 6


class NotFoundError(StorageError):
    """No such bucket, object, folder or file."""


class AccessDeniedError(StorageError):
    """Wrong key, missing permission, or a read-only place."""


class CredentialsError(AccessDeniedError):
    """No keys, wrong ones or expired ones: says nothing of a single object."""


class ArchivedError(StorageError):
    """The object lies in an archive tier and must be restored before it can be read."""


class ChangedError(StorageError):
    """The object is no longer the one that was listed."""


class EndpointError(StorageError):
    """Nothing answers at the endpoint."""


@dataclass(eq=False)
class WeightsError(FruitrayError):
    """Pretrained weights of `backbone` cannot be had."""

    backbone: str
    reason: str
    exit_code: ClassVar[int] = 6

    def __str__(self) -> str:
        return (
            f"no ImageNet weights for {self.backbone}: {self.reason}; choose --weights imagenet (needs the network), "
            "--weights none (random start), or --weights PATH_OR_URI of a .safetensors or state-dict file"
        )


@dataclass(eq=False)
class DivergedError(FruitrayError):
    """A loss of `epoch`, of training or validation, is `loss`: no number."""

    epoch: int
    loss: float

    def __str__(self) -> str:
        return f"the loss became {self.loss} in epoch {self.epoch}; a lower --learning-rate may help"


@dataclass(eq=False)
class GpuFullError(FruitrayError):
    """A network wants more memory than a GPU has, in however many parts a batch is computed."""

    advice: str = "try a smaller --image-size, --train-size or --batch-size, or --frozen"

    def __str__(self) -> str:
        return f"the GPU's memory is too small; {self.advice}"


@dataclass(eq=False)
class TrialsFailedError(FruitrayError):
    """No trial of the search at `uri` came to a result; `reason` is the first one's."""

    uri: str
    reason: str

    def __str__(self) -> str:
        return f"no trial of {self.uri} came to a result; the first one said: {self.reason}"


@dataclass(eq=False)
class ModelRejectedError(FruitrayError):
    """A model package or weights file at `uri` that must not be used."""

    uri: str
    reason: str
    exit_code: ClassVar[int] = 7


class ExportError(ModelRejectedError):
    """The model package at `uri` cannot be exported, or its export does not answer as it does."""


@dataclass(eq=False)
class TryAgainError(FruitrayError):
    """A passing fault at `uri`; what was finished is kept."""

    uri: str
    reason: str
    exit_code: ClassVar[int] = 75


@dataclass(eq=False)
class ImageError(FruitrayError):
    """One photo that cannot be used. `code` is stable (see `fruitray.images.CODES`), `detail` is for people."""

    code: str
    detail: str


def one_line(error: BaseException) -> str:
    """What `error` says, without line breaks."""
    return " ".join(str(error).split())


def find_ours(error: BaseException | None) -> FruitrayError | None:
    """The error of ours that `error` is or was caused by."""
    return find(error, FruitrayError)


Kind = TypeVar("Kind", bound=BaseException)


def find(error: BaseException | None, kind: type[Kind]) -> Kind | None:
    """The error of that kind that `error` is or was caused by; Ray wraps what its workers raise in several layers."""
    while error is not None:
        held = [getattr(error, name, None) for name in ("cause", "health_check_failure", "controller_failure")]
        held += [*getattr(error, "worker_failures", {}).values(), *error.args]
        inner = [one for one in held if isinstance(one, BaseException)]
        if inner:  # before the type: Ray's wrapper pretends to be of its cause's
            return next(filter(None, (find(one, kind) for one in inner)), None)
        if isinstance(error, kind):
            return error
        error = error.__cause__
    return None
