"""Versions of rewards: what trainers pin, so that it changes whenever a score could."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rlhf import __version__


def version_of(name: str, **what_scores_depend_on: Any) -> str:
    """`name@` and a digest of our release and of everything given, which json can write."""
    text = json.dumps([__version__, name, what_scores_depend_on], sort_keys=True, default=str)
    return f"{name}@{hashlib.sha256(text.encode()).hexdigest()[:16]}"
