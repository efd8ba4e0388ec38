"""Who may rate: names and the digests of tokens, within a transaction of the store.

A token is 256 random bits, so that its SHA-256 cannot be turned back by trying: the slow hashes that guessable
passwords need would add nothing but time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from reward_server.human.tables import AnyRow, leases, raters
from reward_server.human.tickets import Rater

_TOKEN_BYTES = 32
_MOST_CHARACTERS = 64


async def add(connection: AsyncConnection, name: str, *, is_admin: bool) -> str:
    """See Store.add_rater."""
    if not (0 < len(name) <= _MOST_CHARACTERS and name.isprintable() and name == name.strip()):
        raise ValueError(f"a name has from 1 to {_MOST_CHARACTERS} printable characters, and no space around it")
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    values = {"token_digest": _digest(token), "is_admin": is_admin}
    known = (await connection.execute(select(raters).where(raters.c.name == name))).one_or_none()
    if known is None:
        await connection.execute(insert(raters).values(name=name, **values))
    elif known.token_digest is None:
        await connection.execute(update(raters).where(raters.c.id == known.id).values(**values))
    else:
        raise ValueError(f"there is a rater {name!r} already; remove them first to give them a new token")
    return token


async def remove(connection: AsyncConnection, name: str) -> bool:
    """See Store.remove_rater."""
    row = (
        await connection.execute(select(raters.c.id).where(raters.c.name == name, raters.c.token_digest.is_not(None)))
    ).one_or_none()
    if row is None:
        return False
    await connection.execute(update(raters).where(raters.c.id == row.id).values(token_digest=None))
    await connection.execute(delete(leases).where(leases.c.rater_id == row.id))
    return True


async def by_token(connection: AsyncConnection, token: str) -> Rater | None:
    """See Store.rater_by_token."""
    digest = _digest(token)
    row = (await connection.execute(select(raters).where(raters.c.token_digest == digest))).one_or_none()
    # The time of the index's comparison tells of a digest at most, from which no token can be made.
    if row is None or not hmac.compare_digest(row.token_digest, digest):
        return None
    return _rater(row)


async def by_session(connection: AsyncConnection, rater_id: int, credential: str) -> Rater | None:
    """See Store.rater_by_session."""
    row = (
        await connection.execute(select(raters).where(raters.c.id == rater_id, raters.c.token_digest.is_not(None)))
    ).one_or_none()
    if row is None:
        return None
    rater = _rater(row)
    return rater if hmac.compare_digest(rater.credential.encode(), credential.encode()) else None


async def all_of_them(connection: AsyncConnection) -> list[Rater]:
    """See Store.raters."""
    rows = await connection.execute(select(raters).where(raters.c.token_digest.is_not(None)).order_by(raters.c.name))
    return [_rater(row) for row in rows]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _rater(row: AnyRow) -> Rater:
    # Another digest of the digest: a session's cookie can be read by who holds it.
    credential = hashlib.sha256(b"session" + row.token_digest).hexdigest()[:32]
    return Rater(id=row.id, name=row.name, is_admin=row.is_admin, credential=credential)
