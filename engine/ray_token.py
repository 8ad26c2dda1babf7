"""A private token for the Ray cluster that a run starts for itself. Imports no Ray, which reads it when loaded.

Left alone, Ray writes a token into the home folder at the first local start, and from then on its own commands and
clients fail against clusters that expect it.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from pathlib import Path

_folder: tempfile.TemporaryDirectory[str] | None = None


def use_private_token() -> None:
    """Give this process and its cluster a token of their own, gone at exit, unless the user or a loaded Ray decided."""
    global _folder
    decided = any(
        name in os.environ for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    )
    if decided or "ray" in sys.modules:
        return
    _folder = tempfile.TemporaryDirectory(prefix="gnomon-ray-")
    path = Path(_folder.name) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))
