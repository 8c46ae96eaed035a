"""Secrets stay out of records: what is written is a short hash that tells a change and nothing else.

A value that looks like a secret (a known prefix, or a long random text) has so much entropy that a few bits of its
hash say nothing about it. One that only has the name of a secret may be guessed, so its hash is keyed by a random
file in the cache folder, which never leaves this machine.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import pathlib
import re
import secrets

from rljax.models.resolve import cache_folder

_NAMED = re.compile(
    r"(?:^|_)(?:key|api_?keys?|token|secrets?|passw(?:or)?ds?|passphrase|pwd|authorization|auth|bearer|credentials?)$"
)
_TOKENS_OF_TEXT = re.compile(
    r"(?:^|_)(?:eos|bos|pad|unk|sep|cls|mask|stop|start|end|image|begin|turn|think|special|sort|field|group|row|label)"
    r"_(?:token|key)$"
)
_KNOWN = re.compile(
    r"\b(?:sk-[\w-]{8,}|sk_(?:live|test)_\w{8,}|hf_\w{8,}|gh[opusr]_\w{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}"
    r"|xox[abprs]-[\w-]{8,}|AKIA\w{12,}|ASIA\w{12,}|AIza[\w-]{20,}|ya29\.[\w-]{10,}|gsk_\w{8,}|r8_\w{8,}|pypi-[\w-]{8,}"
    r"|nvapi-[\w-]{8,}|eyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*)"
)
_USER = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)(?P<secret>[^\s/@]+)(?=@)", re.IGNORECASE)
_BEARER = re.compile(r"(?P<before>\b(?:bearer|basic|token)\s+)(?P<secret>[\w.~+/=-]{8,})", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"(?P<before>\b[\w-]*(?:api[_-]?key|token|secret|password|passwd|authorization|credentials?)['\"]?\s*[=:]\s*['\"]?)"
    r"(?P<secret>[^\s'\",;&)]+)",
    re.IGNORECASE,
)
_RANDOM = re.compile(r"[A-Za-z0-9+/=_-]{20,}")
_WORD = re.compile(r"[A-Za-z][a-z_-]{2,}")
_PARTS = re.compile(r"[a-z]+|[A-Z][a-z]+|[A-Z]+|[0-9]+")
MIXED = 0.28  # changes of kind (lower, upper, digit) a character: names have fewer, random texts more


def named_secret(name: str) -> bool:
    """Whether a name says that its value is a secret: api_key, hf-token, x-api-key, Authorization, password."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
    return bool(_NAMED.search(words)) and not _TOKENS_OF_TEXT.search(words)


def masked(text: str) -> str:
    """A text without the secrets in it."""
    text = _USER.sub(lambda found: f"{found['before']}{_keyed(found['secret'])}", text)
    text = _KNOWN.sub(lambda found: _plain(found.group()), text)
    text = _BEARER.sub(lambda found: f"{found['before']}{_whole(found['secret'])}", text)
    return _plain(text) if _random(text) else text


def masked_value(text: str) -> str:
    """A text that is a secret by its name."""
    return text if not text or text.startswith("<secret") else _whole(text)


def masked_command(words: list[str]) -> list[str]:
    """A command line: `--reward.api-key VALUE`, `--reward.api-key=VALUE`, and what looks like a secret by itself."""
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        option, equals, value = word.partition("=")
        if before.startswith("--") and "=" not in before and named_secret(before.rpartition(".")[2].lstrip("-")):
            found.append(masked_value(word))
        elif equals and option.startswith("--") and named_secret(option.rpartition(".")[2].lstrip("-")):
            found.append(f"{option}={masked_value(value)}")
        else:
            found.append(masked(word))
    return found


def masked_message(text: str) -> str:
    """A representation of an object, in which arguments are named: Client(api_key='…')."""
    return _ASSIGNED.sub(lambda found: f"{found['before']}{masked_value(found['secret'])}", masked(text))


def _whole(text: str) -> str:
    return _plain(text) if _KNOWN.fullmatch(text) or _random(text) else _keyed(text)


def _random(text: str) -> bool:
    """Whether all of a text is long and random, as keys are: nothing that one would read out as words."""
    if not _RANDOM.fullmatch(text) or text.startswith(("/", "./", "../")):
        return False
    if "/" in text and any(_WORD.fullmatch(part) for part in text.split("/")):
        return False  # a path
    letters = re.sub(r"[^A-Za-z0-9]", "", text)
    changes = sum(len(_PARTS.findall(part)) - 1 for part in re.findall(r"[A-Za-z0-9]+", text))
    digits = sum(letter.isdigit() for letter in letters)
    return len(letters) >= 20 and 2 <= digits < len(letters) and changes >= MIXED * len(letters)


def _plain(text: str) -> str:
    return f"<secret {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}>"


def _keyed(text: str) -> str:
    key = _machine_key(cache_folder() / "masking.key")
    if key is None:
        return "<secret>"
    digest = hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:8]
    return f"<secret {hashlib.sha256(key).hexdigest()[:4]}-{digest}>"


@functools.cache
def _machine_key(path: pathlib.Path) -> bytes | None:
    """32 random bytes, made once; None where they can neither be read nor kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        if not path.exists():
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            try:
                os.link(draft, path)  # of several processes the first one's stays
            except FileExistsError:
                pass
            finally:
                draft.unlink(missing_ok=True)
        return path.read_bytes()
    except OSError:
        return None
