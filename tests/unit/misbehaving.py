"""What a decoder might do to the process it runs in; `test_isolate.py` calls it there."""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fruitray.errors import ImageError

_leaked: list[bytearray] = []


def act(data: bytes) -> dict[str, Any]:
    """Do what `data` names (with a number, perhaps), or say how much of it there is."""
    name, _, number = data[:200].decode(errors="replace").partition(" ")
    action = ACTIONS.get(name)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} if action is None else action(number)


def sleep(seconds: str) -> dict[str, Any]:
    time.sleep(float(seconds or 1e9))
    return {"slept": True}


def match_for_ever(_: str) -> NoReturn:
    re.match("(a+)+b", "a" * 100)  # in C, and keeps Python's lock
    raise AssertionError


def hash_for_ever(_: str) -> NoReturn:
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # in C, without Python's lock
    raise AssertionError


def exit_at_once(status: str) -> NoReturn:
    os._exit(int(status))


def kill_itself(number: str) -> NoReturn:
    os.kill(os.getpid(), int(number))
    raise AssertionError


def bomb(_: str) -> NoReturn:
    while True:
        _leaked.append(bytearray(2**25))


def leak(size: str) -> dict[str, Any]:
    _leaked.append(bytearray(int(size)))
    return {"leaked": True}


def unchecked_bomb(_: str) -> NoReturn:
    """As careless C does it: ask for 2 GiB and write to what comes back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    ctypes.memset(libc.malloc(2**31) or 0, 0, 1)
    raise AssertionError


def refuse(_: str) -> NoReturn:
    raise ImageError("E_CORRUPT", "the image data is damaged (ü)")


def our_bug(_: str) -> NoReturn:
    raise KeyError("a bug of ours")


def leave(_: str) -> NoReturn:
    sys.exit("gone")


def talk(_: str) -> dict[str, Any]:
    print("x" * 100_000, flush=True)
    os.write(1, b"\0\0\0\0\0\0\0\x02{}")  # looks like an answer
    subprocess.run(["echo", "noise"], check=True)
    return {"read": sys.stdin.read(), "fd 0": os.read(0, 10).decode()}


def touch(path: str) -> dict[str, Any]:
    if path:
        Path(path).touch()
    return {"touched": path}


def about(_: str) -> dict[str, Any]:
    return {"pid": os.getpid(), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}


def modules(_: str) -> dict[str, Any]:
    from fruitray import facts  # noqa: F401  # what the real child loads

    return {"modules": sorted(sys.modules)}


ACTIONS = {
    "sleep": sleep,
    "modules": modules,
    "match": match_for_ever,
    "hash": hash_for_ever,
    "exit": exit_at_once,
    "kill": kill_itself,
    "segfault": lambda _: {"read": ctypes.string_at(0)},
    "abort": lambda _: os.abort(),
    "bomb": bomb,
    "leak": leak,
    "unchecked-bomb": unchecked_bomb,
    "refuse": refuse,
    "bug": our_bug,
    "leave": leave,
    "not-json": lambda _: {"pid": object()},
    "long": lambda size: {"text": "x" * int(size)},
    "pixels": lambda side: {"side": int(side), "pixels": np.full((int(side), int(side), 3), 7, np.uint8)},
    "not-json-but-pixels": lambda _: {"pid": object(), "pixels": np.zeros(3, np.uint8)},
    "talk": talk,
    "touch": touch,
    "about": about,
}
