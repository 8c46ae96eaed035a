"""How an optional dependency is installed, for the messages of what needs one."""

from __future__ import annotations

import importlib.metadata

__all__ = ["DISTRIBUTION", "install"]

DISTRIBUTION = "rljax-lm"  # what pip calls it; `rljax` on package indexes is another project


def install(extra: str) -> str:
    """The command that installs what an extra needs: `pip install "gguf<1,>=0.17"`.

    It names packages, as the metadata of this installation has them, since those are the same wherever rljax came from:
    a checkout, a git address or a wheel. Without metadata it is the command for a checkout.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    split = [line.partition(";") for line in lines]
    packages = [need.strip() for need, _, marker in split if f'extra=="{extra}"' in _plain(marker)]
    named = " ".join(f'"{package}"' for package in packages)
    return f"pip install {named}" if named else f'pip install -e ".[{extra}]" (in a checkout)'


def _plain(marker: str) -> str:
    return marker.replace(" ", "").replace("'", '"')
