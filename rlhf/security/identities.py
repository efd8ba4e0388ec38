"""The access file: identities, how each proves who it is, its roles and its quota.

    trainer:
      roles: [rollout, writer]
      token_file: trainer.token             # every line a token that holds; relative to this file
      certificates: [spiffe://example.org/trainer]
    chat:
      roles: [app]
      token_sha256: [9f86d081884c7d65…]     # hexadecimal
      quota: {per_second: 500, burst: 5000}

A token that is sent decides alone: a wrong one is not forgiven for a good certificate. An identity with tokens and
certificates needs both, one with certificates only is that of a call without a token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from rlhf.security.config import CredentialsError
from rlhf.security.roles import Role

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,63}")
_TOKEN = re.compile(r"[\x21-\x7e]{16,4096}")
_MAX_IDENTITIES = 1000  # each is a label of metrics

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Quota(BaseModel):
    """Units a second, and how many may gather; tokens in the policy server, samples in the reward server."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    per_second: float = Field(gt=0)
    burst: float = Field(gt=0)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: list[Role] = Field(min_length=1)
    token_file: Path | None = None
    token_sha256: list[_Sha256] = []
    certificates: list[Annotated[str, StringConstraints(min_length=1)]] = []
    quota: Quota | None = None

    @model_validator(mode="after")
    def _proves_itself(self) -> Self:
        if self.token_file is None and not self.token_sha256 and not self.certificates:
            raise ValueError("needs token_file, token_sha256 or certificates")
        return self


@dataclass(frozen=True)
class Identity:
    """One entry; `certificates` are names of which a caller's certificate must have one, empty = any or none."""

    name: str
    roles: frozenset[Role]
    certificates: frozenset[str]
    quota: Quota | None


class NotIdentifiedError(Exception):
    """Nobody proved to be an identity; `reason` is a label of metrics, the message is for the caller."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Identities:
    """What an access file holds."""

    def __init__(self, tokens: Sequence[tuple[bytes, Identity]], by_certificate: Mapping[str, Identity]) -> None:
        """`tokens`: SHA-256 digests; `by_certificate`: identities that need no token."""
        self._tokens = tokens
        self._by_certificate = by_certificate

    def identify(self, token: str | None, names: Iterable[str]) -> Identity:
        """Who sends `token` over a connection whose certificate has these subject alternative names.

        Raises NotIdentifiedError.
        """
        if token is None:
            return self._certified(names)
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found: Identity | None = None
        # All of them, in constant time: how long this takes tells nothing of where a token comes close.
        for known, identity in self._tokens:
            if hmac.compare_digest(known, digest):
                found = identity
        if found is None:
            raise NotIdentifiedError("wrong_token", "the token is not known here")
        if found.certificates and not found.certificates.intersection(names):
            raise NotIdentifiedError("wrong_certificate", "the token is for another certificate")
        return found

    def _certified(self, names: Iterable[str]) -> Identity:
        found = {identity.name: identity for name in names if (identity := self._by_certificate.get(name))}
        if not found:
            raise NotIdentifiedError("no_token", "no token (metadata `authorization: Bearer TOKEN`)")
        if len(found) > 1:
            raise NotIdentifiedError("wrong_certificate", "the certificate has the names of several identities")
        return next(iter(found.values()))


def read_access_file(path: Path, *, with_certificates: bool) -> tuple[Identities, Sequence[Path]]:
    """The identities, and every file that was read. No message holds anything secret.

    with_certificates: whether callers can have any here. Raises CredentialsError, OSError.
    """
    files = [path]
    tokens: dict[bytes, Identity] = {}
    by_certificate: dict[str, Identity] = {}
    for name, entry in _entries(path).items():
        if entry.certificates and not with_certificates:
            raise CredentialsError(f"{path}: {name}: certificates need a server with tls_client_ca")
        identity = Identity(name, frozenset(entry.roles), frozenset(entry.certificates), entry.quota)
        digests = [bytes.fromhex(digest) for digest in entry.token_sha256]
        if entry.token_file is not None:
            file = path.parent / entry.token_file
            files.append(file)
            digests += [hashlib.sha256(token.encode()).digest() for token in read_tokens(file)]
        for digest in digests:
            if tokens.setdefault(digest, identity) is not identity:
                raise CredentialsError(f"{path}: {name} and {tokens[digest].name} have a token in common")
        for certificate in () if digests else entry.certificates:
            if by_certificate.setdefault(certificate, identity) is not identity:
                raise CredentialsError(f"{path}: {name} and {by_certificate[certificate].name} share {certificate}")
    return Identities(list(tokens.items()), by_certificate), files


def read_tokens(file: Path) -> list[str]:
    """The tokens in a file, one a line, at least one. Raises CredentialsError, OSError."""
    lines = file.read_bytes().decode("ascii", "replace").splitlines()
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise CredentialsError(f"{file}: holds no token")
    for number, token in enumerate(tokens, start=1):
        if not _TOKEN.fullmatch(token):
            raise CredentialsError(f"{file}: token {number} is not 16 to 4096 printable ASCII characters")
    return tokens


def _entries(path: Path) -> dict[str, _Entry]:
    # Neither YAML's nor pydantic's own message: both quote what they read.
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise CredentialsError(f"{path}: line {line} is not YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise CredentialsError(f"{path}: not YAML") from None
    if not isinstance(content, dict) or not content:
        raise CredentialsError(f"{path}: must hold identities, each as `name: {{roles: […], …}}`")
    if len(content) > _MAX_IDENTITIES:
        raise CredentialsError(f"{path}: {len(content)} identities, at most {_MAX_IDENTITIES} are taken")
    entries = {}
    for number, (name, entry) in enumerate(content.items(), start=1):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CredentialsError(f"{path}: the name of identity {number} must be 1 to 63 of A-Z a-z 0-9 _ . -")
        try:
            entries[name] = _Entry.model_validate(entry)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            field = ".".join(str(step) for step in first["loc"])
            why = "no such setting" if first["type"] == "extra_forbidden" else first["msg"]
            where = f"{name}.{field}" if field else name
            raise CredentialsError(f"{path}: {where}: {why.removeprefix('Value error, ')}") from None
    return entries
