"""What the machine that a process runs on has for this package, told without importing torch."""

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

from fruitray import __version__


def versions() -> dict[str, str]:
    """Of everything that can change a prediction."""
    others = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    return {"fruitray": __version__, "python": platform.python_version(), **others}


def cache_folder() -> Path:
    """Where decoded photos are kept: $FRUITRAY_CACHE, else a folder of the user's in the temporary one."""
    return Path(os.environ.get("FRUITRAY_CACHE") or Path(tempfile.gettempdir()) / f"fruitray-cache-{os.getuid()}")
