"""What a process says of its memory."""

import subprocess
import sys

import numpy as np
import torch

from fruitray.memory import forget_peak, keep_freed_memory, peak_memory

LARGE = 400 * 2**20
"""Bytes."""


def test_a_peak_that_is_forgotten_does_not_count() -> None:
    """Though this process keeps what it frees, for its next tensor of that size."""
    keep_freed_memory()
    forget_peak()
    device = torch.device("cpu")
    before = peak_memory(device)
    for _ in range(2):
        large = np.ones(LARGE, np.uint8)
        assert peak_memory(device) > before + LARGE / 2
        del large
        forget_peak()
        assert peak_memory(device) < before + LARGE / 2


def test_what_the_parent_has_held_does_not_count() -> None:
    large = np.ones(4 * LARGE, np.uint8)
    program = "import torch; from fruitray.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
    assert 0 < int(subprocess.check_output([sys.executable, "-c", program])) < large.nbytes
