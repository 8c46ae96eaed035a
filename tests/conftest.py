"""Strict JAX for every test: eight fake CPU devices, no silent rank promotion, shapes checked in the mathematics."""

import collections
import gc
import inspect
import os
import pathlib
import re
import threading

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
from jax._src.interpreters import mlir  # noqa: E402
from jax._src.lru_cache import LRUCache  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Files with many slow tests first, so that the workers end together."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if not os.environ.get("RLJAX_ALL_TESTS"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: set RLJAX_ALL_TESTS=1"))


def _put(cache: LRUCache, key: str, value: bytes) -> None:
    """JAX writes to the file that others may be reading; here it appears whole."""
    path = pathlib.Path(str(cache.path)) / f"{key}-cache"
    if not path.exists():
        part = path.with_name(f"{key}.{os.getpid()}.part")
        part.write_bytes(value)
        part.replace(path)


LRUCache.put = _put


class _Dialects(threading.local):
    """To load MLIR's dialects takes a fifth of what it takes to compile a small operation: not for each of them."""

    context, left = None, 0

    def get(self):
        if not self.left:  # what is interned stays, constants too
            self.context, self.left = mlir.make_ir_context(), 200
        self.left -= 1
        return self.context


_dialects, _module_context = _Dialects(), mlir.ModuleContext.__init__


def _in_a_context(self, *args, context=None, **options):
    _module_context(self, *args, context=context or _dialects.get(), **options)


mlir.ModuleContext.__init__ = _in_a_context


def pytest_collection_finish():
    """What is imported stays: the collector, which tracing keeps busy, need not look at it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session")
def kept_programs(tmp_path_factory) -> pathlib.Path:
    """New, and of all the workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    folder.mkdir(exist_ok=True)
    return folder


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


@pytest.fixture(scope="module", autouse=True)
def few_pictures(request):
    """The report of a run has eight pictures, which take longer to draw than a step to make: they stay empty files
    where a module does not look at them.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not re.search(r"png|plots|savefig", inspect.getsource(request.module)):
            patch.setattr(Figure, "savefig", _left_out)
        yield


def _left_out(figure, file, **options):
    """A path becomes an empty file, an open file stays as it is."""
    if not hasattr(file, "write"):
        pathlib.Path(file).touch()


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


@pytest.fixture(scope="session")
def small(stories, tmp_path_factory) -> pathlib.Path:
    """Its first two layers, with its tokenizer: real weights that compile in less than half the time."""
    from tests.models.folders import first_layers  # here: it imports what the hook above has to see first

    return first_layers(stories, tmp_path_factory.mktemp("small") / "model", 2)
