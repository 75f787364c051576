"""Decoding in a process of its own: a photo that hangs, kills or starves the decoder costs its row and nothing else.

    Isolated()(data) -> pipe -> python -m fruitray.isolate -> facts.look(data) -> pipe -> its facts

The parent may be full of threads, as Ray's workers are, so the child is a fresh interpreter and no fork. Bytes go in;
JSON, and pixels, come out: a child that a photo has taken over can send nothing that would run here.
"""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Self, TypeVar

import numpy as np

from fruitray.errors import ImageError, TryAgainError
from fruitray.images import image_error

Result = TypeVar("Result")
LOOK, RGB = "fruitray.facts:look", "fruitray.images:rgb"
DECODE_TIMEOUT_S = 20.0
"""One photo's, of CPU time. 50 megapixels took 1 to 6 s on a shared core, the most as lossless WebP."""
PATIENCE = 6
"""How many times as long it may take by the clock, as others may use the CPU, too."""
AHEAD = 16
"""How many answers a pool has ready before they are asked for."""
STARTS = 3
"""How often a child may die while it starts, before its parent gives up."""
DECODE_MEMORY = 4 * 2**30
"""Bytes of a child's address space, where the system limits that (Linux). 50 megapixels took up to 1.7 GiB."""


class Isolated:
    """`function` (named as `module:name`, or `module:name:NUMBER`, which it then gets, too), from bytes to a dict that
    JSON can hold, called in a child process; besides, it may hold `pixels`, a uint8 array of any shape.

    The child starts at the first call and again after each death. It ends with `close`, and with this process, however
    that ends. For one thread at a time.
    """

    def __init__(
        self, function: str = LOOK, *, timeout_s: float = DECODE_TIMEOUT_S, memory: int = DECODE_MEMORY
    ) -> None:
        self.function, self.timeout_s, self.memory = function, timeout_s, memory
        self._child: _Child | None = None
        self._sent: bytes | None = None
        """What the child already has while its answer to something else is awaited."""

    def __call__(self, data: bytes) -> dict[str, Any]:
        """What `function` makes of `data`.

        Raises:
            ImageError: as `function` raised it; E_TIMEOUT or E_DECODE_CRASH if it did not come back.
            RuntimeError: `function` raised something else, which is a bug: with the child's traceback.
            TryAgainError: no child lives long enough to be asked.
        """
        return self._call(data, None)

    def map(self, contents: Iterable[bytes | ImageError]) -> Iterator[dict[str, Any] | ImageError]:
        """What `function` makes of each, in order; what is or becomes an `ImageError` is yielded as one.

        Quicker than calls one by one, as the child has the next photo at hand when it is done with one.
        """
        items = iter(contents)
        item = next(items, None)
        while item is not None:
            following = next(items, None)
            try:
                yield item if isinstance(item, ImageError) else self._call(item, following)
            except ImageError as error:
                yield error
            item = following

    def close(self) -> None:
        """End the child, if one runs; a later call starts another."""
        child, self._child, self._sent = self._child, None, None
        if child is not None:
            child.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, data: bytes, following: bytes | ImageError | None) -> dict[str, Any]:
        answer = self._ask(data, following)
        if answer.get("code") == "E_DECODE_CRASH":  # perhaps another's doing: leaks of earlier photos, a kill
            answer = self._ask(data, None)  # of a fresh child
        if "bug" in answer:
            raise RuntimeError(f"{self.function} failed in its process\n{answer['bug']}")
        if "code" in answer:
            raise ImageError(answer["code"], answer["detail"])
        result: dict[str, Any] = answer["result"]
        return result

    def _ask(self, data: bytes, following: bytes | ImageError | None) -> dict[str, Any]:
        try:
            child = self._child_for(data)
            if isinstance(following, bytes) and len(following) < child.room:
                child.send(following)
                self._sent = following
            answer = child.receive()
        except BaseException:  # Ctrl-C, say: the answer on its way would be taken for that to the next question
            self.close()
            raise
        if answer is None:
            answer = self._cause_of_death(child)
        if answer.get("code") in ("E_TIMEOUT", "E_DECODE_CRASH"):  # it is dead, or as good as
            self.close()
        return answer

    def _child_for(self, data: bytes) -> "_Child":
        """A child that has been asked about `data` and nothing else."""
        if self._sent is not None and self._sent is not data:  # a `map` was left half-way
            self.close()
        if self._child is None:
            self._child = self._new_child()
        if self._sent is None:
            self._child.send(data)
        self._sent = None
        return self._child

    def _new_child(self) -> "_Child":
        for _ in range(STARTS):
            child = _Child(self.function, self.timeout_s, self.memory)
            if child.ready:
                return child
            child.end()
            time.sleep(1)
        raise TryAgainError(self.function, "its process is killed while it starts, time and again; is memory short?")

    def _cause_of_death(self, child: "_Child") -> dict[str, Any]:
        status = child.wait()
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            limit = self.timeout_s * (1 if status == -signal.SIGPROF else PATIENCE)
            return _refusal(image_error("E_TIMEOUT", f"more than {limit:g} s"))
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return _refusal(image_error("E_DECODE_CRASH", how))


