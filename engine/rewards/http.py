"""What clients of reward servers and of language models share."""

from __future__ import annotations

import functools
import ipaddress
from typing import Any

from engine.config import UserError


@functools.cache
def certificates() -> Any:
    """Takes tens of milliseconds to load: once for a process."""
    import httpx

    return httpx.create_ssl_context()


def checked_url(url: str) -> str:
    """Without a slash at the end.

    Raises:
        UserError: it is no http address, or carries a password or parameters, which would be shown with it.
    """
    import httpx

    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise UserError("url must be an address such as http://host:8100") from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UserError("url must hold no user, password or parameters; a key or token goes into a variable")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"url={url!r} must begin with http:// or https://, as in http://host:8100")
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """What runs on this host is not asked for through a proxy."""
    import httpx

    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
