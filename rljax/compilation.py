"""Compiled programs are kept for the next start, in JAX's persistent compilation cache."""

import logging
import os
import pathlib
import sys
import tempfile

import jax

from rljax.models import resolve


def keep_programs() -> None:
    """What is compiled is kept for the next start, in rljax's cache folder or where JAX_COMPILATION_CACHE_DIR says.
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = resolve.cache_folder() / "programs"
        problem = _unwritable(folder)
        if problem is not None:
            print(
                f"rljax: compiled programs are not kept: {folder} cannot be written ({problem}). RLJAX_CACHE may name "
                "another folder.",
                file=sys.stderr,
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _unwritable(folder: pathlib.Path) -> str | None:
    """Why no file can be made in a folder, tried; None where one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def hide_false_alarms() -> None:
    """Hide C++ errors where the devices are CPUs, unless somebody chose a level for them. Starts JAX's backend.

    The loader of kept programs takes two of XLA's own preferences for features that the machine lacks, and warns of
    SIGILL at every program (https://github.com/openxla/xla/issues/44565), which then runs. Real errors reach us as
    exceptions.
    """
    chosen = "JAX_LOGGING_LEVEL" in os.environ or os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") != "1"  # 1: JAX sets it
    if not chosen and jax.default_backend() == "cpu":
        jax.config.update("jax_logging_level", "CRITICAL")
        for name in ("jax", "jaxlib"):
            logging.getLogger(name).setLevel(logging.NOTSET)  # Python's warnings stay