class IsolatedPool:
    """Several `Isolated` at once, each with a thread of this process that waits for it."""

    def __init__(self, function: str, children: int) -> None:
        self._children, self._idle = children, SimpleQueue[Isolated]()
        for _ in range(children):
            self._idle.put(Isolated(function))
        self._threads = ThreadPoolExecutor(children)

    def map(
        self, contents: Iterable[bytes | ImageError], then: Callable[[dict[str, Any]], Result]
    ) -> Iterator[Result | ImageError]:
        """`then` of what the function makes of each, in order, a few ahead; what is or becomes an `ImageError` is
        yielded as one. `then` runs in the threads."""
        window: deque[Future[Result | ImageError]] = deque()
        for item in contents:
            window.append(self._threads.submit(self._one, item, then))
            if len(window) > AHEAD + 2 * self._children:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()

    def _one(self, item: bytes | ImageError, then: Callable[[dict[str, Any]], Result]) -> Result | ImageError:
        if isinstance(item, ImageError):
            return item
        isolated = self._idle.get()
        try:
            return then(isolated(item))
        except ImageError as error:
            return error
        finally:
            self._idle.put(isolated)


class _Child:
    """A process that runs `_serve`."""

    def __init__(self, function: str, timeout_s: float, memory: int) -> None:
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # Ray adds folders after the start
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "fruitray.isolate", function, str(timeout_s), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"OMP_NUM_THREADS": "1"} | _environment() | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is the parent's business
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        self.end = weakref.finalize(self, _end, self._process)  # a Popen that is dropped would live on
        self.room = _room(self._questions)
        """Bytes that can be sent unread. Were it more, each side might wait for the other to read."""
        said = self.receive()
        self.ready = said is not None
        """Whether it lives, now that it has started."""
        if said:
            self.end()
            raise RuntimeError(f"{function} cannot be loaded\n{said['bug']}")

    def send(self, data: bytes) -> None:
        with suppress(BrokenPipeError):  # it has died; `receive` tells
            _send(self._questions, data)

    def receive(self) -> dict[str, Any] | None:
        """The next answer, or None: it has died."""
        message = _receive(self._answers)
        answer: dict[str, Any] | None = None if message is None else json.loads(message)
        if answer and "shape" in answer:
            pixels = _receive(self._answers)
            if pixels is None:
                return None
            answer["result"]["pixels"] = np.frombuffer(pixels, np.uint8).reshape(answer["shape"])
        return answer

    def wait(self) -> int:
        return self._process.wait()


def _environment() -> dict[str, str]:
    """Of this process, without the keys that are in it: what reads strangers' bytes has no use for them."""
    secret = re.compile("AWS_|MLFLOW_|RAY_AUTH_TOKEN$")
    return {name: value for name, value in os.environ.items() if not secret.match(name)}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(BrokenPipeError), process:  # closes the pipes and waits
        pass


def _room(pipe: IO[bytes]) -> int:
    """Two pages less than the pipe's size, for what is written begins anywhere in a page; 0 where none tells it."""
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) - 2 * resource.getpagesize() if sys.platform == "linux" else 0


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    """The next message; None if the other side ended before it was whole."""
    head = pipe.read(8)
    size = int.from_bytes(head)
    message = pipe.read(size)
    return message if len(head) == 8 and len(message) == size else None


def _refusal(error: ImageError) -> dict[str, Any]:
    return {"code": error.code, "detail": error.detail}


# ---- In the child


def _serve(name: str, timeout_s: float, memory: int) -> None:
    """Answer questions until the parent ends."""
    questions, answers = _take_pipes()
    _set_limits(memory)
    try:
        function = _find(name)
    except Exception:
        _send(answers, json.dumps({"bug": traceback.format_exc()}).encode())
        return
    _send(answers, b"{}")
    while (data := _receive(questions)) is not None:
        for message in _answer(function, data, timeout_s):
            _send(answers, message)


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes to the parent, moved to where what `function` prints does not get into them."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return questions, answers


def _set_limits(memory: int) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent has ended: so does this process, without a word
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    timers = [signal.SIGALRM, signal.SIGPROF]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, timers)  # what a parent blocks, its children inherit
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # the parent has less itself; or this is macOS
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with suppress(OSError):  # where memory runs short all the same, Linux is to choose this process, not the parent
        Path("/proc/self/oom_score_adj").write_text("1000")


def _find(name: str) -> Callable[[bytes], dict[str, Any]]:
    module, function, *numbers = name.split(":")
    found: Callable[..., dict[str, Any]] = getattr(import_module(module), function)
    return lambda data: found(data, *map(int, numbers))


def _answer(function: Callable[[bytes], dict[str, Any]], data: bytes, timeout_s: float) -> list[bytes]:
    """The JSON, and the pixels if there are any."""
    signal.setitimer(signal.ITIMER_PROF, timeout_s)  # nothing handles it, so the kernel ends even a hang in C
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * timeout_s)
    rest = []
    try:
        said: dict[str, Any] = {"result": function(data)}
        pixels = said["result"].pop("pixels", None)
        if pixels is None:
            message = json.dumps(said)
        else:
            message = json.dumps(said | {"shape": pixels.shape})
            rest = [pixels.tobytes()]
    except ImageError as error:
        message = json.dumps(_refusal(error))
    except MemoryError:
        message = json.dumps(_refusal(image_error("E_DECODE_CRASH")))
    except BaseException:
        message = json.dumps({"bug": traceback.format_exc()})
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [message.encode(), *rest]


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
