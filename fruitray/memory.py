"""How this process keeps its memory, gives it back, and does with what a GPU has."""

import ctypes
import functools
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from fruitray.errors import GpuFullError
from fruitray.machine import process_peak

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_LARGEST = 2**30


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep what it frees, for the next tensor of that size; where the C library is not glibc, nothing.

    glibc asks the kernel for every tensor above 32 MiB anew, and gives it back as soon as it is freed. The kernel then
    has to clear each page again: training on a CPU can spend most of its time on that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
        mallopt(_M_ARENA_MAX, 1)


def forget_peak() -> None:
    """Give back all that this process has freed, and count `peak_memory` from now on; what of this the system does not
    know is left out."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak()


_NO_ROOM = re.compile("_ALLOC(ATION)?_FAILED|unable to find an engine|[Oo]ut of memory")
"""The second is what PyTorch makes of cuDNN's, after it has tried all its ways to compute a convolution."""


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Raise `torch.OutOfMemoryError` also where CUDA or a library of its (cuBLAS, cuDNN, ...) finds a GPU's memory too
    small: PyTorch raises it for its own allocator alone, which may have left the others nothing."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _NO_ROOM.search(str(error)):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


Made = TypeVar("Made")


def in_halves(
    compute: Callable[[torch.Tensor], Made], inputs: torch.Tensor, join: Callable[[list[Made]], Made]
) -> Made:
    """What `compute` makes of a batch (B, ...); where the GPU's memory is too small, of halves of halves, joined.

    Raises:
        torch.OutOfMemoryError: it is too small for a single example.
    """
    try:
        with as_out_of_memory():
            return compute(inputs)
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    torch.cuda.empty_cache()
    return join([in_halves(compute, half, join) for half in inputs.tensor_split(2)])


@contextmanager
def full_gpu_told() -> Iterator[None]:
    """Raise `GpuFullError`, one sentence, where what is done meanwhile finds a GPU's memory too small."""
    try:
        with as_out_of_memory():
            yield
    except torch.OutOfMemoryError as error:
        raise GpuFullError("see with nvidia-smi whether another program holds it") from error
