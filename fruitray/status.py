"""What a job on a cluster says of itself in `status.json` below its `--out`, for when its log ends early or is gone.

    {"job": "score", "state": "running", "progress": {"step": "score", "done": 512, "total": 4500, "unit": "photos"},
     "started": "2026-01-31T12:00:00+00:00", "updated": "2026-01-31T12:01:10+00:00", "versions": {...}}

`run`, once it is there, is what the job measured of itself, such as its speed.

`state` is `running`, `succeeded`, `failed` or `interrupted`; the last three come with `exit_code`, and `said`, the last
line of the job. One that was killed says `running` for ever: its `updated` stands still.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from fruitray import console
from fruitray.errors import FruitrayError, TryAgainError
from fruitray.machine import versions
from fruitray.storage import Storage

KEY = "status.json"
INTERVAL_S = 10.0
INTERRUPTED = 130


class Status:
    """How one job fares."""

    def __init__(self, job: str) -> None:
        self.facts: dict[str, Any] = {"job": job, "started": _now()}
        self.out: Storage | None = None
        """Where the job writes; None: it has not begun, or writes nothing."""
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def begin(self, out: Storage) -> None:
        """From now on keep it below `out`, which must be this job's.

        Raises:
            StorageError: nothing can be written there, which will not pass.
        """
        self.facts["versions"] = versions() | {"ray": metadata.version("ray")}
        with suppress(TryAgainError):
            out.write(KEY, self._said(state="running"))
        self.out = out
        self._beats.start()

    def end(self, exit_code: int, said: str) -> None:
        """Keep how the job ended, if it had begun."""
        if self.out is None or self._ended.is_set():
            return
        self._ended.set()
        self._beats.join()
        state = {0: "succeeded", INTERRUPTED: "interrupted"}.get(exit_code, "failed")
        self._write(state=state, exit_code=exit_code, said=said)

    def _beat(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._write(state="running")

    def _write(self, **more: Any) -> None:
        if self.out is not None:
            with suppress(FruitrayError):  # a job that has begun does not fail for want of this
                self.out.write(KEY, self._said(**more))

    def _said(self, **more: Any) -> bytes:
        return json.dumps({**self.facts, **more, "progress": console.shown(), "updated": _now()}, indent=2).encode()


_CURRENT: ContextVar[Status | None] = ContextVar("status", default=None)


@contextmanager
def of(job: str) -> Iterator[Status]:
    """While it lasts, `begin` is of `job`; ended by anything but a return, the job was interrupted, or failed."""
    status = Status(job)
    token = _CURRENT.set(status)
    try:
        yield status
    except Exception as error:
        status.end(1, f"{type(error).__name__}: {error}")
        raise
    except BaseException:  # how a signal ends a process that Ray runs in
        status.end(INTERRUPTED, "interrupted")
        raise
    finally:
        _CURRENT.reset(token)


def begin(out: Storage) -> None:
    """Keep the status of the job that runs below `out`, which must be its own."""
    if status := _CURRENT.get():
        status.begin(out)


def note(**run: Any) -> None:
    """Keep with the status what the job that runs has measured of itself."""
    if status := _CURRENT.get():
        status.facts["run"] = run


def mend(out: Storage) -> None:
    """As `begin`, where the job below `out` is done, but was killed before it could say so."""
    with suppress(FruitrayError):  # it is done, whoever may read or write there
        ended = False
        with suppress(ValueError, TypeError, KeyError):  # what stands there is damaged
            ended = out.exists(KEY) and json.loads(out.read(KEY))["state"] in ("succeeded", "failed")
        if not ended:
            begin(out)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
