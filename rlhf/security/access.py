"""Lets a call in or refuses it, before anything of its request is read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc

from rlhf.failures import RpcFailure, unauthenticated
from rlhf.logs import get_logger
from rlhf.metrics import CALLS_DENIED
from rlhf.security.caller import Caller
from rlhf.security.identities import Identities, Identity, NotIdentifiedError, read_access_file
from rlhf.security.quota import Bucket
from rlhf.security.reloading import Reloaded
from rlhf.security.roles import ROLES, RolesByRpc, is_for_anyone, require_role

TOKEN_KEY = "authorization"
_SCHEME = "bearer "
_LOG_EVERY_SECONDS = 5.0

_log = get_logger(__name__)

Metadata = Iterable[tuple[str, str | bytes]]


class Access:
    """Admits calls by the access file as it is now; one that was let in goes on when the file takes its role away."""

    def __init__(self, file: Path, *, with_certificates: bool, table: RolesByRpc = ROLES) -> None:
        """Raises CredentialsError."""
        self._identities: Reloaded[Identities] = Reloaded(
            "access file", lambda: read_access_file(file, with_certificates=with_certificates)
        )
        self._table = table
        self._buckets: dict[str, Bucket] = {}
        self._logged = float("-inf")

    def admit(self, rpc: str, metadata: Metadata, context: grpc.aio.ServicerContext[Any, Any]) -> Caller | None:
        """Who calls `rpc` ("/package.Service/Method"); None where nobody need say. Raises RpcFailure."""
        if is_for_anyone(rpc, self._table):
            return None
        try:
            names = context.auth_context().get("x509_subject_alternative_name", ())
            identity = self._identities.current().identify(_token(metadata), [_text(name) for name in names])
        except NotIdentifiedError as error:
            self._denied(error.reason, rpc, context, caller=None)
            raise unauthenticated(str(error)) from None
        try:
            require_role(rpc, identity.roles, self._table)
        except RpcFailure:
            self._denied("role", rpc, context, caller=identity.name)
            raise
        return Caller(identity.name, identity.roles, self._bucket(identity))

    def _bucket(self, identity: Identity) -> Bucket | None:
        """The identity's, at today's rate; what is in it outlives a new access file."""
        if identity.quota is None:
            return None
        per_second, burst = identity.quota.per_second, identity.quota.burst
        bucket = self._buckets.get(identity.name)
        if bucket is None:
            bucket = self._buckets[identity.name] = Bucket(per_second, burst)
        bucket.set_rate(per_second, burst)
        return bucket

    def _denied(
        self, reason: str, rpc: str, context: grpc.aio.ServicerContext[Any, Any], *, caller: str | None
    ) -> None:
        CALLS_DENIED.labels(reason).inc()
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY_SECONDS:  # who guesses tokens must not fill the disk
            self._logged = now
            _log.warning("a call was refused", rpc=rpc[:200], peer=context.peer(), caller=caller, reason=reason)


def _token(metadata: Metadata) -> str | None:
    """The one bearer token of a call. Raises NotIdentifiedError for credentials of another form."""
    values = [_text(value) for key, value in metadata if key == TOKEN_KEY]
    if not values:
        return None
    if len(values) > 1 or not values[0].lower().startswith(_SCHEME):
        raise NotIdentifiedError("wrong_token", "the metadata `authorization` must be one `Bearer TOKEN`")
    return values[0][len(_SCHEME) :].strip()


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
