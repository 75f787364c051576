"""What unit tests share: one thread for small networks, where several would mostly wait for one another; a decoder."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

from collections.abc import Iterator

import pytest

from fruitray.isolate import Isolated
from tests.unit.photos import JPEG


@pytest.fixture(scope="session")
def isolated() -> Iterator[Isolated]:
    """Looks at photos in a process of its own, which runs already."""
    with Isolated() as running:
        running(JPEG)
        yield running
