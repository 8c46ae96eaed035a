"""Writing a tokenizer, so that transformers 4 and 5 open it: file by file where nobody has changed it."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import shutil
from typing import Any

from rljax.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def write_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
    """A tokenizer object, or the files of a folder that has one. An object that is what its folder holds is that
    folder's files; what calls with truncation or padding have left in another one is not written.
    """
    if isinstance(tokenizer, str | os.PathLike):
        source = pathlib.Path(tokenizer)
        if not files_of(source):
            raise UserError(
                f"tokenizer={str(source)!r} has no tokenizer files; give a folder that does, or a tokenizer."
            )
    else:
        source = _origin(tokenizer)
    if source is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(folder)
    else:
        for file in files_of(source):
            (shutil.copytree if file.is_dir() else shutil.copy)(file, folder / file.name)
    _for_transformers_4(folder / "tokenizer_config.json")


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def _origin(tokenizer: Any) -> pathlib.Path | None:
    """The folder that a tokenizer was read from, if it is still what that folder holds."""
    folder = pathlib.Path(str(getattr(tokenizer, "name_or_path", None) or "/nonexistent"))
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    fresh = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return folder if _state(fresh) == _state(tokenizer) else None


def _state(tokenizer: Any) -> tuple[Any, ...]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    rest = [getattr(tokenizer, name, None) for name in ("model_max_length", "padding_side", "chat_template")]
    return {**backend, "truncation": None, "padding": None}, special, rest


def _for_transformers_4(path: pathlib.Path) -> None:
    """Say what transformers 5 writes in words that 4 knows as well: 5 reads them alike."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") != "TokenizersBackend":
        return
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
