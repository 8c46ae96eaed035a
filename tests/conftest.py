"""Strict JAX for every test: eight fake CPU devices, no silent rank promotion, shapes checked in the mathematics."""

import gc
import inspect
import os
import pathlib
import re

from tests import compiler

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", compiler.flags(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # in processes that tests start

from jaxtyping import install_import_hook

# The hook covers the mathematics only: on pytree dataclasses it breaks jax.tree.map and eval_shape.
_hook = install_import_hook(["rljax.ops", "rljax.losses", "rljax.advantages"], "beartype.beartype")
_hook.__enter__()

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    if not os.environ.get("RLJAX_ALL_TESTS"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: set RLJAX_ALL_TESTS=1"))


@pytest.fixture(scope="session")
def kept_programs(tmp_path_factory) -> pathlib.Path:
    """New, and of this process alone, since JAX does not write its files in one piece."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", autouse=True)
def programs(request, kept_programs):
    """What this process has compiled it need not compile again for another test.

    Not where a module compiles by itself: it reads what comes out, and a program from a file is not always told in the
    same words, or, if it was compiled for a machine that is not here, not read at all.
    """
    if re.search(r"\.compile\(|planning", inspect.getsource(request.module)):
        yield
        return
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(kept_programs),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()  # JAX asks once whether there is a cache
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """A process may have so many pieces of memory (Linux: 65,530), each compiled program has some, and the compiler
    crashes without one: a worker that has passed many files lets their programs go.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        gc.collect()
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real data and a real tiny checkpoint; see CONTRIBUTING.md."""
    root = pathlib.Path(__file__).parent.parent
    folder = pathlib.Path(os.environ.get("RLJAX_SHARED", root.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"needs the folder of shared data (looked in {folder}; set RLJAX_SHARED)")
    return folder


@pytest.fixture(scope="session")
def stories(shared) -> pathlib.Path:
    """stories260K: a real pretrained Llama checkpoint of 260,032 parameters."""
    return shared / "models" / "stories260K"
