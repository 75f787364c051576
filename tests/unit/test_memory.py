"""What a process says of its memory."""

import numpy as np
import torch

from fruitray.memory import forget_peak, keep_freed_memory, peak_memory

MEBIBYTE = 2**20


def test_a_peak_that_is_forgotten_does_not_count() -> None:
    """Though this process keeps what it frees, for its next tensor of that size."""
    keep_freed_memory()
    device, large = torch.device("cpu"), np.ones(400 * MEBIBYTE, np.uint8)
    high = peak_memory(device)
    assert high > large.nbytes
    del large
    forget_peak()
    assert peak_memory(device) < high - 300 * MEBIBYTE
    again = np.ones(400 * MEBIBYTE, np.uint8)
    assert peak_memory(device) > high - 100 * MEBIBYTE
    del again
