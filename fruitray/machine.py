"""What the machine that a process runs on has for this package, and the process has held of it, told without torch."""

import os
import platform
import re
import resource
import shutil
import stat
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from fruitray import __version__
from fruitray.errors import UsageError


def versions() -> dict[str, str]:
    """Of everything that can change a prediction."""
    others = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    return {"fruitray": __version__, "python": platform.python_version(), **others}


def has_compiler() -> bool:
    """Whether there is one that torch.compile can use."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


def process_peak() -> int:
    """Bytes of memory that this process has held at most."""
    with suppress(OSError):  # Linux alone has it; what `getrusage` says begins at what the parent has held
        [peak] = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cache_folder() -> Path:
    """Where decoded photos are kept: $FRUITRAY_CACHE, else a folder of the user's in the temporary one."""
    return Path(os.environ.get("FRUITRAY_CACHE") or Path(tempfile.gettempdir()) / f"fruitray-cache-{os.getuid()}")


def cache_disk() -> Path:
    """The folder nearest to `cache_folder` that is there already: it lies on the same disk."""
    folder = cache_folder()
    return next(one for one in (folder, *folder.parents) if os.path.exists(one))


def make_cache_folder() -> Path:
    """`cache_folder`, which is there then.

    Raises:
        UsageError: it cannot be written to, or, in the temporary folder, where all may write, another account made it.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise UsageError(f"FRUITRAY_CACHE {folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"FRUITRAY_CACHE {folder}: cannot be written to")
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    if not private and not os.environ.get("FRUITRAY_CACHE"):
        raise UsageError(f"{folder}: others may write there; delete it, or let FRUITRAY_CACHE name another folder")
    return folder
