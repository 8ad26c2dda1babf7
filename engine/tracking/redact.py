"""Masks secrets before anything is written, sent or shown.

A value is masked because of its key (`api_key: ...`), because of its looks (`hf_...`), or because an environment
variable with a secret's name holds it. Masking one harmless value too many is fine; one secret too few is not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "<redacted>"

_SECRET_WORDS = frozenset(
    {"key", "keys", "apikey", "token", "accesstoken", "secret", "secrets", "password", "passwords", "passwd", "pwd"}
    | {"passphrase", "credential", "credentials", "authorization", "bearer"}
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_LOOKS_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\bwandb_v\d+_[A-Za-z0-9_]{16,}"
    r"|(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])"  # wandb; a git commit looks the same
)
_BEARER = re.compile(r"(?i)\b(bearer|basic) +[A-Za-z0-9+/=._~-]{8,}")
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#@]*(?:@[^\s/?#@]*)*@")
_ASSIGNMENT = re.compile(  # name=value, --name value, "name": "value"; not `KeyError: value`
    r"""(?<![\w.-])((?:--?)?[\w.-]+=|--[\w.-]+\s+|["'][\w.-]+["']:\s*)("[^"]*"|'[^']*'|[^\s&"',;#}\]]+)"""
)


def redact(value: Any) -> Any:
    """A copy of a config-like value with its secrets masked; dicts, lists and tuples are walked.

    Masked are: everything under a key one of whose words is key, token, secret, password, credential (`api_key`,
    `hfToken`, `WANDB_API_KEY`; not `max_new_tokens`), except None, True and False, which tell nothing; inside strings,
    what looks like a known secret (hf_..., sk-..., AKIA..., ghp_..., 40 hexadecimal digits), user and password and
    secret parameters of URLs, `name=value` with a secret name, and values of environment variables with such a name.
    """
    return _redact(value, _environment_secrets())


def is_secret_name(name: str) -> bool:
    """Whether a key, parameter or environment variable of this name holds a secret: `api_key`, not `max_new_tokens`."""
    return any(word.lower() in _SECRET_WORDS for word in _WORD.findall(name))


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _mask_all(v) if is_secret_name(str(k)) else _redact(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_redact(item, known) for item in value])
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, Path):
        return Path(_redact_text(str(value), known))
    return value


def _mask_all(value: Any) -> Any:
    """Masks every leaf, so that the shape of what was there stays visible."""
    if isinstance(value, Mapping):
        return {k: _mask_all(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_mask_all(item) for item in value])
    return value if value is None or isinstance(value, bool) else MASK


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    text = _USERINFO.sub(rf"\1{MASK}@", text)
    text = _LOOKS_SECRET.sub(MASK, text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    return _ASSIGNMENT.sub(_mask_assignment, text)


def _mask_assignment(match: re.Match[str]) -> str:
    return match[1] + MASK if is_secret_name(match[1]) else match[0]


def _environment_secrets() -> list[str]:
    """Values of environment variables whose names are secret, longest first; short and path-like ones tell nothing."""
    values = {v for name, v in os.environ.items() if is_secret_name(name) and len(v) >= 8 and not v.startswith("/")}
    return sorted(values, key=len, reverse=True)
