"""What a step needed of memory is kept for the next step, where the devices are CPUs."""

import ctypes
import glob
import os
from collections.abc import Callable

import jax

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # malloc.h
UNLIMITED = -1  # as a size_t
DECIDED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/*")


def keep_memory() -> bool:
    """Keep freed memory in this process, to its end, on a machine without an accelerator. Call it before JAX starts
    its backend. Returns whether it is kept.

    XLA on CPUs allocates temporaries at every call, and glibc maps what is large and unmaps it when it is freed. The
    kernel then gives every page anew, 4 KiB at a time: in an iteration of PPO with two 135M models 2.4 million times, a
    quarter of its time. Only the main heap of glibc can keep blocks of any size, so all threads share that one; threads
    that allocate at the same moment wait for each other, which costs 4% where models are tiny.

    Nothing is done where glibc's or another allocator is chosen by a variable (MALLOC_…, GLIBC_TUNABLES, LD_PRELOAD),
    or where the libc is not glibc.
    """
    mallopt = _mallopt()
    if mallopt is None or any(name.startswith(DECIDED) for name in os.environ) or not _on_cpu():
        return False
    return all([mallopt(ARENA_MAX, 1), mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, UNLIMITED)])


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's, which returns 1 for what it accepts."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    return libc.mallopt if libc is not None and hasattr(libc, "gnu_get_libc_version") else None


def _on_cpu() -> bool:
    """Whether JAX will compute on CPUs, which cannot be asked of it without starting its threads."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    return platforms == "cpu" or (not platforms and not any(map(glob.glob, ACCELERATORS)))
