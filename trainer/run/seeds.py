"""Seeds derived by a hash, so that nothing depends on the order in which things happen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def derive_seed(run_seed: int, *path: int | str) -> int:
    """A 63-bit seed for one purpose, the same on every machine: (run seed, "rollout", step, row, completion) …

    Two different paths never share a stream by accident: completion i of a Generate call draws from seed + i, and
    neighbouring integers as row seeds would overlap there.
    """
    text = "/".join([str(run_seed), *(str(part) for part in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def content_hash(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """32 hex digits over a prompt's and a completion's token ids; equal ids, equal hash."""
    digest = hashlib.sha256()
    for ids in (prompt_ids, completion_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        for token in ids:
            digest.update(token.to_bytes(4, "little"))
    return digest.hexdigest()[:32]
