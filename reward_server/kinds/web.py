"""What the kinds that speak HTTP share."""

from __future__ import annotations

import email.utils
import logging
import math
import time
from pathlib import Path

import httpx2

from reward_server.kinds import RewardLoadError
from rlhf.failures import unavailable

_LONGEST_RETRY_AFTER_SECONDS = 3600.0


def quiet_request_log() -> None:
    """Drop httpx2's line per request, which shows the whole URL; failures are told by the kinds themselves."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or a date; None = it asks for nothing."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_SECONDS)


def parsed_url(text: str) -> httpx2.URL:
    """The absolute http or https URL that `text` is; raises ValueError for anything else, and for credentials in it."""
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("must begin with http:// or https:// and a host")
    if url.userinfo:
        raise ValueError("must hold no user and password: they would be shown; give a file")
    return url


def place(url: httpx2.URL) -> str:
    """The URL as logs, metrics and messages show it: without the query, which may hold a key."""
    return str(url.copy_with(query=None, fragment=None))


def check_secret(path: Path) -> None:
    """Raise RewardLoadError unless the secret can be read now."""
    try:
        _read(path)
    except (OSError, ValueError) as error:
        raise RewardLoadError(f"{path}: {_why(error)}") from error


def secret(path: Path) -> str:
    """The secret in the file as it is now; UNAVAILABLE while it cannot be read, as when it is being replaced."""
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        raise unavailable(f"{path}: {_why(error)}") from error


def _read(path: Path) -> str:
    text = path.read_text(encoding="ascii").strip()
    if not text:
        raise ValueError("the file is empty")
    if not text.isprintable():
        raise ValueError("the file holds more than one line")
    return text


def _why(error: OSError | ValueError) -> str:
    # A UnicodeDecodeError would quote the secret.
    if isinstance(error, UnicodeDecodeError):
        return "the file holds more than ASCII"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
